"""Models that read few tokens at once, by a table of positions: prompt and continuation stay within it."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PretrainedConfig

from command_line import call
from spectrim import any_size_job, job
from spectrim.engines.measure import frozen
from spectrim.evaluate.repetition import repetition
from spectrim.evaluate.room import within_context
from spectrim.evaluate.samples import compare_samples
from spectrim.evaluate.speed import decode_tokens_per_s, speed_note
from spectrim.request import Request
from tiny_models import tiny, token_ids

NO_SAMPLES = "no samples: the model's context has no room for a prompt and a continuation"


@pytest.mark.parametrize(
    ("context", "prompt", "new", "wanted"),
    [
        (None, 24, 32, (24, 32)),
        (56, 24, 32, (24, 32)),
        (55, 24, 32, (24, 31)),
        (40, 24, 32, (20, 20)),
        (40, 3, 64, (3, 37)),
        (9, 24, 32, (4, 5)),
        (2, 24, 32, (1, 1)),
        (1, 24, 32, (0, 0)),
    ],
)
def test_what_fits(context: int | None, prompt: int, new: int, wanted: tuple[int, int]) -> None:
    config: Any = PretrainedConfig()  # of a model without such a limit
    if context is not None:
        config.max_position_embeddings = context
    assert within_context(config, prompt, new) == wanted


@pytest.mark.parametrize(("context", "shown"), [(40, 20), (8, 4)])
@pytest.mark.parametrize("any_size", [False, True])
def test_compress_and_eval_of_a_short_context(tmp_path: Path, context: int, shown: int, any_size: bool) -> None:
    tiny("gpt2", max_position_embeddings=context).save_pretrained(tmp_path / "model")
    asked = Request(
        model=str(tmp_path / "model"), keep=0.8, method="svd", calib="self", eval="self", calib_windows=4,
        eval_windows=2, device="cpu", any_size=any_size, anchors=(0.8, 0.5),
    )  # fmt: skip
    module, run = (any_size_job, any_size_job.run_any_size) if any_size else (job, job.run)
    with mock.patch.object(module, "reload_difference", return_value=0.0):
        made = run(asked, tmp_path / "out")
    report = made if isinstance(made, dict) else made.report
    assert [sample["new_tokens"] for sample in report["samples"]] == [shown, shown]
    assert NO_SAMPLES not in report["warnings"]
    answer = call(
        "eval", tmp_path / "out", "--against", tmp_path / "model", "--text", "self", "--windows", 2,
        "--metrics", "repetition", "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    for which in ("model", "dense"):
        assert answer.json["metrics"]["repetition"][which]["tokens"] == shown
        assert answer.json[which]["decode_tokens_per_s"] > 0
    assert answer.json["notes"] == []


def test_eval_says_what_has_no_room(tmp_path: Path) -> None:
    tiny("gpt2", max_position_embeddings=4).save_pretrained(tmp_path / "model")
    words: tuple[Any, ...] = ("eval", tmp_path / "model", "--against", tmp_path / "model", "--text", "self")
    words += ("--windows", 2, "--metrics", "repetition")
    answer = call(*words, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["metrics"]["repetition"] == {"model": None, "dense": None}
    said = "model: no repetition: its context of 4 tokens has no room for a continuation"
    assert answer.json["notes"] == [said, said.replace("model", "dense", 1)]
    assert f"note: {said}" in call(*words).out


def test_a_context_of_one_token_has_no_room_for_anything() -> None:
    model, ids, said = tiny("gpt2", max_position_embeddings=1), token_ids(2, 1), []
    assert compare_samples(model, model, ids, None, warnings=said) == []
    assert said == [NO_SAMPLES]
    assert repetition(model, ids) is None
    assert decode_tokens_per_s(model) is None
    assert speed_note(None, 3.0) is speed_note(3.0, None) is None


def test_the_last_position_is_used() -> None:
    """Continuations of a capped length are the beginnings of longer ones, of a model that had read more."""
    long = tiny("gpt2", max_position_embeddings=64)
    long.generation_config.eos_token_id = None
    short = tiny("gpt2", max_position_embeddings=12)
    with torch.no_grad(), frozen(short):
        for name, parameter in short.named_parameters():
            parameter.copy_(long.get_parameter(name)[: len(parameter)])
    ids = token_ids(2, 12)
    rows = [compare_samples(model, model, ids, None, prompt_tokens=6, new_tokens=8) for model in (short, long)]
    for cut, whole in zip(*rows, strict=True):
        assert cut["new_tokens"] == 6
        assert whole["dense"].split()[:6] == cut["dense"].split()
