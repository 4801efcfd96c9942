"""Rows of benchmarks/scale.py: peaks of runs that let torch count anew after each stage are those of all stages."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    return runpy.run_path(str(FOLDER / "scale.py"), run_name="imported")


class Counter:
    """What torch.cuda says of a GPU: the most since it was last asked to count anew, in bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "most", 0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2 * self.most)

    def take(self, gigabytes: int) -> None:
        self.most = max(self.most, gigabytes * 10**9)


def test_a_row_keeps_the_larger_of_its_own_peak_and_of_what_torch_says_at_the_end(scale, monkeypatch, tmp_path):
    card = Counter(monkeypatch)

    def stages() -> dict[str, Any]:
        table = scale["scale_low_memory"].StageTable(tmp_path / "stages.json")
        for stage, gigabytes in (("calibrate", 7), ("evaluate", 3)):
            card.take(gigabytes)
            table(stage, 1, 1)
        card.take(1)
        return {"gpu_gb": table.most("gpu_gb"), "gpu_reserved_gb": table.most("gpu_reserved_gb")}

    def peaks() -> dict[str, Any]:
        noted = scale["scale_stages"].Peaks()
        for stage, gigabytes in (("decompose", 5), ("encode", 2)):
            card.take(gigabytes)
            noted.note(stage)
        return {"gpu_gb": max(noted.gigabytes.values()), "gpu_reserved_gb": noted.reserved}

    rows = scale["Rows"](tmp_path, {}, 60.0)
    rows.add("stages", stages)
    rows.add("peaks", peaks)
    rows.add("at the end", lambda: stages() | {"then": card.take(9)})
    rows.add("no stages", lambda: {"then": card.take(4)})
    written = json.loads((tmp_path / "scale.json").read_text())["rows"]
    found = {name: (row["gpu_gb"], row["gpu_reserved_gb"]) for name, row in written.items()}
    assert found == {"stages": (7, 14), "peaks": (5, 10), "at the end": (9, 18), "no stages": (4, 8)}
