"""The benchmark of the one budget: which rivals it is held against, and what it says of them."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.registry import make_method

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def frontier() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "frontier.py"), run_name="imported")
    finally:
        sys.path.remove(str(FOLDER))


def row(label: str, share: float, perplexity: float, kl: float = 0.1) -> dict[str, Any]:
    return {"label": label, "keep": share, "share": share, "seconds": 1.0, "news": perplexity, "news.kl": kl}


ROWS = [
    {"label": "dense", "keep": 1.0, "share": 1.0, "seconds": 0.0, "news": 10.0},
    row("one budget", 0.13, 15.0),
    row("one budget", 0.26, 11.0),
    row("gptq 2", 0.13, 20.0, 0.2),
    row("gptq 4", 0.26, 10.9, 0.2),
    row("rtn 4", 0.26, 11.5, 0.05),
    row("rtn 1", 0.05, 90.0),
]


def test_rivals_that_others_beat_are_not_matched(frontier):
    assert [r["label"] for r in frontier["standing"](ROWS, "news")] == ["gptq 2", "gptq 4", "rtn 1"]


def test_a_rival_is_compared_with_the_one_budget_of_at_most_its_bytes(frontier):
    found = {v["rival"]["label"]: (v["ours"]["share"], v["above"]) for v in frontier["verdicts"](ROWS, ["news"])}
    assert found == {"gptq 2": (0.13, []), "gptq 4": (0.26, ["news"]), "rtn 4": (0.26, ["news.kl"])}
    lines = frontier["table"](ROWS, ["news"]).splitlines()
    assert any(line.startswith("| gptq 4 |") and line.endswith("ABOVE on news |") for line in lines)
    assert frontier["chart"](ROWS, "news", 3.0).startswith("<svg")


def test_every_row_can_be_made_and_has_a_key_of_its_own(frontier):
    tasks = [*frontier["rivals"](128, False), *(frontier["ours"](0.2, 12, name) for name in frontier["VARIANTS"])]
    for task in tasks:
        make_method(task.row.method, task.row.preset, dict(task.row.options))
    keys = [(task.row.label, task.keep) for task in tasks]
    assert len(set(keys)) == len(keys)
