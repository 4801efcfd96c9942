"""`--shard I/N` and `--shard merge/N`: which of the tasks of a job array this one is. Imports no torch."""

import re
from pathlib import Path
from typing import NamedTuple

from spectrim.errors import UsageError
from spectrim.store.target import absolute

SHARE = "share"
"""The stage whose state is the sums of one task."""


class Shard(NamedTuple):
    """One of `of` tasks, counted from 1; None is the run that adds up what all of them have measured."""

    number: int | None
    of: int

    def __str__(self) -> str:
        return f"{self.number or 'merge'}/{self.of}"


def parse_shard(text: str) -> Shard:
    """`"2/8"` or `"merge/8"`; UsageError for anything else."""
    match = re.fullmatch(r"(merge|[0-9]{1,6})/([0-9]{1,6})", text)
    if match is None:
        raise UsageError(
            f"--shard {text}: expected I/N or merge/N, e.g. 2/8 for the second of eight tasks, and merge/8 when all "
            "eight are done"
        )
    number, of = None if match[1] == "merge" else int(match[1]), int(match[2])
    if of < 1 or (number is not None and not 1 <= number <= of):
        raise UsageError(f"--shard {text}: the tasks of an array of N are 1/N to N/N; number it from 1")
    return Shard(number, of)


def shard_target(out: Path, shard: Shard) -> Path:
    """The name under which a task leaves its sums: `OUT.shard-2-of-8`, the folder is that with `.resume` behind it."""
    out = absolute(out)
    return out if shard.number is None else out.with_name(f"{out.name}.shard-{shard.number}-of-{shard.of}")
