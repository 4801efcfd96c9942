"""What each stage of a run took of a GPU: seconds and the most memory; called by scale.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scale_profile import stages_seen

BETWEEN = "between stages"


class Peaks:
    """The most that torch had allocated in each stage, and reserved in all of them, in GB; nothing on a CPU."""

    def __init__(self) -> None:
        self.gigabytes: dict[str, float] = {}
        self.reserved = 0.0

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Stages are told apart meanwhile."""
        with stages_seen(lambda _: self.note(BETWEEN), self.note):
            yield
        self.note(BETWEEN)

    def note(self, stage: str) -> None:
        """What was allocated at most since the last note belongs to `stage`."""
        if torch.cuda.is_available():
            most = torch.cuda.max_memory_allocated() / 1e9
            self.gigabytes[stage] = max(most, self.gigabytes.get(stage, 0.0))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() / 1e9)
            torch.cuda.reset_peak_memory_stats()


def table(row: dict[str, Any]) -> str:
    """Seconds and peak of every stage of a row of `fast`, a line each."""
    peaks, took = row["gpu_peaks_gb"], row["stages"]
    lines = [f"{'stage':16} {'seconds':>8} {'GPU, GB':>8}"]
    for stage in dict.fromkeys([*took, *peaks]):
        seconds = f"{took[stage]:8.2f}" if stage in took else " " * 8
        lines.append(f"{stage:16} {seconds} {f'{peaks[stage]:8.1f}' if stage in peaks else ''}")
    share = row["calibrate_of_floor"]
    lines.append(f"calibration, share of its floor: {'unknown' if share is None else f'{share:.1%}'}")
    return "\n".join(lines)
