"""Where the time goes, by stage."""

import time
from contextlib import contextmanager

import torch


@contextmanager
def timed(clock: dict[str, float], stage: str):
    """Add the wall time of the block to `clock[stage]`, waiting for the GPU at its end; stages inside keep theirs."""
    start, others = time.perf_counter(), sum(clock.values())
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        inside = sum(clock.values()) - others
        clock[stage] = clock.get(stage, 0.0) + time.perf_counter() - start - inside
