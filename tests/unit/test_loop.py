"""The training loop on a small regression: order, rates, what is checked before a step, and going on from a state."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines.loop import WARM_UP_STEPS, Buffers, Group, Training, set_learning_rate, train
from spectrim.engines.pack import pack, unpack
from spectrim.errors import InputError, NumericalError

WINDOWS = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
STEPS = 9


class Regression:
    """`y = w x + b` fitted to `sum(x)`; `w` and `b` in groups of their own. Its buffer counts projections."""

    def __init__(self, **changes: Any) -> None:
        self.w, self.b = nn.Parameter(torch.tensor([0.3, -0.2, 0.1])), nn.Parameter(torch.tensor([0.5]))
        self.projections, self.calls = torch.zeros(1), 0
        self.seen: list[Tensor] = []
        own: dict[str, Any] = {
            "stage": "fit",
            "label": "fit",
            "says": "regression",
            "advice": "Lower the rate",
            "groups": [Group(parameters={"w": self.w}, peak=0.1), Group(parameters={"b": self.b}, peak=0.01)],
            "loss": self.loss,
            "optimizer": torch.optim.Adam,
            "steps": STEPS,
            "batch_size": 4,
            "seed": 5,
            "before_step": self.project,
            "state": lambda: Buffers({"projections": self.projections}, {"calls": self.calls}),
            "restore": self.restore,
        }
        self.training = Training(**{**own, **changes})

    def loss(self, batch: Tensor) -> Tensor:
        self.seen.append(batch)
        return (batch @ self.w + self.b - batch.sum(-1)).square().mean()

    def project(self, step: int) -> None:
        """Not idempotent, as projections that bring components back are not."""
        if step % 3 == 2:
            self.w.data.mul_(0.9)
            self.projections += 1

    def restore(self, saved: Buffers) -> None:
        self.projections.copy_(saved.tensors["projections"])
        self.calls = saved.facts["calls"]

    def train(self, **options: Any) -> list[float]:
        return train(self.training, WINDOWS, **options)

    def tensors(self) -> list[Tensor]:
        return [self.w.detach().clone(), self.b.detach().clone(), self.projections.clone()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---------- the loop itself


def test_it_is_the_plain_loop():
    run, other = Regression(clip=0.5), Regression()
    losses = run.train()
    optimizer = torch.optim.Adam([{"params": [other.w]}, {"params": [other.b]}])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(5))
    want = []
    for step in range(STEPS):
        other.project(step)
        rate = min(1, (step + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group, peak in zip(optimizer.param_groups, (0.1, 0.01), strict=True):
            group["lr"] = peak * rate
        optimizer.zero_grad()
        loss = other.loss(WINDOWS[[int(order[i % 10]) for i in range(4 * step, 4 * step + 4)]])
        loss.backward()
        norm = float(torch.cat([other.w.grad, other.b.grad]).norm())
        for p in (other.w, other.b):
            p.grad *= min(1.0, 0.5 / (norm + 1e-6))
        optimizer.step()
        want.append(float(loss.detach()))
    assert losses == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(run.tensors(), other.tensors())
    assert run.w.grad is None


def test_windows_come_again_only_after_all_were_used():
    run = Regression(batch_size=5)
    run.train()
    for epoch in range(4):
        rows = torch.cat(run.seen[2 * epoch : 2 * epoch + 2])
        assert sorted(rows.tolist()) == sorted(WINDOWS.tolist())
    assert torch.cat(run.seen[:2]).tolist() != WINDOWS.tolist()


def test_learning_rate_warms_up_linearly_and_decays_as_a_cosine():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": 1.0, "peak": peak} for p, peak in zip(parameters, (0.1, 0.02), strict=True)]
    optimizer = torch.optim.Adam(groups)

    def rate(step: int, **options: Any) -> float:
        set_learning_rate(optimizer, step, 100, **options)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert second == pytest.approx(first / 5)
        return first

    assert rate(0) == pytest.approx(0.1 / WARM_UP_STEPS)
    assert rate(WARM_UP_STEPS // 2 - 1) == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 0.04)))
    assert rate(50) == pytest.approx(0.05)
    assert rate(99) == pytest.approx(0.1 * 0.5 * (1 + math.cos(math.pi * 0.99)))
    rates = [rate(step) for step in range(WARM_UP_STEPS, 100)]
    assert rates == sorted(rates, reverse=True)
    assert rate(100, floor=0.1) == pytest.approx(0.01)
    assert rate(50, floor=0.1) == pytest.approx(0.1 * 0.55)
    assert rate(0, warm_up=0) == pytest.approx(0.1)


def test_options_of_a_group_reach_the_optimizer():
    run = Regression()
    groups = [replace(run.training.groups[0], options={"weight_decay": 0.5}), run.training.groups[1]]
    seen: list[torch.optim.Optimizer] = []

    def factory(given: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.append(torch.optim.AdamW(given, weight_decay=0.0))
        return seen[-1]

    train(replace(run.training, groups=groups, optimizer=factory), WINDOWS)
    assert [group["weight_decay"] for group in seen[0].param_groups] == [0.5, 0.0]


# ---------- numbers that are not finite


def spoiled(run: Regression, step: int, how: str) -> Callable[[Tensor], Tensor]:
    """The loss of `run`, spoiled at one step: the value, or only the gradient."""
    calls = 0

    def loss(batch: Tensor) -> Tensor:
        nonlocal calls
        value, calls = run.loss(batch), calls + 1
        if calls != step + 1:
            return value
        if how == "gradient":  # sqrt at 0: value 0, derivative inf; times 0: NaN
            return value + ((run.b - run.b.detach()) * 0).sum().abs().sqrt()
        return value * float(how)

    return loss


@pytest.mark.fault(57)
@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("step", [0, 4, 5])
def test_nothing_is_changed_by_a_step_that_is_not_finite_and_the_state_before_it_is_kept(how: str, step: int):
    whole = Regression()
    whole.train()
    before = Regression()
    if step:
        with pytest.raises(Killed):
            before.train(progress=kill_at("fit", step))
    before.project(step)  # belongs to the step that fails, before its loss

    run, checkpoint = Regression(), MemoryCheckpoint()
    run.training = replace(run.training, loss=spoiled(run, step, how))
    says = {"gradient": "the gradient of b is not finite"}.get(how, f"the loss is {how}")
    with pytest.raises(NumericalError, match=rf"regression: {says} at step {step} of 9.*Lower the rate") as caught:
        run.train(checkpoint=checkpoint)
    assert caught.value.exit_code == 5
    assert same(run.tensors(), before.tensors())
    assert run.w.grad is None
    assert checkpoint.log == [("fit", step)]

    again = Regression()  # with the cause removed: as if nothing had happened
    assert len(again.train(checkpoint=checkpoint)) == STEPS
    assert same(again.tensors(), whole.tensors())


@pytest.mark.fault(57)
def test_without_a_checkpoint_the_run_stops_as_well():
    run = Regression()
    run.training = replace(run.training, loss=spoiled(run, 2, "nan"))
    with pytest.raises(NumericalError):
        run.train()


@pytest.mark.fault(57)
def test_a_norm_that_overflows_is_told():
    run = Regression(before_step=None)
    run.training = replace(run.training, loss=lambda batch: (run.w * 3e38).sum() + run.b.sum() * batch.mean())
    with pytest.raises(NumericalError, match="gradients are finite but their norm is not at step 0"):
        run.train()
    assert same(run.tensors(), Regression().tensors())


# ---------- going on


class WideState(torch.optim.Optimizer):
    """Momentum in float64, in a nested list beside plain numbers: state that torch's own casting would spoil."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("parts", [torch.zeros_like(p, dtype=torch.float64), (group["count"], 0.1)])
                momentum = state["parts"][0]
                assert momentum.dtype == torch.float64
                momentum.mul_(0.9).add_(p.grad.double() / 3)
                p.add_(momentum.to(p.dtype), alpha=-group["lr"] / group["count"])


OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "nadam": torch.optim.NAdam,
    "wide": WideState,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("killed", range(1, STEPS))
def test_going_on_gives_the_bits_of_an_uninterrupted_run(optimizer: str, killed: int):
    """Projections are at steps 2, 5 and 8; states are kept every second step."""
    whole, first, second = (Regression(optimizer=OPTIMIZERS[optimizer]) for _ in range(3))
    losses = whole.train()
    checkpoint = MemoryCheckpoint(every=2)
    with pytest.raises(Killed):
        first.train(checkpoint=checkpoint, progress=kill_at("fit", killed))
    seen: list[int] = []
    assert second.train(checkpoint=checkpoint, progress=lambda _s, done, _t: seen.append(done)) == losses
    assert seen == list(range(killed // 2 * 2 + 1, STEPS + 1))
    assert same(second.tensors(), whole.tensors())


def test_after_a_diverged_run_one_may_go_on_with_lower_rates():
    """Rates are those of the run that goes on: at peak 0 nothing moves any more but by projections."""
    checkpoint, run = MemoryCheckpoint(), Regression()
    run.training = replace(run.training, loss=spoiled(run, 4, "nan"))
    with pytest.raises(NumericalError):
        run.train(checkpoint=checkpoint)
    lower = Regression()
    groups = [replace(group, peak=0.0) for group in lower.training.groups]
    losses = train(replace(lower.training, groups=groups), WINDOWS, checkpoint=checkpoint)
    assert len(losses) == STEPS
    torch.testing.assert_close(lower.w.detach(), run.w.detach() * 0.81)  # projections before steps 5 and 8
    assert torch.equal(lower.b, run.b)


def test_a_finished_stage_is_restored_and_not_trained_again():
    checkpoint, first, second = MemoryCheckpoint(), Regression(), Regression()
    losses = first.train(checkpoint=checkpoint)
    assert checkpoint.log == [("fit", STEPS)]
    assert checkpoint.asked == STEPS
    assert second.train(checkpoint=checkpoint) == losses
    assert second.seen == []
    assert same(first.tensors(), second.tensors())
    assert checkpoint.log == [("fit", STEPS)]


@pytest.mark.parametrize(
    ("changes", "windows", "says"),
    [
        ({"steps": 8}, WINDOWS, "stage 'fit': steps was 9 and is 8 now"),
        ({"seed": 6}, WINDOWS, "seed was 5 and is 6"),
        ({"batch_size": 3}, WINDOWS, "batch_size was 4 and is 3"),
        ({}, WINDOWS + 1, "windows was"),
    ],
)
def test_the_state_of_another_run_is_refused(changes: dict[str, Any], windows: Tensor, says: str):
    checkpoint = MemoryCheckpoint()
    Regression().train(checkpoint=checkpoint)
    other = Regression(**changes)
    with pytest.raises(InputError, match=says):
        train(other.training, windows, checkpoint=checkpoint)
    assert same(other.tensors(), Regression().tensors())


def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed():
    checkpoint = MemoryCheckpoint()
    Regression().train(checkpoint=checkpoint)
    step, tensors, facts = checkpoint.states["fit"]
    other = Regression()
    for damaged, says in (
        ({**tensors, "parameter.b": torch.zeros(2)}, r"b is \(2,\) torch.float32, this run has \(1,\)"),
        ({**tensors, "parameter.b": torch.zeros(1).double()}, r"b is \(1,\) torch.float64"),
        ({name: t for name, t in tensors.items() if name != "parameter.b"}, "b is missing"),
    ):
        checkpoint.states["fit"] = (step, damaged, facts)
        with pytest.raises(InputError, match=says):
            other.train(checkpoint=checkpoint)
        assert same(other.tensors(), Regression().tensors())


def test_no_steps_train_nothing():
    run = Regression(steps=0)
    assert run.train() == []
    assert same(run.tensors(), Regression().tensors())


def test_nested_state_survives_json_with_its_key_types():
    import json

    tree = {"state": {0: {"step": torch.tensor(3.0), "parts": [torch.ones(2), (1, 0.1, None)]}}, "flag": True}
    tensors, outline = pack(tree, "optimizer")
    assert all(name.startswith("optimizer.") for name in tensors)
    again = unpack(tensors, json.loads(json.dumps(outline)), torch.device("cpu"))
    assert list(again["state"]) == [0]
    assert again["flag"] is True
    assert again["state"][0]["parts"][1] == (1, 0.1, None)
    assert torch.equal(again["state"][0]["parts"][0], torch.ones(2))
    again["state"][0]["parts"][0].zero_()
    assert torch.equal(tree["state"][0]["parts"][0], torch.ones(2))  # a copy
    with pytest.raises(AssertionError, match="a set cannot be kept"):
        pack({"x": {1}}, "o")


def test_a_run_that_is_over_is_let_go_at_once():
    """On a GPU it holds recorded steps: gigabytes that must not wait for the garbage collector."""
    kept = nn.Parameter(torch.ones(3))

    def training(weight: nn.Parameter) -> Training:
        return Training(
            stage="fit", label="fit", says="test", advice="", groups=[Group(parameters={"w": weight}, peak=0.1)],
            loss=lambda batch: (batch @ weight).square().mean(), optimizer=torch.optim.Adam, steps=2, batch_size=2,
        )  # fmt: skip

    gc.disable()
    try:
        own = nn.Parameter(kept.detach().clone())
        alive = weakref.ref(own)
        train(training(own), WINDOWS)
        del own
        assert alive() is None
    finally:
        gc.enable()
