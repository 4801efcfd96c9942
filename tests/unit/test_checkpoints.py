"""A compression that is killed and gone on with: bit for bit the uninterrupted one, and nothing is measured twice."""

from typing import Any

import pytest
import torch
from torch import Tensor

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines import distil as distil_engine
from spectrim.engines import run as closed_run
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.errors import InputError, NumericalError
from spectrim.methods.weights.soco import SoCo
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

CALIBRATION, TRAINING = token_ids(8, 16), token_ids(12, 16, seed=3)
EAGER = {"explore": 0.2, "refine": 0.7, "hysteresis": 0.0}
"""Components come back (5 of them), so that the running means of pruned ones' gradients matter."""
RUNS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "soco": ("soco", {"steps": 12, "batch_size": 4, "project_every": 3, "distil_steps": 4, **EAGER}, ("block:3",)),
    "svd-llm": ("svd-llm", {"storage": "pivot", "update": "sequential"}, ("block:3", "kl:4")),
    "two-sided": ("two-sided", {"storage": "factor"}, ("kl:2", "kl:2", "refit")),
}


def run(name: str, *, seed: int = 1, keep: float = 0.5, calibration: Tensor = CALIBRATION, **options: Any) -> Outcome:
    method, fields, recovery = RUNS[name]
    return compress_model(
        tiny("llama-gqa-bias"), make_method(method, options=fields), keep, calibration, TRAINING,
        recovery=recovery, seed=seed, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole() -> dict[str, Outcome]:
    outcomes = {name: run(name) for name in RUNS}
    learned = outcomes["soco"].learned
    assert learned is not None
    assert learned.returned > 0
    return outcomes


def assert_same(a: Outcome, b: Outcome) -> None:
    mine, theirs = a.model.state_dict(), b.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
    assert a.plan == b.plan
    assert a.recovered == b.recovered
    assert a.warnings == b.warnings
    if a.learned is not None and b.learned is not None:
        assert (a.learned.losses, a.learned.keeps) == (b.learned.losses, b.learned.keeps)
        assert a.learned.returned == b.learned.returned


# Projections of the scores are before steps 3, 6 and 9 (done counts from 1).
@pytest.mark.parametrize(
    ("name", "stage", "step", "every"),
    [("soco", "learn scores", k, 1) for k in (1, 2, 3, 4, 6, 7, 10, 12)]
    + [("soco", "learn scores", 8, 3), ("soco", "distil", 3, 2), ("soco", "block 2 of 2", 2, 1)]
    + [("svd-llm", "block 1 of 2", 3, 1), ("svd-llm", "block 2 of 2", 1, 1), ("svd-llm", "distil", 2, 1)]
    + [("two-sided", "distil", 2, 0)],
)
def test_killed_and_gone_on_with_is_bit_for_bit_the_whole(monkeypatch, whole, name, stage, step, every):
    checkpoint = MemoryCheckpoint(every=every)
    with pytest.raises(Killed):
        run(name, checkpoint=checkpoint, progress=kill_at(stage, step))
    monkeypatch.setattr(closed_run, "measure", lambda *_a, **_k: pytest.fail("measured again"))
    monkeypatch.setattr(closed_run, "decompose_all", lambda *_a, **_k: pytest.fail("decomposed again"))
    assert_same(run(name, checkpoint=checkpoint), whole[name])


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_restored_without_training(monkeypatch, whole, name):
    checkpoint = MemoryCheckpoint()
    assert_same(run(name, checkpoint=checkpoint), whole[name])
    assert checkpoint.log[0][0] == "closed form"
    log = list(checkpoint.log)
    monkeypatch.setattr(SoCo, "loss", lambda *_a: pytest.fail("trained again"))
    monkeypatch.setattr(distil_engine, "distillation_loss", lambda *_a: pytest.fail("trained again"))
    assert_same(run(name, checkpoint=checkpoint), whole[name])
    assert checkpoint.log == log


def test_the_closed_form_is_kept_once_and_only_when_there_is_something_to_go_on_from():
    checkpoint = MemoryCheckpoint(every=5)
    with pytest.raises(Killed):
        run("soco", checkpoint=checkpoint, progress=kill_at("learn scores", 4))
    assert checkpoint.log == []
    with pytest.raises(Killed):
        run("soco", checkpoint=checkpoint, progress=kill_at("learn scores", 11))
    assert [stage for stage, _ in checkpoint.log] == ["closed form", *["scores"] * (len(checkpoint.log) - 1)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"keep": 0.6}, r"another keep \(0\.5, now 0\.6\)"),
        ({"seed": 2}, "another seed"),
        ({"calibration": CALIBRATION[:4]}, "another calibration"),
    ],
)
def test_the_closed_form_of_another_run_is_refused(changes, says):
    checkpoint = MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        run("soco", checkpoint=checkpoint, progress=kill_at("learn scores", 1))
    with pytest.raises(InputError, match=says):
        run("soco", checkpoint=checkpoint, **changes)


@pytest.mark.parametrize("step", [5, 6])  # 6: with a projection before it
def test_after_a_loss_that_was_not_finite_the_run_goes_on_from_the_last_good_state(monkeypatch, whole, step):
    checkpoint, calls, real = MemoryCheckpoint(), [0], SoCo.loss

    def failing(self: SoCo, student_logits: Tensor, ids: Tensor, teacher_logits: Tensor) -> Tensor:
        calls[0] += 1
        return real(self, student_logits, ids, teacher_logits) * (torch.nan if calls[0] == step + 1 else 1.0)

    monkeypatch.setattr(SoCo, "loss", failing)
    with pytest.raises(NumericalError, match=f"soco: the loss is nan at step {step} of 12"):
        run("soco", checkpoint=checkpoint)
    assert checkpoint.log == [("closed form", 1), ("scores", step)]
    assert_same(run("soco", checkpoint=checkpoint), whole["soco"])
