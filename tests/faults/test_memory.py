"""Memory that runs out in any part of a run: smaller batches, the same result, and states that stay of use."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from command_line import PLAIN, call, small_model, small_text
from memory_checkpoint import Killed, MemoryCheckpoint
from spectrim import job
from spectrim.engines import measure as measure_engine
from spectrim.engines.block import refine_blocks
from spectrim.engines.checkpoint import Saved
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.engines.recovery import recover
from spectrim.errors import ResourceError
from spectrim.linalg.fallback import Fallback, listening, tell
from spectrim.memory import Batch
from spectrim.models.walk import find_layers
from spectrim.options import parse_step
from spectrim.registry import make_method
from spectrim.resume import Resume
from spectrim.store.state import write_state
from spectrim.store.work import WorkFolder
from tiny_models import tiny, token_ids

pytestmark = [pytest.mark.faults, pytest.mark.fault(59)]

WINDOWS = token_ids(16, 16)
GPU_SAYS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


class Scarce:
    """Linear layers that find no memory for more than `most` windows, from the moment it is set."""

    def __init__(self) -> None:
        self.most: int | None = None

    @contextmanager
    def on(self) -> Iterator["Scarce"]:
        real = torch.nn.functional.linear

        def linear(x: Tensor, *rest: Any) -> Tensor:
            if self.most is not None and x.dim() == 3 and len(x) > self.most:
                raise torch.OutOfMemoryError(GPU_SAYS)
            return real(x, *rest)

        with mock.patch.object(torch.nn.functional, "linear", linear):
            yield self


def at(stage: str, done: int, act: Callable[[], None]) -> Any:
    """A progress callback that does something when a stage has come so far."""

    def progress(label: str, now: int, _total: int) -> None:
        if label == stage and now == done:
            act()

    return progress


def both(*calls: Any) -> Any:
    """Several progress callbacks as one."""

    def progress(*said: Any) -> None:
        for tell_it in calls:
            tell_it(*said)

    return progress


def kill() -> None:
    raise Killed


class KilledAfterSaving(MemoryCheckpoint):
    """Stages that say seldom how far they are: killed when a certain state is saved."""

    last: tuple[str, int] | None = None

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        super().save(stage, saved, needed=needed)
        if (stage, saved.step) == self.last:
            raise Killed
        return True


@pytest.fixture(autouse=True)
def _float32_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of sums is then all that differs."""
    monkeypatch.setattr(measure_engine, "cpu_has_bf16", lambda: False)


def run(method: str, options: dict[str, Any], **more: Any) -> Outcome:
    made = make_method(method, options=options)
    return compress_model(tiny("llama-gqa-bias"), made, 0.5, WINDOWS, gradient_windows=8, seed=1, **more)


def assert_close(ours: Outcome, whole: Outcome) -> None:
    """Up to the order of sums."""
    mine, theirs = ours.model.state_dict(), whole.model.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    with torch.no_grad():
        one, other = (o.model(input_ids=WINDOWS[:2], use_cache=False).logits for o in (ours, whole))
    assert torch.allclose(one, other, atol=1e-4 * float(other.abs().max()))


STATES = {"calibrate": "statistics", "couple": "coupling", "propagate": "propagated", "newton": "newton"}
NEWTON = {"steps": 0, "newton": 2, "coupling": "none"}


@pytest.mark.parametrize(
    ("method", "options", "stage", "scarce_at", "killed_at"),
    [
        ("two-sided", {}, "calibrate", 4, 6),
        ("two-sided", {}, "couple", 4, 6),
        ("two-sided", {}, "propagate", 1, 2),
        ("soco", NEWTON, "newton", 0, 4),
    ],
)
def test_states_of_smaller_batches_are_gone_on_with(
    method: str, options: dict[str, Any], stage: str, scarce_at: int, killed_at: int
) -> None:
    """Memory runs out in the middle of a stage, the run is killed after that, and the next one has memory again."""
    whole = run(method, options)
    checkpoint = KilledAfterSaving(every=1, closed=True)
    checkpoint.last = ("newton", killed_at)
    scarce = Scarce()

    def run_out() -> None:
        scarce.most = 2

    told = both(at(stage, scarce_at, run_out), at(stage, killed_at, kill if stage != "newton" else lambda: None))
    with scarce.on(), listening() as heard, pytest.raises(Killed):
        run(method, options, checkpoint=checkpoint, progress=told)
    assert [(f.operation, f.way) for f in heard] == [(stage, "batches of 2")]
    assert any(name.startswith(STATES[stage]) for name in checkpoint.states)
    checkpoint.last = None
    again = run(method, options, checkpoint=checkpoint)
    assert all(why is None for _, why in checkpoint.forgotten), "a state was thrown away"
    assert_close(again, whole)


def test_with_as_little_memory_the_next_process_gives_the_same_bits() -> None:
    scarce = Scarce()
    scarce.most = 2
    with scarce.on():
        whole = run("two-sided", {})
        for stage, done in (("calibrate", 6), ("couple", 6), ("propagate", 1)):
            checkpoint = MemoryCheckpoint(every=1, closed=True)
            with pytest.raises(Killed):
                run("two-sided", {}, checkpoint=checkpoint, progress=at(stage, done, kill))
            again = run("two-sided", {}, checkpoint=checkpoint)
            mine, theirs = again.model.state_dict(), whole.model.state_dict()
            assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == [], stage


@pytest.mark.parametrize(
    "options",
    [{"allocation": "sensitivity"}, {"allocation": "evopress", "generations": 3, "offspring": 4}],
    ids=["sensitivity", "evopress"],
)
def test_searches_judge_in_parts(options: dict[str, Any]) -> None:
    whole = run("svd", options)
    scarce = Scarce()
    scarce.most = 1
    with scarce.on(), listening() as heard:
        found = run("svd", options)
    assert found.plan == whole.plan
    assert {f.operation for f in heard} == {options["allocation"]}
    assert heard[-1].way == "batches of 1"
    scarce.most = 0
    with scarce.on(), pytest.raises(ResourceError, match=f"{options['allocation']}: out of memory with one window"):
        run("svd", options)


@pytest.mark.parametrize("step", ["refit", "reconstruct"])
def test_steps_that_solve_take_smaller_batches_from_the_factors_there_were(step: str) -> None:
    """Memory runs out after the first block, whose factors have been solved for already."""
    whole = run("svd", {"storage": "pivot"}, recovery=(step,))
    scarce = Scarce()

    def run_out() -> None:
        scarce.most = 2

    with scarce.on(), listening() as heard:
        found = run("svd", {"storage": "pivot"}, recovery=(step,), progress=at("refit", 1, run_out))
    assert [(f.operation, f.size, f.way) for f in heard] == [(f"recovery 0 {step}", "4 windows", "batches of 2")]
    assert_close(found, whole)


def test_a_step_that_solves_and_finds_no_memory_at_all_leaves_the_student_alone() -> None:
    teacher, student, walk = compressed()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    scarce = Scarce()

    def run_out() -> None:
        scarce.most = 0

    def timed(_: str) -> Any:
        return contextlib.nullcontext()

    given = ([parse_step("refit")], student, teacher, walk, WINDOWS, WINDOWS)
    with scarce.on(), pytest.raises(ResourceError, match="refit: out of memory with one window at a time"):
        recover(*given, timed=timed, progress=at("refit", 1, run_out))
    after = student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def compressed() -> tuple[Any, Any, Any]:
    teacher = tiny("llama-gqa-bias")
    return teacher, compress_model(teacher, make_method("svd"), 0.5, WINDOWS).model, find_layers(teacher)


@pytest.mark.parametrize("batch_size", [8, 10])
@pytest.mark.parametrize("mixed", [0.0, 0.5])
@pytest.mark.parametrize("when", ["from the start", "between blocks", "in a step"])
def test_block_refinement_goes_on_in_parts_of_a_batch(when: str, mixed: float, batch_size: int) -> None:
    how = {"steps": 6, "batch_size": batch_size, "learning_rate": 3e-3, "mixed": mixed}
    teacher, student, walk = compressed()
    want = refine_blocks(student, teacher, walk, WINDOWS, **how)
    whole = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher, student, walk = compressed()
    scarce = Scarce()

    def run_out() -> None:
        scarce.most = 2

    if when == "from the start":
        run_out()
    moments = {"from the start": ("", 0), "between blocks": ("block 1 of 2", 6), "in a step": ("block 2 of 2", 2)}
    with scarce.on(), listening() as heard:
        losses = refine_blocks(student, teacher, walk, WINDOWS, progress=at(*moments[when], run_out), **how)
    assert [f.way for f in heard] == [f"batches of {size}" for size in ((4, 2) if batch_size == 8 else (5, 2))]
    for mine, theirs in zip(losses, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)
    ours = student.state_dict()
    assert all(torch.allclose(ours[name], whole[name], atol=2e-4) for name in whole)


def test_block_refinement_with_no_memory_at_all_ends_with_advice() -> None:
    teacher, student, walk = compressed()
    scarce = Scarce()

    def run_out() -> None:
        scarce.most = 0

    with scarce.on(), pytest.raises(ResourceError, match="block refinement: out of memory with one window at a time"):
        refine_blocks(student, teacher, walk, WINDOWS, steps=4, batch_size=8, progress=at("block 1 of 2", 1, run_out))


def test_a_batch_larger_than_what_there_is_starts_from_that() -> None:
    tries: list[int] = []

    def work(size: int) -> int:
        tries.append(size)
        if size > 1:
            raise torch.OutOfMemoryError(GPU_SAYS)
        return size

    batch = Batch(32)
    with listening() as heard:
        assert batch.run("x", work, most=4) == 1
    assert tries == [4, 2, 1]
    assert [f.size for f in heard] == ["4 windows", "2 windows"]
    assert batch.run("x", work, most=4) == 1


# ---- what earlier processes were told


def test_the_report_of_a_resumed_run_counts_what_earlier_processes_did(tmp_path: Path) -> None:
    """The first process halves its batches and dies; the second has memory, and goes on from the first one's state."""
    model, text = small_model(tmp_path / "model"), small_text(tmp_path / "text.txt")
    words = ("compress", model, "--out", tmp_path / "out", *PLAIN, "--method", "svd-llm", "--calib", text, "--json")
    words += ("--save-every", "0")
    scarce = Scarce()
    scarce.most = 2
    with scarce.on(), mock.patch.object(job, "write_folder", side_effect=RuntimeError("died")):
        assert call(*words).code == 6
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        answer = call(*words)
    assert answer.code == 0, answer.err
    report = answer.json
    assert report["resumed"]
    assert [(row["operation"], row["way"]) for row in report["fallbacks"]] == [("calibrate", "batches of 2")]
    assert any(line.startswith("calibrate: 1 times done with batches of 2") for line in report["warnings"])


def test_what_was_told_again_counts_once_and_what_was_of_another_run_not_at_all(tmp_path: Path) -> None:
    first, second, own = (Fallback("svd", size, "float64", "why") for size in ("1 x 1", "2 x 2", "3 x 3"))
    (tmp_path / "out.resume").mkdir()
    saved = Saved(1, {"x": torch.zeros(1)}, {"run": {"a": 1}})
    with listening():
        tell(first)
        tell(second)
        Resume(WorkFolder(tmp_path / "out.resume")).save("kl", saved)
    with listening() as now:
        tell(own)
        tell(first)  # done again before the state was found
        resume = Resume(WorkFolder(tmp_path / "out.resume"))
        again = resume.load("kl")
        assert again is not None
        assert again.facts == saved.facts
        assert now == [second, own, first]
        resume.load("kl")  # after a failed try of the same process
        assert now == [second, own, first]
        resume.forget("kl", why="of another run")
        assert now == [own, first]


@pytest.mark.parametrize("told", [{}, [["a"]], [["a", "b", "c", 4]], "abcd"])
def test_a_state_with_other_records_is_refused(told: Any, tmp_path: Path) -> None:
    (tmp_path / "out.resume").mkdir()
    write_state(tmp_path / "out.resume" / "kl.safetensors", 1, {"x": torch.zeros(1)}, {"fallbacks": told})
    resume = Resume(WorkFolder(tmp_path / "out.resume"))
    assert resume.load("kl") is None
    assert "fallbacks must be a list of 4 texts each; kl starts anew" in resume.warnings[0]
