"""One run by one process or by several, which a launcher has started: `torchrun --nproc-per-node 2 -m spectrim ...`.

The first rank does what job.py says: it holds the lock, keeps the states, writes and prints. The others load the same
model, take part in whatever is computed (engines/spread.py), and wait at the end until the result is published.
"""

from pathlib import Path

from spectrim.byte_budget import settled
from spectrim.engines.measure import Progress
from spectrim.errors import UsageError
from spectrim.job import Compressed, compress_source, foresee, run
from spectrim.models.load import resolve
from spectrim.processes import joined, launched
from spectrim.reproducible import deterministic
from spectrim.request import Request
from spectrim.resume import ResumeOptions


def run_together(
    request: Request,
    out: Path,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> Compressed | None:
    """The whole job, as job.run; None on all ranks but the first."""
    # Before the group is formed, which uses the GPU: what makes it deterministic is read when it is first used.
    with deterministic(request.deterministic), joined(request.device) as group:
        if group.is_first:
            return run(request, out, overwrite=overwrite, options=options, progress=progress)
        method = request.check()
        source = resolve(request.model)
        request = settled(request, method, source)
        foresee(request, method, source)
        compress_source(request, method, source)
    return None


def refuse_several(what: str) -> None:
    """UsageError where a launcher has started more than one process for what one does."""
    world = launched()
    if world > 1:
        raise UsageError(
            f"{what} is not spread over several processes, and the launcher has started {world}; run it without "
            "torchrun. What is: docs/several-gpus.md"
        )
