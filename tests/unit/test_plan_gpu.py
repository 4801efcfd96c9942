"""Plans of runs on a GPU, made again from what was clocked there, held to what those runs took."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig

from spectrim import memory
from spectrim.engines import plan as planner
from spectrim.engines import plan_memory
from spectrim.engines.passes import Passes
from spectrim.engines.plan import estimate
from spectrim.machine import Rates
from spectrim.models.load import Source
from spectrim.request import Request

RESULTS = Path(__file__).parents[2] / "benchmarks/results/plan-accuracy-cuda.json"
ROWS: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
ASKED: dict[str, dict[str, Any]] = {
    "svd-llm": {"method": "svd-llm"},
    "two-sided, pivot": {"method": "two-sided"},
    "fast": {"preset": "fast"},
    "gptq": {"method": "gptq", "keep": 0.35, "options": {"group_size": 16}},
}
NUMBERS = 24_388_992
"""Of the reference model, whose widths are below."""


def planned(monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]) -> dict[str, Any]:
    """The plan of a row by rates, passes and start that were clocked on the GPU."""
    for module in (memory, planner):
        monkeypatch.setattr(module, "total_memory", lambda _device: 150_000_000_000)
    monkeypatch.setattr(planner, "start_seconds", lambda _device: row["planned_stages"]["start"])
    monkeypatch.setattr(planner, "clock_passes", lambda *_, **__: Passes(**row["passes"]))
    monkeypatch.setattr(planner, "own_work", lambda *_: None)
    monkeypatch.setattr(plan_memory, "resident", lambda: row["start_host"])
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6, vocab_size=8192,
        max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    source = SimpleNamespace(
        config=config, name="reference", dtype=torch.bfloat16,
        checkpoint=SimpleNamespace(numel=NUMBERS, nbytes=2 * NUMBERS),
    )  # fmt: skip
    windows = {"calib_windows": 128, "calib_length": 512, "eval_windows": 40}
    request = Request(**{"model": "x", "keep": 0.8, "device": "cuda", **windows, **ASKED[row["row"]]})
    told = {"dtype": torch.bfloat16, "device": torch.device("cuda"), "rates": Rates(**row["rates"])}
    return estimate(cast(Source, source), request.check(), request, **told)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['row']}, {row['measured']['seconds']:.0f} s")
def test_the_present_plan_is_the_one_of_the_file_and_within_its_bounds(
    monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    plan, kept, took = planned(monkeypatch, row), row["planned"], row["measured"]
    assert plan["peak_memory_bytes"] == {"host": kept["memory_host"], "gpu": kept["memory_gpu"]}
    assert plan["linear_bytes"]["after"] == kept["linear_bytes"]
    if row["row"] != "gptq":  # whose own work was clocked on the GPU, and is not kept layer by layer
        assert plan["seconds"] == pytest.approx(kept["seconds"])
    assert 0.8 <= plan["peak_memory_bytes"]["host"] / took["memory_host"] <= 1.2
    assert 0.8 <= plan["peak_memory_bytes"]["gpu"] / took["memory_gpu"] <= 1.2
    assert 0.5 <= kept["seconds"] / took["seconds"] <= 2


def test_what_a_run_holds_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more a run does there, the more of it; a plan of codes has done that work itself."""
    row = next(row for row in ROWS if row["row"] == "svd-llm")
    host = {
        name: planned(monkeypatch, {**row, "row": name})["peak_memory_bytes"]["host"]
        for name in ("gptq", "svd-llm", "two-sided, pivot", "fast")
    }
    assert host["svd-llm"] - host["gptq"] == plan_memory.DECOMPOSED_BYTES
    assert host["two-sided, pivot"] - host["svd-llm"] == host["fast"] - host["svd-llm"] == plan_memory.BACK_BYTES
