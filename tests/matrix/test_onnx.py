"""`spectrim export --to onnx`: ONNX Runtime gives the model's logits and texts, at sizes that were not traced.

The exports themselves are skipped where the packages of the extra `onnx` are not installed; `make matrix` has them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import spectrim
from command_line import call
from snippets import ROOT, read_snippets
from spectrim.integrations import exporters
from spectrim.integrations import onnx as our_onnx
from spectrim.store import verify_manifest
from tiny_models import logits_of, tiny, token_ids

needs_onnx = pytest.mark.skipif(
    exporters.missing_packages(*our_onnx.NEEDED) != [],
    reason="needs onnx, onnxscript and onnxruntime, and transformers from 5.14 on",
)


def small(folder: Path, storage: str, name: str = "llama-gqa-bias") -> Path:
    options = {"storage": storage}
    made = spectrim.compress(tiny(name), keep=0.5, method="svd", options=options, calibration=token_ids(2))
    return made.save_pretrained(folder)


def export(folder: Path, out: Path) -> Any:
    """The session of what was written, and the measured error."""
    import onnxruntime

    answer = call("export", folder, "--to", "onnx", "--out", out, "--json")
    assert answer.code == 0, answer.err
    print(f"{folder.name}: relative error of the logits {answer.json['error']:.2e}")
    assert 0 < answer.json["error"] < 1e-5
    assert json.loads((out / "report.json").read_text())["error"] == answer.json["error"]
    verify_manifest(out)
    return onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])


def empty_cache(session: Any, rows: int) -> dict[str, np.ndarray]:
    given = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {value.name: np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32) for value in given}


def step(session: Any, ids: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
    """Logits, and the cache for the next step."""
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask, **past}), strict=True))
    return found["logits"], {name: found[name.replace("past_key_values", "present")] for name in past}


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_onnx_runtime_gives_the_models_logits(storage, tmp_path):
    session = export(small(tmp_path / "small", storage), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    for batch, length in ((1, 1), (1, 29), (5, 6)):
        ids = token_ids(batch, length)
        mask = torch.ones_like(ids)
        mask[-1, : length // 2] = 0  # padding on the left, which rotary positions do not mind
        found, _ = step(session, ids.numpy(), mask.numpy(), empty_cache(session, batch))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        seen = mask.bool()
        torch.testing.assert_close(torch.from_numpy(found)[seen], expected[seen], atol=1e-4, rtol=1e-4)
    kinds = {node.op_type for node in _graph(tmp_path / "out" / "model.onnx").node}
    assert "MatMul" in kinds
    # The numbers of the graph are those of the file: no factor was multiplied out.
    stored = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert stored < 4 * (model.num_parameters() + 2000)


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama-gqa-bias", "mistral", "opt"])
def test_onnx_runtime_generates_with_its_cache_what_the_model_generates(name, tmp_path):
    """Sampled, since a random model repeats its likeliest token; beyond mistral's window, here of 8 tokens."""
    session = export(small(tmp_path / name, "factor", name), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
    ids = token_ids(2, 5).numpy()
    draw = np.random.default_rng(0)
    feed, text, past = ids, ids, empty_cache(session, 2)
    for _ in range(20):
        logits, past = step(session, feed, np.ones_like(text), past)
        expected = logits_of(model, torch.from_numpy(text))[:, -1]
        torch.testing.assert_close(torch.from_numpy(logits[:, -1]), expected, atol=1e-4, rtol=1e-4)
        feed = (logits[:, -1] + draw.gumbel(size=logits[:, -1].shape)).argmax(-1)[:, None]
        text = np.concatenate([text, feed], axis=1)
    assert len(np.unique(text[:, 5:])) > 5


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_loop_in_the_documents_writes_what_generate_writes(tmp_path, monkeypatch, capsys):
    words = ("--keep", 0.8, "--method", "svd", "--calib-windows", 8, "--calib-length", 64, "--eval", "none")
    assert call("compress", "builtin:tiny", "--out", tmp_path / "small", *words).code == 0
    export(tmp_path / "small", tmp_path / "small-onnx")
    (loop,) = [
        s for s in read_snippets(ROOT / "docs" / "serve.md") if "onnxruntime" in s.text and s.language == "python"
    ]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(loop.text, loop.where, "exec"), {})
    words = AutoTokenizer.from_pretrained(tmp_path / "small")
    prompt = words("The history of", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    mask = torch.ones_like(prompt)
    asked = GenerationConfig(max_new_tokens=40, min_new_tokens=40, do_sample=False, pad_token_id=0)
    text = model.generate(prompt, attention_mask=mask, generation_config=asked)
    assert capsys.readouterr().out.rstrip("\n") == words.decode(text[0]).rstrip("\n")


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False).graph


def test_missing_packages_are_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "find_spec", lambda name: None if name == "onnxscript" else object())
    monkeypatch.setattr(exporters, "version", lambda name: "5.14.0")
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "needs onnxscript: pip install 'spectrim[onnx]'" in answer.message
    assert not (tmp_path / "out").exists()


def test_a_graph_that_disagrees_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(our_onnx, "missing_packages", lambda *names: [])
    monkeypatch.setattr(our_onnx, "_write_graph", lambda model, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(our_onnx, "graph_logits", lambda path, ids: torch.full((1,), float("nan")))
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 5
    assert "differ by nan" in answer.message
    assert not (tmp_path / "out").exists()


def test_what_the_exporter_raises_is_an_error_about_the_model(tmp_path, monkeypatch):
    def fail(model, path):
        raise KeyError("aten.something")

    monkeypatch.setattr(our_onnx, "missing_packages", lambda *names: [])
    monkeypatch.setattr(our_onnx, "_write_graph", fail)
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 3
    assert "ONNX Runtime's exporter cannot export LlamaForCausalLM (KeyError: 'aten.something')" in answer.message
    assert not (tmp_path / "out").exists()


def test_a_package_that_the_exporter_finds_too_old_is_an_error_of_the_installation(tmp_path, monkeypatch):
    def fail(model, path):
        raise ImportError("To use OnnxExporter, please install the following dependencies: torch>=2.11.0")

    monkeypatch.setattr(our_onnx, "missing_packages", lambda *names: [])
    monkeypatch.setattr(our_onnx, "_write_graph", fail)
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "onnx", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "--to onnx: ImportError: To use OnnxExporter" in answer.message
    assert "pip install -U 'spectrim[onnx]'" in answer.message
    assert not (tmp_path / "out").exists()


def test_a_graph_with_other_inputs_than_were_traced_is_refused():
    class Value:
        name = ""

    class Graph:
        inputs, outputs = [Value() for _ in range(5)], [Value() for _ in range(5)]

    with pytest.raises(ValueError, match="5 inputs or outputs where 6 were traced"):
        our_onnx._rename(Graph(), blocks=2)


def test_a_cache_of_something_else_than_keys_and_values_is_refused():
    class Model:
        def __call__(self, *, past_key_values, **_):
            past_key_values.layers.append(object())

    with pytest.raises(ValueError, match=r"block 0 keeps something else than keys and values \(object\)"):
        our_onnx._filled_cache(Model(), token_ids(2, 3))
