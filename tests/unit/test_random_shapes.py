"""GPT-2 and OPT shapes through every preset and all sizes, from the command line, with no option of their own.

Biases, Conv1D weights and learned positions on the one side, projections of the embedding on the other; no tokenizer.
"""

from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import call
from spectrim import any_size_job, job
from tiny_models import logits_of, tiny, token_ids

SELF = ("--calib", "self", "--eval", "self", "--calib-windows", 8, "--calib-length", 16, "--eval-windows", 4)
LEARN = ("--set", "batch_size=2", "--train-windows", 4)
RUNS = {
    "fast": ("--preset", "fast"),
    "balanced": ("--preset", "balanced", "--set", "steps=3", "--set", "project_every=1", *LEARN),
    "best": ("--preset", "best", "--set", "steps=2", "--set", "distil_steps=2", *LEARN),
}


@pytest.fixture(params=["gpt2", "opt"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny(request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("run", RUNS)
def test_every_preset(model: Path, tmp_path: Path, run: str) -> None:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        answer = call("compress", model, "--keep", 0.6, *SELF, *RUNS[run], "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    report, ids = answer.json, token_ids(2, 12)
    assert 0.58 < report["stored"]["keep"] <= 0.6
    assert report["text"]["evaluation"]["sha256"] != report["text"]["calibration"]["sha256"]
    dense, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out"))
    assert type(small) is type(dense)
    assert not torch.allclose(logits_of(small, ids), logits_of(dense, ids), atol=1e-3)
    assert report["quality"]["compressed"]["kl"] > 0
    learning = report["learning"] or {"losses": [], "distil_losses": []}
    steps = {"fast": (0, 0), "balanced": (3, 0), "best": (2, 2)}[run]
    assert (len(learning["losses"]), len(learning["distil_losses"])) == steps


def test_all_sizes(model: Path, tmp_path: Path) -> None:
    sizes = ("--any-size", "--anchors", "0.9,0.6", "--any-size-steps", 4, *LEARN)
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        answer = call("compress", model, *SELF, *sizes, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    large, small = answer.json["sizes"]
    assert (large["size"], small["size"]) == (0.9, 0.6)
    assert 0.58 < small["keep"] <= 0.6 < 0.88 < large["keep"] <= 0.9
    assert 0 < large["quality"]["kl"] < small["quality"]["kl"]
    assert len(answer.json["learning"]["losses"]) == 4
