"""Propagation against explicit least squares on the inputs of the finished model, and what it must leave alone."""

import copy
import dataclasses
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines.layerwise import apply_plan, decompose_all, place_cut
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.engines.propagate import propagate
from spectrim.engines.ranks import plan_ranks
from spectrim.errors import UsageError
from spectrim.linalg.factor import DRIFT_RIDGE, Spectrum, token_share
from spectrim.method import LayerMethod
from spectrim.models.walk import find_layers, shared_inputs, weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.registry import make_method
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

IDS = token_ids(24, 16)
MIX = 0.5


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    """Products in bf16, where the CPU has them, would hide errors of a per cent."""
    for module in ("measure", "couple", "propagate"):
        monkeypatch.setattr(f"spectrim.engines.{module}.autocast", lambda _device: nullcontext())


def method_of(name: str = "two-sided", **options: Any) -> LayerMethod:
    return make_method(name, options={"rounds": 0, "coupling": "none", **options})


def propagated(
    dense: PreTrainedModel, keep: float = 0.6, method: LayerMethod | None = None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Spectrum], dict[str, Spectrum], list[str]]:
    """The compressed model in float32, the spectra before and after, and the warnings."""
    method = method or method_of()
    walk = find_layers(dense)
    stats = measure(dense, walk, IDS, method.needs)
    before = decompose_all(method, dense, walk, stats)
    plan = plan_ranks(method, walk, {n: s.energy for n, s in before.items()}, keep)
    after = dict(before)
    warnings = propagate(method, dense, walk, after, plan, stats, IDS, **options)
    student = skeleton(dense)
    apply_plan(student, walk, plan, after, learned=True)
    return student.eval(), before, after, warnings


def stored(model: PreTrainedModel, name: str) -> Tensor:
    module = model.get_submodule(name)
    return (module.dense_weight() if isinstance(module, LowRankLinear | PivotLinear) else weight_of(module)).double()


def watch(model: PreTrainedModel, names: list[str]) -> dict[str, Tensor]:
    """What the named layers read, (N, I) in float64."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda _m, x, n=n: seen.__setitem__(n, x[0].detach().reshape(-1, x[0].shape[-1]).double())
        )
        for n in names
    ]
    logits_of(model, IDS)
    for handle in handles:
        handle.remove()
    return seen


# ---------- values


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt", "phi3", "gpt-neox"])
def test_every_target_is_the_least_squares_answer_for_the_inputs_of_the_final_model(architecture):
    """A layer's input depends only on what runs before it, so the final model has the x' of each step."""
    dense = tiny(architecture)
    walk = find_layers(dense)
    student, before, after, warnings = propagated(dense)
    assert warnings == []
    names = [la.name for la in walk.layers]
    full, small = watch(dense, names), watch(student, names)
    moved = 0
    for name in names:
        weight, x, y = weight_of(dense.get_submodule(name)).detach().double(), full[name], small[name]
        ridge = DRIFT_RIDGE * y.square().sum() / y.shape[1]
        system = torch.cat([y, ridge.sqrt() * torch.eye(y.shape[1], dtype=torch.float64)])
        mix = MIX * token_share(len(y), y.shape[1])
        change = torch.cat([mix * (x - y) @ weight.mT, torch.zeros(y.shape[1], len(weight), dtype=torch.float64)])
        want = weight + torch.linalg.lstsq(system, change, driver="gelsd").solution.mT
        got = after[name].left @ after[name].right
        assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max()), name
        assert len(after[name].energy) == len(before[name].energy)  # learned scores go on from all of them
        assert bool((after[name].energy.diff() <= 0).all())
        moved += float((want - weight).norm()) > 0.01 * float(weight.norm())
    for name in shared_inputs(dense, walk.layers)[0]:  # nothing runs before them: no drift
        weight = weight_of(dense.get_submodule(name)).detach().double()
        assert float((after[name].left @ after[name].right - weight).abs().max()) < 1e-5 * float(weight.abs().max())
    assert moved >= len(names) // 2


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt"])
def test_outputs_of_most_layers_come_nearer_to_the_dense_model(architecture, monkeypatch):
    """E|| W x - W' x' ||^2 with x' of each model's own, summed over layers in units of the output.

    On the tokens of the calibration themselves, where the whole share is right.
    """
    monkeypatch.setattr("spectrim.linalg.factor.DRIFT_TOKENS", 0)
    dense = tiny(architecture)
    walk = find_layers(dense)
    names = [la.name for la in walk.layers]
    full = watch(dense, names)

    def error(student: PreTrainedModel) -> float:
        small, total = watch(student, names), 0.0
        for name in names:
            want = full[name] @ weight_of(dense.get_submodule(name)).detach().double().mT
            got = small[name] @ stored(student, name).detach().mT
            total += float((want - got).square().sum() / want.square().sum())
        return total

    with_it = propagated(dense)[0]
    method = method_of(propagate=0.0)
    without = compress_model(dense, method, 0.6, IDS, gradient_windows=len(IDS)).model
    assert error(with_it) < 0.98 * error(without)


def test_energies_stay_in_the_units_of_the_first_metric():
    """Else the layers could no longer be weighed against each other; a coupled Gram matrix has a size of its own."""
    dense = tiny("llama")
    walk = find_layers(dense)
    method = method_of()
    stats = measure(dense, walk, IDS, method.needs)
    stats = {n: dataclasses.replace(s, gram=1e3 * s.gram) for n, s in stats.items()}
    spectra = decompose_all(method, dense, walk, stats)
    before = {n: float(s.energy.sum()) for n, s in spectra.items()}
    plan = plan_ranks(method, walk, {n: s.energy for n, s in spectra.items()}, 0.8)
    propagate(method, dense, walk, spectra, plan, stats, IDS)
    for name, spectrum in spectra.items():
        assert 0.5 < float(spectrum.energy.sum()) / before[name] < 2, name


def test_with_next_to_no_trust_the_spectra_stay(monkeypatch):
    """Target and metric both: with few tokens the Gram matrix of the compressed model is as noisy as the drift."""
    monkeypatch.setattr("spectrim.linalg.factor.DRIFT_TOKENS", 1e12)
    _, before, after, _ = propagated(tiny("llama"))
    for name, spectrum in after.items():
        assert spectrum is not before[name]
        torch.testing.assert_close(spectrum.left @ spectrum.right, before[name].left @ before[name].right)
        torch.testing.assert_close(spectrum.energy, before[name].energy, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("basis", ["two-sided", "svd"])
def test_both_bases_of_soco_propagate(basis):
    dense = tiny("llama")
    _, _, after, _ = propagated(dense, method=method_of("soco", basis=basis, steps=0))
    name = "model.layers.1.mlp.down_proj"
    left = after[name].left
    unit = left / left.norm(dim=0)
    plain = float((unit.mT @ unit - torch.eye(left.shape[1])).abs().max())
    assert (plain < 1e-8) == (basis == "svd")  # singular vectors are orthogonal, those of a metric are not


# ---------- the whole run


def compressed(keep: float = 0.6, **options: Any) -> Outcome:
    return compress_model(tiny("llama-gqa-bias"), make_method("two-sided", options=options), keep, IDS)


def test_a_layer_that_stays_dense_becomes_its_target():
    dense = tiny("llama-gqa-bias")
    outcome = compress_model(dense, make_method("two-sided"), 0.9, IDS)
    kept = [name for name, target in outcome.plan.targets.items() if target.codec == "dense"]
    late = [name for name in kept if ".1." in name]  # in block 1 inputs have drifted
    assert late
    for name in late:
        module, old = outcome.model.get_submodule(name), dense.get_submodule(name)
        assert isinstance(module, nn.Linear)
        assert not torch.equal(module.weight, old.weight)
        assert torch.equal(module.bias, old.bias)
        assert torch.equal(outcome.placed[name].tensors["weight"], module.weight)
    assert outcome.plan.numbers_after <= int(0.9 * outcome.plan.numbers_before)


def test_share_0_switches_it_off_and_says_nothing():
    seen: list[str] = []
    method = make_method("two-sided", options={"propagate": 0.0})
    outcome = compress_model(tiny("llama"), method, 0.9, IDS, progress=lambda stage, *_: seen.append(stage))
    assert "propagate" not in {*outcome.seconds, *seen}
    dense = tiny("llama")
    for name, target in outcome.plan.targets.items():
        if target.codec == "dense":
            assert torch.equal(weight_of(outcome.model.get_submodule(name)), weight_of(dense.get_submodule(name)))


def test_keep_1_gives_the_model_back_bit_for_bit():
    dense = tiny("llama-gqa-bias")
    outcome = compress_model(dense, make_method("two-sided"), 1.0, IDS)
    assert "propagate" not in outcome.seconds
    for name, tensor in dense.state_dict().items():
        assert torch.equal(outcome.model.state_dict()[name], tensor), name


def test_it_reports_blocks_and_its_time():
    seen: list[tuple[Any, ...]] = []
    outcome = compress_model(
        tiny("llama"), make_method("two-sided"), 0.6, IDS, progress=lambda *step: seen.append(step)
    )
    assert [step for step in seen if step[0] == "propagate"] == [("propagate", 1, 2), ("propagate", 2, 2)]
    assert outcome.seconds["propagate"] > 0


def test_on_a_cpu_it_runs_over_the_gradient_windows(monkeypatch):
    counts = []
    real = propagate

    def note(*args, **options):
        counts.append(len(args[6]))
        return real(*args, **options)

    monkeypatch.setattr("spectrim.engines.run.propagate", note)
    compress_model(tiny("llama"), make_method("two-sided"), 0.6, IDS, gradient_windows=5)
    assert counts == [5]


def test_learned_scores_go_on_from_the_propagated_spectra():
    method = make_method("soco", options={"steps": 4, "batch_size": 8, "project_every": 2})
    outcome = compress_model(tiny("llama"), method, 0.9, IDS, gradient_windows=len(IDS))
    assert outcome.learned is not None
    dense = tiny("llama")
    name = "model.layers.1.mlp.down_proj"
    stays = compress_model(dense, dataclasses.replace(method, propagate=0.0), 0.9, IDS, gradient_windows=len(IDS))
    assert stays.learned is not None
    one, other = (o.learned.factors[name] for o in (outcome, stays) if o.learned is not None)
    difference = float((one.left @ one.right - other.left @ other.right).norm())
    assert difference > 0.005 * float(weight_of(dense.get_submodule(name)).detach().norm())


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_going_on_from_a_checkpoint_holds_the_propagated_weights(keep, monkeypatch):
    """At keep 0.9 with layers that stay dense, whose components the checkpoint needs as well."""

    def run(**options: Any) -> Outcome:
        return compress_model(
            tiny("llama-gqa-bias"), make_method("two-sided"), keep, IDS, IDS, recovery=("kl:3",), **options
        )

    whole, checkpoint = run(), MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        run(checkpoint=checkpoint, progress=kill_at("distil", 2))
    for name in ("measure", "couple", "propagate"):
        monkeypatch.setattr(f"spectrim.engines.run.{name}", lambda *_a, **_k: pytest.fail("done again"))
    again = run(checkpoint=checkpoint)
    assert (keep == 0.9) == any(t.codec == "dense" for t in again.plan.targets.values())
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


@pytest.mark.parametrize("share", [-0.1, 1.1])
@pytest.mark.parametrize("name", ["two-sided", "soco"])
def test_a_share_outside_0_to_1_is_refused(name, share):
    with pytest.raises(UsageError, match=r"propagate must be in \[0.0, 1.0\]"):
        make_method(name, options={"propagate": share})


# ---------- models as they are


class Expert(nn.Module):
    """Sees the tokens whose first number is above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 32)
        chosen = rows[:, 0] > 0
        out = torch.zeros_like(rows)
        out[chosen] = self.up(rows[chosen])
        return out.view_as(x)


@pytest.fixture
def with_room(monkeypatch):
    """As on a GPU that holds the inputs of all groups of a block."""
    monkeypatch.setattr("spectrim.engines.propagate._has_room", lambda *_: True)


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt", "phi3"])
def test_inputs_of_a_block_from_one_pass_are_those_of_a_pass_for_each_group(architecture, request):
    dense = tiny(architecture)
    wanted, _, spectra, _ = propagated(dense, batch_size=7)
    request.getfixturevalue("with_room")
    found, _, others, _ = propagated(dense, batch_size=7)
    assert torch.equal(logits_of(found, IDS), logits_of(wanted, IDS))
    assert all(torch.equal(others[name].left, own.left) for name, own in spectra.items())


@pytest.mark.fault(56)
@pytest.mark.parametrize("room", [False, True])
def test_routed_layers_keep_their_spectra_and_are_named(room, request):
    if room:
        request.getfixturevalue("with_room")
    dense = tiny("llama")
    dense.model.layers[0].mlp = Expert()
    name = "model.layers.0.mlp.up"
    student, before, after, warnings = propagated(dense)
    assert after[name] is before[name]
    assert after["model.layers.1.mlp.down_proj"] is not before["model.layers.1.mlp.down_proj"]
    assert warnings == [
        f"propagate: {name}: tokens are routed to these layers by each model in its own way, or not at all; "
        "they do not make up for the error of their inputs"
    ]
    assert bool(torch.isfinite(logits_of(student, IDS)).all())
    outcome = compress_model(dense, make_method("two-sided"), 0.6, IDS)
    assert outcome.warnings == warnings


@pytest.mark.fault(56)
@pytest.mark.parametrize("room", [False, True])
def test_a_layer_that_never_runs_is_named_too(room, request):
    if room:
        request.getfixturevalue("with_room")
    dense = tiny("llama")
    method = method_of()
    walk = find_layers(dense)
    stats = measure(dense, walk, IDS, method.needs)
    dense.model.layers[1].mlp.spare = copy.deepcopy(dense.model.layers[1].mlp.up_proj)
    spare = "model.layers.1.mlp.spare"
    stats[spare] = stats["model.layers.1.mlp.up_proj"]
    walk = find_layers(dense)
    spectra = decompose_all(method, dense, walk, stats)
    plan = plan_ranks(method, walk, {n: s.energy for n, s in spectra.items()}, 0.6)
    old = spectra[spare]
    assert propagate(method, dense, walk, spectra, plan, stats, IDS)[0].startswith(f"propagate: {spare}: ")
    assert spectra[spare] is old


def test_the_dense_model_is_left_alone():
    dense = tiny("opt").train()
    before = state_of(dense)
    propagated(dense)
    assert_same_state(before, state_of(dense))


def test_the_batch_size_does_not_matter():
    dense = tiny("llama-gqa-bias")
    one, other = (propagated(dense, batch_size=size)[0] for size in (24, 5))
    torch.testing.assert_close(logits_of(one, IDS), logits_of(other, IDS), atol=1e-3, rtol=1e-3)


def test_of_the_compressed_model_one_block_is_there_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[weakref.ref[nn.Module]] = []

    def noted(student: PreTrainedModel, dense: PreTrainedModel, name: str, *rest: Any) -> None:
        place_cut(student, dense, name, *rest)
        assert student.get_submodule(name) is not dense.get_submodule(name)
        placed.append(weakref.ref(student.get_submodule(name)))

    def progress(_stage: str, done: int, _total: int) -> None:
        alive = sum(module() is not None for module in placed)
        held.append((len(placed), alive))
        assert done == len(held)

    held: list[tuple[int, int]] = []
    monkeypatch.setattr("spectrim.engines.propagate.place_cut", noted)
    dense = tiny("llama")
    state = state_of(dense)
    propagated(dense, progress=progress)
    assert held == [(7, 0), (14, 0)]
    assert_same_state(state, state_of(dense))


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_a_stored_layer_holds_the_tensors_it_was_made_of_and_a_bias_of_its_own(storage: str) -> None:
    dense = tiny("llama-gqa-bias")
    outcome = compress_model(dense, make_method("svd", options={"storage": storage}), 0.5, IDS)
    for name, placed in outcome.placed.items():
        assert placed.codec == storage
        own = outcome.model.get_submodule(name).state_dict()
        assert placed.bias is not None
        for key, tensor in placed.tensors.items():
            assert own[key].data_ptr() == tensor.data_ptr(), key
        key = "U.bias" if storage == "factor" else "bias"
        assert torch.equal(own[key], placed.bias)
        assert own[key].data_ptr() != dense.get_submodule(name).bias.data_ptr()  # type: ignore[union-attr,operator]  linear
