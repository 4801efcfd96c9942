"""`spectrim export --to onnx`: ONNX Runtime gives the model's logits, at sizes that were not traced.

The exports themselves are skipped where the packages of the extra `onnx` are not installed; `make matrix` has them.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim
from command_line import call
from spectrim.integrations import onnx as our_onnx
from spectrim.store import verify_manifest
from tiny_models import logits_of, tiny, token_ids

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in our_onnx.NEEDED), reason="needs onnx, onnxscript and onnxruntime"
)


def small(folder: Path, storage: str) -> Path:
    model = tiny("llama-gqa-bias")
    made = spectrim.compress(model, keep=0.5, method="svd", options={"storage": storage}, calibration=token_ids(2))
    return made.save_pretrained(folder)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_onnx_runtime_gives_the_models_logits(storage, tmp_path):
    import onnxruntime

    answer = call("export", small(tmp_path / "small", storage), "--to", "onnx", "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert 0 < answer.json["error"] < 1e-5
    verify_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["error"] == answer.json["error"]
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"), providers=["CPUExecutionProvider"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    for batch, length in ((1, 1), (1, 29), (5, 6)):
        ids = token_ids(batch, length)
        given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        found = torch.from_numpy(session.run(None, given)[0])
        torch.testing.assert_close(found, logits_of(model, ids), atol=1e-4, rtol=1e-4)
    kinds = {node.op_type for node in _graph(tmp_path / "out" / "model.onnx").node}
    assert "MatMul" in kinds
    # The numbers of the graph are those of the file: no factor was multiplied out.
    stored = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert stored < 4 * (model.num_parameters() + 2000)


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False).graph


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(our_onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "needs onnxscript: pip install 'spectrim[onnx]'" in answer.message
    assert not (tmp_path / "out").exists()


def test_a_graph_that_disagrees_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(our_onnx, "find_spec", lambda name: object())
    monkeypatch.setattr(our_onnx, "_write_graph", lambda model, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(our_onnx, "graph_logits", lambda path, ids: torch.full((1,), float("nan")))
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 5
    assert "differ by nan" in answer.message
    assert not (tmp_path / "out").exists()


def test_what_the_exporter_raises_is_an_error_about_the_model(tmp_path, monkeypatch):
    def fail(model, path):
        raise KeyError("aten.something")

    monkeypatch.setattr(our_onnx, "find_spec", lambda name: object())
    monkeypatch.setattr(our_onnx, "_write_graph", fail)
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 3
    assert "ONNX Runtime's exporter cannot export LlamaForCausalLM (KeyError: 'aten.something')" in answer.message
    assert not (tmp_path / "out").exists()
