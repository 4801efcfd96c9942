"""transformers' own exporters, which ours go through: are they there, what they give back, and their noise.

The package `transformers.exporters` came with 5.13; that of 5.13 cannot be imported beside ExecuTorch where there is no
Triton, so 5.14 is the first asked for.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

FIRST = (5, 14)
"""The first release of transformers whose exporters are used."""


def missing_packages(*names: str) -> list[str]:
    """Of these and transformers' exporters, in the words of `pip install`."""
    missing = [name for name in names if find_spec(name) is None]
    release = version("transformers")
    if tuple(int(part) for part in release.split(".")[:2]) < FIRST:
        missing.append(f"transformers>={FIRST[0]}.{FIRST[1]} ({release} is installed)")
    return missing


def program_of(exported: Any) -> Any:
    """The runtime's own program. From 5.23 on an exporter gives a model that holds it, before that the program."""
    return getattr(exported, "program", exported)


@contextmanager
def quietly() -> Iterator[None]:
    """Exporters print their steps on stdout, which is for results, and warn of releases that they were not tested
    with, which the measured error answers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
