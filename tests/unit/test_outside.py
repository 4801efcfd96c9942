"""The benchmark of other tools: bytes of what they saved, rows, what a row says of a tool that fails."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def read(file: Path) -> dict[str, Any]:
    sys.path.insert(0, str(file.parent))
    try:
        return runpy.run_path(str(file), run_name="imported")
    finally:
        sys.path.remove(str(file.parent))


@pytest.fixture(scope="module")
def outside() -> dict[str, Any]:
    return read(BENCHMARKS / "outside.py")


@pytest.fixture(scope="module")
def driver() -> dict[str, Any]:
    return read(BENCHMARKS / "outside" / "driver.py")


LAYER = "model.layers.1.mlp.up_proj"


class Halves(nn.Module):
    """A layer in few bits: codes and a scale, no weight."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(outputs, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.rand(outputs), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes * self.scale).to(x.dtype).T + self.bias.to(x.dtype)


def block(layer: nn.Module) -> nn.Module:
    """The layer at LAYER, and a head beside the decoder."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.model.layers[1].mlp = nn.Module()
    model.model.layers[1].mlp.up_proj = layer
    model.lm_head = nn.Linear(4, 9)
    return model


def test_only_linears_inside_the_blocks_are_counted(driver):
    assert driver["decoder_linears"](block(nn.Linear(4, 3))) == [LAYER]


def test_a_layer_of_codes_gives_back_its_weight(driver):
    layer = Halves(5, 700)  # more inputs than are probed at once
    found = driver["weight_by_probing"](layer, 700, torch.float32, "cpu")
    torch.testing.assert_close(found, layer.codes * layer.scale, rtol=1e-6, atol=1e-6)


def test_everything_that_a_layer_holds_counts_and_what_is_shared_counts_once(driver):
    layer = Halves(4, 8)
    assert driver["bytes_in_memory"](block(layer), [LAYER]) == 4 * 8 + 4 * 4 + 4 * 4
    layer.again = layer.scale
    assert driver["bytes_in_memory"](block(layer), [LAYER]) == 4 * 8 + 4 * 4 + 4 * 4


def test_codes_inside_a_tensor_that_looks_dense_are_found(driver):
    dense = torch.zeros(32, 64)
    dense.codes, dense.scale = torch.zeros(32, 32, dtype=torch.int8), torch.zeros(32, 1)  # type: ignore[attr-defined]
    dense.__tensor_flatten__ = lambda: (["codes", "scale"], None)  # type: ignore[method-assign]
    found = list(driver["all_tensors"]({"layer": [{"weight": dense}, torch.zeros(3)]}))
    assert [tuple(tensor.shape) for tensor in found] == [(32, 32), (32, 1), (3,)]


def test_bytes_of_a_folder_by_kind_without_head_and_norms(driver, tmp_path):
    stored = {
        f"{LAYER}.weight_packed": torch.zeros(6, dtype=torch.int32),
        f"{LAYER}.weight_scale": torch.zeros(3, dtype=torch.bfloat16),
        f"{LAYER}_norm.weight": torch.zeros(100),
        "lm_head.weight": torch.zeros(100),
    }
    save_file({key: value for key, value in stored.items() if "scale" in key}, tmp_path / "a.safetensors")
    save_file({key: value for key, value in stored.items() if "scale" not in key}, tmp_path / "b.safetensors")
    found = driver["bytes_in_folder"](tmp_path, [LAYER])
    assert found == {"weight_scale": 6, "weight_packed": 24}
    assert driver["bytes_in_folder"](tmp_path, ["model.layers.0.mlp.up_proj"]) == {}


def test_other_logits_are_not_the_same(driver):
    memory = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert driver["compared"](memory, memory + 3.0)["same"]  # logits of one shift are the same model
    found = driver["compared"](memory, memory.flip(1))
    high = 1 / (1 + math.exp(-1))
    assert found == {"kl": pytest.approx(high - (1 - high)), "largest": 1.0, "same": False}


FACTS: dict[str, Any] = {
    "numbers": 1000, "memory_bytes": 2400, "seconds": 3.0, "parts": {"weight": 500, "scale": 40},
    "reload": {"own": {"kl": 1e-5, "same": True}, "plain": {"kl": 2.5, "same": False}},
}  # fmt: skip
FIGURES = {"news": 12.0, "news.kl": 0.1, "news.agreement": 0.8}
DENSE = {"label": "dense", "keep": 1.0, "counted": 1.0, "share": 1.0, "seconds": 0.0, "news": 10.0}


def test_a_row_counts_the_file_or_else_memory(outside):
    row = outside["row_of"]("tool 4", FACTS, FIGURES)
    assert (row["share"], row["bytes"], row["counted_in"]) == (540 / 2000, 540, "files")
    assert row["reloads"] == "own: same, plain: other logits (KL 2.50)"
    row = outside["row_of"]("tool 4", FACTS | {"parts": {}, "reload": {"own": {"error": "E", "same": False}}}, FIGURES)
    assert (row["share"], row["counted_in"], row["reloads"]) == (1.2, "memory", "own: error")
    assert outside["reload_word"](FACTS | {"save_error": "ValueError: no"}) == "cannot be saved"


def test_rows_are_taken_by_the_frontier_and_by_compare(outside):
    rows = [DENSE, outside["row_of"]("tool 4", FACTS, FIGURES)]
    own = {"label": "one budget", "keep": 0.2, "share": 0.2, "seconds": 1.0, "news": 11.0, "news.kl": 0.05}
    (verdict,) = read(BENCHMARKS / "frontier.py")["verdicts"]([*rows, own], ["news"])
    assert (verdict["rival"]["label"], verdict["above"]) == ("tool 4", [])
    assert "| tool 4 | 0.27 | 12.00 | 0.1000, 0.800 |" in read(BENCHMARKS / "compare.py")["table"](rows, ["news"])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("Traceback\n  File\nValueError: no such bits\n\n", "ValueError: no such bits"),
        ("ImportError: needs a kernel\n[end of the log]\n", "ImportError: needs a kernel"),
        ("killed\n", "killed"),
        ("", "said nothing"),
    ],
)
def test_the_line_that_names_the_error(outside, said, line):
    assert outside["last_line"](said) == line


def test_weights_of_a_wrong_shape_or_not_finite_are_refused(outside):
    model = block(nn.Linear(4, 3))
    given = {f"{LAYER}.weight": torch.ones(3, 4)}
    assert outside["with_weights"](model, given).get_parameter(f"{LAYER}.weight").eq(1).all()
    assert not model.get_parameter(f"{LAYER}.weight").eq(1).all()
    for weight in (torch.ones(3, 5), torch.full((3, 4), torch.nan)):
        with pytest.raises(outside["Failure"], match=LAYER):
            outside["with_weights"](model, {f"{LAYER}.weight": weight})


class Bench:
    """Judge and text of a run without a model."""

    def __init__(self, *_: Any) -> None:
        self.texts, self.calibration = {"news": None}, torch.zeros(1, 2)
        self.folder, self.device = Path("."), torch.device("cpu")

    def dense_row(self) -> dict[str, Any]:
        return {key: value for key, value in DENSE.items() if key != "share"}


def test_a_tool_that_fails_leaves_the_others(outside, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "use_broken.py"
    broken.write_text("raise ImportError('needs a kernel')")
    (tmp_path / "use_works.py").write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        f"facts = {FACTS!r}\n"
        "if sys.argv[1] == 'make':\n    (out / 'facts.json').write_text(json.dumps(facts))\n"
        "else:\n    sys.exit('ValueError: cannot load')\n"
    )
    space, tool = outside["main"].__globals__, outside["Tool"]
    tools = {"broken": tool("broken", (), (4, 2)), "works": tool("works", (), (4,), ("plain",))}
    for name, value in {
        "Bench": Bench, "DRIVERS": tmp_path, "TOOLS": tools, "judged": lambda *_: FIGURES,
    }.items():  # fmt: skip
        monkeypatch.setitem(space, name, value)
    monkeypatch.setattr(sys, "argv", ["outside.py", "--here", "--out", str(tmp_path), "--tools", "broken", "works"])
    outside["main"]()
    found = json.loads((tmp_path / "outside.json").read_text())
    assert [(f["label"], f["error"]) for f in found["failed"]] == [
        ("broken 4", "ImportError: needs a kernel"), ("broken 2", "ImportError: needs a kernel"),
    ]  # fmt: skip
    assert [(r["label"], r["share"], r.get("reloads")) for r in found["rows"]] == [
        ("dense", 1.0, None), ("works 4", 0.27, "plain: error"),
    ]  # fmt: skip
    assert found["rows"][1]["facts"]["reload"]["plain"]["error"] == "ValueError: cannot load"
    assert "| broken 2 | | failed: ImportError: needs a kernel |" in (tmp_path / "outside.md").read_text()
    assert "works 4" in capsys.readouterr().out


def test_every_tool_has_a_driver_and_a_pinned_version(outside):
    for tool in outside["TOOLS"].values():
        assert (BENCHMARKS / "outside" / f"use_{tool.driver}.py").exists()
        assert "==" in tool.requirements[0]
    assert outside["pinned"]("torch").startswith("torch==")
