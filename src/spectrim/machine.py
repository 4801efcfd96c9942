"""What this machine does in a second, measured in about two: products, copies, softmax, eigenvalues.

Each rate is the best of several short tries: other work on the machine makes tries slower, never faster. On a GPU what
is clocked is large enough to fill it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectrim.engines.measure import computing_dtype

TRY_S = 0.02
"""A try is repeated inside until it takes this long, so that the clock's own error does not count."""
TRIES = 6
SIDE = 256
"""Rows of the matrix whose eigenvalues are clocked: large enough for the cost to be cubic on a CPU, and quick there."""
MOST_SIDE = {"cpu": 512, "cuda": 4096}
"""The same at most, where the rows of a model are known: on a GPU a cubed row of few is far dearer than one of many."""
START_S = (3.0, 60.0)
"""Between which the start of a process is believed: less has not imported what a run does, more is not a start."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device, for the work of one process."""

    device: str
    computing_dtype: str  # of products in forward passes
    products: float  # floating-point operations a second in that dtype
    full_products: float  # the same in float32
    copied: float  # bytes a second read and written, each counted
    softmax: float  # entries a second of log_softmax over 8,192 of them
    eigen: float  # seconds of a symmetric eigendecomposition in float64, per cubed row


def measure_rates(device: torch.device, side: int = SIDE) -> Rates:
    """Clock the five; under two seconds on a CPU. `side` are the rows of matrices whose eigenvalues are wanted."""
    on_gpu = device.type == "cuda"
    rows, inner, columns = (8192, 2048, 2048) if on_gpu else (1024, 512, 1024)
    a, b = torch.randn(rows, inner, device=device), torch.randn(inner, columns, device=device)
    wide = torch.randn(8192 if on_gpu else 128, 8192, device=device)
    large = torch.zeros((128 if on_gpu else 8) * 2**20, device=device)  # past the caches of most
    other = torch.ones_like(large)
    side = max(SIDE, min(side, MOST_SIDE["cuda" if on_gpu else "cpu"]))
    operations = 2.0 * rows * inner * columns
    computing = getattr(torch, computing_dtype(device))
    low_a, low_b = a.to(computing), b.to(computing)
    return Rates(
        device=str(device),
        computing_dtype=computing_dtype(device),
        products=operations / seconds_of(lambda: low_a @ low_b, device),
        full_products=operations / seconds_of(lambda: a @ b, device),
        copied=2.0 * large.nbytes / seconds_of(lambda: other.copy_(large), device),
        softmax=wide.numel() / seconds_of(lambda: wide.log_softmax(-1), device),
        eigen=seconds_of(_eigen(device, side), device, tries=TRIES if side == SIDE else 2) / side**3,
    )


def start_seconds(device: torch.device) -> float:
    """What it took until this process could work, if it was started for this: of a CPU in processor time."""
    spent = time.process_time() if device.type == "cpu" else _age()
    least, most = START_S
    return spent if least <= spent <= most else 5.0


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        begun = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def seconds_of(work: Callable[[], object], device: torch.device, *, tries: int = TRIES) -> float:
    """Seconds of one `work`, the best of several tries."""
    work()
    wait_for(device)
    best, count = float("inf"), 1
    for _ in range(tries):
        wall, busy = time.perf_counter(), time.process_time()
        for _ in range(count):
            work()
        wait_for(device)
        taken = time.perf_counter() - wall
        if device.type == "cpu":  # of one thread, without the time that other processes had
            taken = min(taken, max(time.process_time() - busy, 1e-9))
        taken /= count
        best, count = min(best, taken), max(1, int(TRY_S / max(taken, 1e-7)))
    return best


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _eigen(device: torch.device, side: int) -> Callable[[], Tensor]:
    where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    root = torch.randn(side, side, dtype=torch.float64, device=where)
    matrix = root @ root.mT
    return lambda: torch.linalg.eigh(matrix).eigenvalues
