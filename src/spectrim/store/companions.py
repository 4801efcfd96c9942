"""Files that go from a stranger's model folder into a result as they are: tokenizer, template, licence.

Copied as bytes, never parsed or rendered here. A link that leads out of the folder would put whatever it names (a key,
a password file) into something that is meant to be published: it is refused like a link in the place of weights.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from spectrim.errors import InputError
from spectrim.store.files import check_stays_inside, open_regular
from spectrim.store.limits import COMPANION_BYTES_MAX

CHUNK_BYTES = 2**20


def check_companions(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that are in `folder`; `InputError` for one that cannot be copied. Reads nothing."""
    present = [name for name in names if os.path.lexists(folder / name)]
    for name in present:
        check_stays_inside(folder / name, folder)
        with open_regular(folder / name) as (_, size):
            _refuse_large(folder / name, size)
    return present


def copy_companions(folder: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of `names` that are in `folder` to `target`, byte for byte."""
    for name in check_companions(folder, names):
        with open_regular(folder / name) as (source, size):
            _refuse_large(folder / name, size)
            left = size
            with open(target / name, "wb") as copy:
                while left and (part := source.read(min(left, CHUNK_BYTES))):
                    copy.write(part)
                    left -= len(part)
            if left or source.read(1):
                raise InputError(f"{folder / name}: changed while it was copied; run again")


def _refuse_large(path: Path, size: int) -> None:
    if size > COMPANION_BYTES_MAX:
        raise InputError(
            f"{path}: {size:,} bytes, allowed {COMPANION_BYTES_MAX:,} for a file that is copied beside the weights; "
            "is this the right file?"
        )
