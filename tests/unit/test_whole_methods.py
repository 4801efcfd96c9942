"""compactifai and dsformer on tiny models: what they promise, under the budget, healed, resumed, refused."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines import distil as distil_engine
from spectrim.engines import measure as measure_engine
from spectrim.engines import search as search_engine
from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.engines.shares import levels_around, parts_of, profile, shares_by
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.factor import decompose, truncate
from spectrim.linalg.metric import root_of, shrink
from spectrim.linalg.mpo import sites_of, to_mpo
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.mpo import MPOLinear
from spectrim.nn.semi_sparse import SemiSparseLinear
from spectrim.registry import make_method
from spectrim.stats import Stat
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(16, 16)
METHODS = {"compactifai": MPOLinear, "dsformer": SemiSparseLinear}
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    for engine in (measure_engine, search_engine):
        monkeypatch.setattr(engine, "autocast", lambda _device: nullcontext())


def made(name: str, keep: float = 0.6, *, dense=None, checkpoint=None, progress=None, **options: Any) -> Outcome:
    dense = tiny("llama-gqa-bias") if dense is None else dense
    return compress_model(
        dense, make_method(name, options=options), keep, IDS, seed=1, checkpoint=checkpoint, progress=progress
    )


def stored(outcome: Outcome) -> dict[str, StoredLinear]:
    return {name: m for name, m in outcome.model.named_modules() if isinstance(m, StoredLinear)}


def divergence(outcome: Outcome, dense) -> float:
    p, q = (logits_of(model, IDS).double().log_softmax(-1) for model in (dense, outcome.model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@every_method
@pytest.mark.parametrize("architecture", ["opt", "gpt2", "phi3", "falcon", "qwen3-moe"])
def test_other_architectures(name, architecture):
    """Biases, transposed layers, joint projections, experts."""
    outcome = made(name, dense=tiny(architecture))
    assert outcome.plan.numbers_after <= 0.6 * outcome.walk.numbers
    assert outcome.plan.numbers_after > 0.5 * outcome.walk.numbers
    assert stored(outcome)
    assert bool(torch.isfinite(logits_of(outcome.model, IDS)).all())


@every_method
def test_keeping_all_keeps_the_model(name):
    outcome = made(name, 1.0)
    assert not stored(outcome)
    assert torch.equal(logits_of(outcome.model, IDS), logits_of(tiny("llama-gqa-bias"), IDS))


@every_method
def test_more_numbers_mean_less_divergence(name):
    dense = tiny("llama-gqa-bias")
    found = [divergence(made(name, keep, dense=dense), dense) for keep in (0.3, 0.6, 0.9)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0]


@every_method
def test_a_budget_below_the_smallest_form_is_refused(name):
    with pytest.raises(UsageError, match=rf"method {name}: the smallest layers take .* keep more"):
        made(name, 0.03)


@every_method
def test_training_lowers_the_divergence_and_changes_neither_size_nor_teacher(name):
    dense = tiny("llama-gqa-bias")
    before = {key: t.clone() for key, t in dense.state_dict().items()}
    cut = made(name, dense=dense)
    trained = made(name, dense=dense, steps=40, batch_size=8)
    assert divergence(trained, dense) < 0.7 * divergence(cut, dense)
    assert trained.plan == cut.plan
    assert {n: m.entry() for n, m in stored(trained).items()} == {n: m.entry() for n, m in stored(cut).items()}
    assert all(torch.equal(t, before[key]) for key, t in dense.state_dict().items())
    assert not any(p.requires_grad and p.grad is not None for p in trained.model.parameters())


@every_method
def test_training_goes_on_from_a_checkpoint_bit_for_bit(name):
    options = {"steps": 8, "batch_size": 4, **({"reselect_every": 3} if name == "dsformer" else {})}
    whole = made(name, **options).model.state_dict()
    checkpoint = MemoryCheckpoint(every=2)
    with pytest.raises(Killed):
        made(name, checkpoint=checkpoint, progress=kill_at("distil", 5), **options)
    again = made(name, checkpoint=checkpoint, **options).model.state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@every_method
def test_a_loss_that_is_not_finite_is_said_with_the_option_to_lower(name, monkeypatch):
    monkeypatch.setattr(distil_engine, "distillation_loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(NumericalError, match=r"loss is nan at step 0 of 2.*--set learning_rate=0.033"):
        made(name, steps=2, batch_size=4, learning_rate=0.1)


@every_method
def test_options_outside_their_range_are_refused(name):
    for option, value in {"steps": -1, "batch_size": 0, "learning_rate": 0.0}.items():
        with pytest.raises(UsageError, match=rf"method {name}: {option} must be"):
            make_method(name, options={option: value})


# ---------- compactifai


def test_uniform_shares_are_the_cuts_of_the_weights_at_equal_shares():
    dense = tiny("llama-gqa-bias")
    outcome = made("compactifai", dense=dense, allocation="uniform")
    for layer in outcome.walk.layers:
        module = outcome.model.get_submodule(layer.name)
        assert isinstance(module, MPOLinear)
        sites = sites_of(layer.outputs, layer.inputs, 2)
        cores = to_mpo(weight_of(dense.get_submodule(layer.name)).detach().double(), sites, module.rank)
        assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in zip(module.cores, cores, strict=True))
        weight_share = (module.numbers - layer.outputs) / layer.weight_numbers
        assert 0.4 < weight_share < 0.8


def test_three_sites_have_three_cores():
    outcome = made("compactifai", sites=3, allocation="uniform")
    assert {len(m.cores) for m in stored(outcome).values()} == {3}


def test_the_profile_is_what_the_model_loses_with_one_part_cut():
    dense = tiny("llama-gqa-bias")
    walk, method = find_layers(dense), make_method("compactifai")
    levels = (0.3, 0.7)

    def cut(layer, share):
        module = dense.get_submodule(layer.name)
        weight = weight_of(module).detach()
        chi = method.bond_within(layer, share)
        return MPOLinear.from_cores(
            to_mpo(weight.double(), sites_of(layer.outputs, layer.inputs, 2), chi), chi, module.bias, weight
        )

    found = profile(dense, walk, cut, levels, IDS, seed=1)
    assert list(found) == [f"model.layers.{block}.{part}" for block in (0, 1) for part in ("self_attn", "mlp")]
    assert all(losses[0] > losses[1] > 0 for losses in found.values())
    # One part by hand, on the windows that the seed draws.
    picked = IDS[torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))[:4]]
    student = tiny("llama-gqa-bias")
    for layer in parts_of(walk)["model.layers.1.mlp"]:
        student.set_submodule(layer.name, cut(layer, 0.3))
    p, q = (logits_of(model, picked).log_softmax(-1) for model in (dense, student))
    by_hand = float((p.exp() * (p - q)).sum(-1).mean())
    assert found["model.layers.1.mlp"][0] == pytest.approx(by_hand, rel=1e-4)


def test_parts_that_lose_most_keep_most():
    walk = find_layers(tiny("llama"))
    parts = parts_of(walk)
    levels = levels_around(0.5)
    found = {name: [0.01, 0.005, 0.001] for name in parts}
    found["model.layers.0.mlp"] = [10.0, 5.0, 2.0]
    budget = int(0.6 * sum(layer.weight_numbers for layer in walk.layers))
    shares = shares_by(found, levels, walk, budget)
    assert shares["model.layers.0.mlp.up_proj"] == 1.0
    assert all(share < 1 for name, share in shares.items() if "layers.0.mlp" not in name)
    assert sum(int(shares[la.name] * la.weight_numbers) for la in walk.layers) <= budget


def test_profiled_bonds_lose_less_than_uniform_ones_where_parts_differ():
    """The second block is made to do almost nothing: what it keeps is better spent on the first."""
    dense = tiny("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            dense.get_submodule(f"model.layers.1.{name}").weight.mul_(0.02)
    uniform = divergence(made("compactifai", 0.55, dense=dense, allocation="uniform"), dense)
    assert divergence(made("compactifai", 0.55, dense=dense), dense) < 0.8 * uniform


# ---------- dsformer


def input_error(layer_weight: Tensor, found: Tensor, gram: Tensor) -> float:
    lost, weight = layer_weight.double() - found.double(), layer_weight.double()
    return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())


def test_in_the_metric_of_the_inputs_every_layer_is_better_than_truncated_svd_at_equal_numbers():
    """On random weights, where spectra are flat; the optimum of low rank in that metric is `svd-llm`."""
    dense = tiny("llama")
    outcome = made("dsformer", 0.6, dense=dense)
    stats = measure(dense, outcome.walk, IDS, frozenset({Stat.GRAM}))
    for layer in outcome.walk.layers:
        weight = weight_of(dense.get_submodule(layer.name)).detach()
        module = outcome.model.get_submodule(layer.name)
        gram = shrink(stats[layer.name].get(Stat.GRAM), 0.01)
        rank = module.numbers // (layer.outputs + layer.inputs)
        left, right = truncate(decompose(weight.double(), right=root_of(gram)), rank)
        own = input_error(weight, module.dense_weight(), gram)
        assert own < input_error(weight, left @ right, gram), layer.name


def test_the_straight_through_solver_is_another_and_a_worse_one_for_this_error():
    dense = tiny("llama")
    by_name = {s: made("dsformer", 0.6, dense=dense, solver=s) for s in ("alternate", "straight-through")}
    stats = measure(dense, by_name["alternate"].walk, IDS, frozenset({Stat.GRAM}))
    total = {
        solver: sum(
            input_error(
                weight_of(dense.get_submodule(la.name)).detach(),
                outcome.model.get_submodule(la.name).dense_weight(),
                shrink(stats[la.name].get(Stat.GRAM), 0.01),
            )
            for la in outcome.walk.layers
        )
        for solver, outcome in by_name.items()
    }
    assert total["alternate"] < total["straight-through"] < 1.5 * total["alternate"]


def test_density_decides_the_share_of_nonzeros():
    for density in (0.2, 0.5):
        for module in stored(made("dsformer", density=density)).values():
            assert isinstance(module, SemiSparseLinear)
            assert module.nonzeros / module.rank == pytest.approx(density, abs=0.15)


def test_training_moves_the_support():
    cut, trained = made("dsformer"), made("dsformer", steps=20, batch_size=8, reselect_every=5, learning_rate=0.05)
    changed = sum(
        int((a.support != b.support).sum()) for a, b in zip(stored(cut).values(), stored(trained).values(), strict=True)
    )
    assert changed > 0
