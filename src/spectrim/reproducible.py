"""`--deterministic`: only algorithms that give the same bits every time, on one machine with one set of versions.

torch refuses operations that have no such algorithm (`torch.use_deterministic_algorithms`), and cuBLAS needs a
workspace of fixed size, which is read when its first handle is made: in a process that has used the GPU before, it is
too late. On a CPU runs give the same bits anyway, with as many threads.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spectrim.errors import UsageError

WORKSPACE, WANTED = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch is deterministic if that is `wanted`; everything is put back afterwards.

    UsageError where cuBLAS was started without its workspace.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    workspace = os.environ.get(WORKSPACE)
    if workspace not in WANTED:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            raise UsageError(
                f"deterministic: the GPU is in use already and {WORKSPACE} is {workspace or 'not set'}; set it to "
                f"{WANTED[0]} before this process first uses the GPU"
            )
        os.environ[WORKSPACE] = WANTED[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def determinism() -> dict[str, str | bool]:
    """What holds now, for the report."""
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "cublas_workspace": os.environ.get(WORKSPACE, "not set"),
    }
