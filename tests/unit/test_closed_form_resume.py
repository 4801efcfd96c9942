"""The closed form, killed after any batch, layer or block, goes on: bit for bit the whole, and nothing twice."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines import layerwise
from spectrim.engines import measure as measure_engine
from spectrim.engines import run as closed_run
from spectrim.engines.any_size import AnySize, compress_any_size
from spectrim.engines.closed_form import LEADS_TO_IT
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

WINDOWS = token_ids(16, 16)
METHODS: dict[str, dict[str, Any]] = {
    "two-sided": {},
    "soco": {"steps": 0, "newton": 2, "coupling": "none"},
    "svd-llm": {"storage": "pivot"},
    "asvd": {},
}
ANCHORS = (0.8, 0.6)


class Expert(nn.Module):
    """An mlp through which only some tokens are routed, in each model others."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 32)
        chosen, out = rows[:, 0] > 0, torch.zeros_like(rows)
        out[chosen] = self.up(rows[chosen]).to(out.dtype)
        return out.view_as(x)


def run(method: str, architecture: str = "llama-gqa-bias", **options: Any) -> Outcome:
    made = make_method(method, options=METHODS[method])
    return compress_model(tiny(architecture), made, 0.5, WINDOWS, gradient_windows=8, seed=1, **options)


def all_sizes(method: str, **options: Any) -> AnySize:
    fields = {"steps": 4, "batch_size": 4, "project_every": 1} if method == "soco" else {}
    made = make_method(method, options=fields)
    return compress_any_size(tiny("llama"), made, WINDOWS, anchors=ANCHORS, steps=8, seed=1, **options)


def assert_same(ours: Outcome, whole: Outcome) -> None:
    mine, theirs = ours.model.state_dict(), whole.model.state_dict()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    assert (ours.plan, ours.warnings) == (whole.plan, whole.warnings)


def assert_same_sizes(ours: AnySize, whole: AnySize) -> None:
    for name, layer in whole.layers.items():
        for part in ("left", "right", "scores", "levels"):
            assert torch.equal(getattr(ours.layers[name], part), getattr(layer, part)), (name, part)
    assert (ours.losses, ours.warnings) == (whole.losses, whole.warnings)


@pytest.fixture(scope="module")
def whole() -> dict[str, Outcome]:
    return {name: run(name) for name in METHODS}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many batches gave statistics, and how many weights were decomposed."""
    counts = {"batches": 0, "layers": 0}
    check, decompose = measure_engine.check_sums, layerwise.decompose_layer

    def counting(sums: Any, start: int) -> None:
        counts["batches"] += 1
        check(sums, start)

    def counting_layers(*arguments: Any) -> Any:
        counts["layers"] += 1
        return decompose(*arguments)

    monkeypatch.setattr(measure_engine, "check_sums", counting)
    monkeypatch.setattr(layerwise, "decompose_layer", counting_layers)
    return counts


@pytest.mark.fault(24, 25)
@pytest.mark.parametrize(
    ("method", "stage", "at"),
    [("two-sided", "calibrate", n) for n in (4, 16)]
    + [("two-sided", "couple", 4), ("two-sided", "couple", 8), ("two-sided", "propagate", 1)]
    + [("two-sided", "propagate", 2), ("soco", "newton", 0), ("soco", "newton", 2), ("svd-llm", "calibrate", 8)]
    + [("asvd", "calibrate", 16)],
)
def test_killed_in_the_closed_form_and_gone_on_with(whole, method, stage, at):
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        run(method, checkpoint=checkpoint, progress=kill_at(stage, at))
    assert_same(run(method, checkpoint=checkpoint), whole[method])
    assert not [state for state in checkpoint.states if state.startswith(LEADS_TO_IT)], (
        "the closed form stands for them"
    )
    assert all(why is None for _, why in checkpoint.forgotten)


@pytest.mark.fault(24)
def test_nothing_is_measured_or_decomposed_twice(whole, counted):
    run("two-sided")
    once = dict(counted)
    for stage, at in (("calibrate", 12), ("couple", 8), ("propagate", 1)):
        counted.update(batches=0, layers=0)
        checkpoint = MemoryCheckpoint(every=1, closed=True)
        with pytest.raises(Killed):
            run("two-sided", checkpoint=checkpoint, progress=kill_at(stage, at))
        assert_same(run("two-sided", checkpoint=checkpoint), whole["two-sided"])
        assert counted == once, (stage, at)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    ("method", "every"),
    [
        ("two-sided", 2),
        ("soco", 1),
        pytest.param("two-sided", 1, marks=pytest.mark.slow),
        pytest.param("two-sided", 5, marks=pytest.mark.slow),
    ],
)
def test_killed_after_every_save(whole, method, every):
    """A chain of runs, each of which saves once and dies: it still arrives, whatever is saved when."""

    class Dying(MemoryCheckpoint):
        def save(self, stage, saved, *, needed=False):
            super().save(stage, saved, needed=needed)
            raise Killed

    checkpoint = Dying(every=every, closed=True)
    for _ in range(200):
        try:
            outcome = run(method, checkpoint=checkpoint)
        except Killed:
            continue
        assert_same(outcome, whole[method])
        assert len(checkpoint.log) > 4
        assert method != "soco" or ("newton", 4) in checkpoint.log
        return
    pytest.fail("it never arrived")


@pytest.mark.fault(30)
@pytest.mark.parametrize("lost", ["statistics 0", "coupling 0", "spectra 0 0", "statistics 1", "propagated 0"])
def test_a_state_that_is_lost_is_made_again(whole, lost):
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        run("two-sided", checkpoint=checkpoint, progress=kill_at("propagate", 2))
    del checkpoint.states[lost]
    assert_same(run("two-sided", checkpoint=checkpoint), whole["two-sided"])


@pytest.mark.fault(30, 31)
def test_a_state_of_other_windows_is_not_taken_up(whole):
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        compress_model(
            tiny("llama-gqa-bias"), make_method("two-sided"), 0.5, token_ids(16, 16, seed=9), gradient_windows=8,
            seed=1, checkpoint=checkpoint, progress=kill_at("couple", 8),
        )  # fmt: skip
    assert_same(run("two-sided", checkpoint=checkpoint), whole["two-sided"])
    assert [stage for stage, why in checkpoint.forgotten if why] == ["statistics 0", "coupling 0"]


@pytest.mark.fault(24)
def test_layers_that_are_not_propagated_are_named_again():
    def routed(**options: Any) -> Outcome:
        dense = tiny("llama")
        torch.manual_seed(0)
        dense.model.layers[0].mlp = Expert()
        return compress_model(dense, make_method("two-sided"), 0.6, WINDOWS, seed=1, **options)

    checkpoint, undisturbed = MemoryCheckpoint(every=1, closed=True), routed()
    with pytest.raises(Killed):
        routed(checkpoint=checkpoint, progress=kill_at("propagate", 1))
    assert_same(routed(checkpoint=checkpoint), undisturbed)
    assert any("tokens are routed" in warning for warning in undisturbed.warnings)


@pytest.mark.fault(24, 34)
@pytest.mark.parametrize(
    ("method", "stage", "at"),
    [("two-sided", "calibrate", 4), ("two-sided", "couple", 4), ("soco", "calibrate", 16)]
    + [("soco", f"learn scores at {anchor:g}", n) for anchor in ANCHORS for n in (1, 4)],
)
def test_all_sizes_killed_and_gone_on_with(method, stage, at):
    undisturbed = all_sizes(method)
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        all_sizes(method, checkpoint=checkpoint, progress=kill_at(stage, at))
    assert checkpoint.log
    assert_same_sizes(all_sizes(method, checkpoint=checkpoint), undisturbed)


def test_training_goes_on_when_the_closed_form_was_saved_step_by_step(monkeypatch):
    fields = {"steps": 4, "batch_size": 4, "project_every": 2}

    def learned(**options: Any) -> Outcome:
        made = make_method("soco", options=fields)
        return compress_model(tiny("llama"), made, 0.5, WINDOWS, gradient_windows=8, seed=1, **options)

    undisturbed = learned()
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        learned(checkpoint=checkpoint, progress=kill_at("learn scores", 2))
    monkeypatch.setattr(closed_run, "measure", lambda *_a, **_k: pytest.fail("measured again"))
    assert_same(learned(checkpoint=checkpoint), undisturbed)


def test_sums_are_kept_in_float64_and_restored_exactly():
    model, needs = tiny("llama"), make_method("two-sided").needs
    from spectrim.models.walk import find_layers

    walk = find_layers(model)
    straight = measure_engine.measure(model, walk, WINDOWS, needs, gradient_windows=8)
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        measure_engine.measure(
            model, walk, WINDOWS, needs, gradient_windows=8, checkpoint=checkpoint, progress=kill_at("calibrate", 12)
        )
    step, tensors, _ = checkpoint.states["statistics"]
    assert step == 12
    assert {t.dtype for t in tensors.values()} == {torch.float64, torch.uint8}
    again = measure_engine.measure(model, walk, WINDOWS, needs, gradient_windows=8, checkpoint=checkpoint)
    for name, stats in straight.items():
        for mine, theirs in zip(vars(again[name]).values(), vars(stats).values(), strict=True):
            assert torch.equal(mine, theirs) if isinstance(theirs, Tensor) else mine == theirs, name


@pytest.mark.fault(63)
def test_what_is_saved_is_let_go():
    """Over 80 blocks, memory holds the spectra of one part at most, besides what the run itself keeps."""
    import weakref

    from spectrim.engines.parts import Parts

    class Gone(MemoryCheckpoint):
        def save(self, stage, saved, *, needed=False):
            return True

    parts, alive = Parts(Gone(every=1, closed=True), "spectra", {}), []
    for block in range(80):
        tensor = torch.zeros(10)
        alive.append(weakref.ref(tensor))
        parts.add(block, {"x": tensor})
        del tensor
        assert sum(ref() is not None for ref in alive) <= 1
