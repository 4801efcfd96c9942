"""`spectrim export --to executorch`: ExecuTorch's runtime gives the model's logits, at lengths that were not traced.

The exports themselves are skipped where ExecuTorch (extra `executorch`) is not installed; `tests/matrix/run.sh
executorch` makes an environment that has it.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim
from command_line import call
from spectrim.integrations import exporters
from spectrim.store import verify_manifest
from tiny_models import logits_of, tiny, token_ids


def small(folder: Path, storage: str) -> Path:
    model = tiny("llama-gqa-bias")
    made = spectrim.compress(model, keep=0.5, method="svd", options={"storage": storage}, calibration=token_ids(2))
    return made.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    exporters.missing_packages("executorch") != [], reason="needs executorch, and transformers from 5.14 on"
)
@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_executorch_gives_the_models_logits(storage, tmp_path):
    from executorch.runtime import Runtime

    answer = call(
        "export", small(tmp_path / "small", storage), "--to", "executorch", "--out", tmp_path / "out", "--json"
    )
    assert answer.code == 0, answer.err
    print(f"{storage}: relative error of the logits {answer.json['error']:.2e}")
    assert 0 < answer.json["error"] < 1e-5
    verify_manifest(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["error"] == answer.json["error"]
    method = Runtime.get().load_program(tmp_path / "out" / "model.pte").load_method("forward")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    for length in (1, 2, 29):
        ids = token_ids(1, length)
        (found,) = method.execute([ids, torch.ones_like(ids)])
        torch.testing.assert_close(found, logits_of(model, ids), atol=1e-4, rtol=1e-4)
    # The numbers of the program are those of the file: no factor was multiplied out.
    assert (tmp_path / "out" / "model.pte").stat().st_size < 4 * model.num_parameters() + 100_000


@pytest.mark.parametrize(
    ("release", "told"),
    [
        ("5.23.0", "needs executorch: pip install 'spectrim[executorch]'"),
        ("5.13.1", "needs executorch, transformers>=5.14 (5.13.1 is installed): pip install 'spectrim[executorch]'"),
        ("5.0.0", "transformers>=5.14 (5.0.0 is installed)"),
    ],
)
def test_missing_packages_are_named_with_the_extra(release, told, tmp_path, monkeypatch):
    monkeypatch.setattr(exporters, "find_spec", lambda name: None)
    monkeypatch.setattr(exporters, "version", lambda name: release)
    answer = call("export", small(tmp_path / "small", "factor"), "--to", "executorch", "--out", tmp_path / "out")
    assert answer.code == 2
    assert told in answer.message
    assert not (tmp_path / "out").exists()


def test_the_installed_transformers_has_the_exporters_that_are_asked_for():
    told = exporters.missing_packages("executorch")
    assert ("executorch" in told) == (find_spec("executorch") is None)
    if not any(name.startswith("transformers") for name in told):
        assert find_spec("transformers.exporters") is not None
