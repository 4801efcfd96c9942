"""`spectrim compress --shard`: one task of a job array, or the run that goes on from all of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectrim.shard import Shard
from spectrim.terminal import emit, progress_printer, stdout

if TYPE_CHECKING:
    from spectrim.job import Compressed
    from spectrim.request import Request
    from spectrim.resume import ResumeOptions

ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", help="I/N: measure the I-th of N shares of the calibration windows; merge/N: go on from all of them"
    ),
]


def compress_shard(
    request: "Request", out: Path, shard: Shard, overwrite: bool, options: "ResumeOptions", json_: bool
) -> "Compressed | None":
    """The result of a merge; None of a task, which leaves its sums and says where."""
    from spectrim.shard_job import run_merged, run_shard

    told = {"overwrite": overwrite, "options": options, "progress": progress_printer(json_)}
    if shard.number is None:
        return run_merged(request, out, shard, **told)
    report = run_shard(request, out, shard, **told)
    what = "measured" if report["measured"] else "was measured already"
    then = f"when all {shard.of} are, run the same command with --shard merge/{shard.of}"
    emit(report, json_, lambda: stdout.print(f"shard {shard} {what}: {report['folder']}; {then}", soft_wrap=True))
    return None
