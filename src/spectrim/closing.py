"""The end of every run that writes a folder: what the report says last, and the documents made from it."""

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spectrim.reloaded import LOGIT_TOLERANCE
from spectrim.report.documents import write_documents


def close_report(
    stage: Path,
    report: dict[str, Any],
    *,
    difference: float,
    started: float,
    device: torch.device,
    command: Sequence[str],
) -> None:
    """Put into `report`, and into the documents in `stage`, what only the end of a run knows.

    `difference` is the relative one of the logits that a fresh process read, `started` of `time.perf_counter`.
    """
    report.setdefault("reload", {}).update(relative_logit_difference=difference, allowed=LOGIT_TOLERANCE)
    report["seconds"]["total"] = time.perf_counter() - started
    report["peak_memory_bytes"] = peak_memory(device)
    report["command"] = list(command)
    write_documents(stage, report)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest resident memory of this process, and of the GPU where there is one, in bytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
