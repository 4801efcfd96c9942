"""lq-lora and int2.1 on whole small models: what bits go where, what is trained and what is not, what is refused."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.linalg.knapsack import has_solver
from spectrim.linalg.quantised_low_rank import importance_of, weighted_error
from spectrim.methods.weights import lq_lora
from spectrim.methods.weights.int21 import INT21
from spectrim.methods.weights.lq_lora import MENU, LQLoRA, menu_of
from spectrim.models.walk import Layer, find_layers, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores_normal import NormalStore
from spectrim.registry import make_method
from spectrim.stats import Stat
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
needs_scipy = pytest.mark.skipif(not has_solver(), reason="SciPy (extra `ilp`) is not installed")
LQ = {"rank_bits": 1.0, "iterations": 4}
INT = {"base": "rtn2", "group_size": 8, "search": False, "batch_size": 8}


def made(name: str, keep: float, **options: Any) -> tuple[Any, Outcome]:
    dense = tiny("llama-gqa-bias")
    return dense, compress_model(dense, make_method(name, options=options), keep, IDS)


def packed_in(outcome: Outcome) -> dict[str, PackedLinear]:
    found = {layer.name: outcome.model.get_submodule(layer.name) for layer in outcome.walk.layers}
    assert all(isinstance(module, PackedLinear) for module in found.values())
    return found  # pyright: ignore[reportReturnType]


def bases_of(outcome: Outcome) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, module in packed_in(outcome).items()
        for key, tensor in module.state_dict().items()
        if key.startswith("base") or key == "bias"
    }


def divergence(model: Any, dense: Any) -> float:
    p, q = (logits_of(m, IDS).double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def fisher_loss(dense: Any, outcome: Outcome) -> float:
    """The sum that the allocation minimises, of what was made."""
    stats = measure(dense, outcome.walk, IDS, frozenset({Stat.FISHER}), seed=0)
    return sum(
        weighted_error(
            weight_of(dense.get_submodule(name)).detach().double() - module.dense_weight().double(),
            importance_of(stats[name].get(Stat.FISHER)),
        )
        for name, module in packed_in(outcome).items()
    )


# ---------- lq-lora


@needs_scipy
def test_bits_go_where_the_loss_feels_them():
    """The program's choice loses less, by the sum it minimises, than the best one form for all; both fit."""
    dense, chosen = made("lq-lora", 0.3, **LQ)
    _, uniform = made("lq-lora", 0.3, allocation="uniform", **LQ)
    forms = [{module.base.form for module in packed_in(o).values() if isinstance(module.base, NormalStore)}
             for o in (chosen, uniform)]  # fmt: skip
    assert len(forms[0]) > 1 == len({(form.bits, form.scale_bits) for form in forms[1]})
    assert fisher_loss(dense, chosen) < fisher_loss(dense, uniform)
    allowed = 0.3 * 2 * chosen.walk.numbers
    used = sum(placed.size("bytes") for placed in chosen.placed.values())
    assert 0.99 * allowed < used <= allowed


@needs_scipy
def test_the_column_solver_loses_less_of_the_outputs_at_the_same_bytes():
    """The change of outputs under the inputs of calibration, summed over layers, outputs by their Fisher means."""
    found, gram = [], frozenset({Stat.FISHER, Stat.GRAM})
    for solver in ("nearest", "columns"):
        dense, outcome = made("lq-lora", 0.3, solver=solver, **LQ)
        stats = measure(dense, find_layers(dense), IDS, gram, batch_size=8)
        lost = 0.0
        for name, module in packed_in(outcome).items():
            missing = weight_of(dense.get_submodule(name)).detach().double() - module.dense_weight().double()
            rows = (missing @ stats[name].get(Stat.GRAM) * missing).sum(1)
            lost += float(rows @ stats[name].get(Stat.FISHER).mean(1))
        found.append((lost, sum(placed.size("bytes") for placed in outcome.placed.values())))
    (nearest, bytes_nearest), (columns, bytes_columns) = found
    assert columns < 0.8 * nearest
    assert bytes_columns == pytest.approx(bytes_nearest, rel=0.02)


@needs_scipy
def test_a_layer_that_matters_more_gets_more_bits():
    """Fisher information a million times as large in one layer."""
    dense = tiny("llama-gqa-bias")
    walk = find_layers(dense)
    name = walk.layers[3].name
    real = importance_of

    def changed(self: LQLoRA, stats: Any, weight: Tensor) -> Any:
        fisher = stats.get(Stat.FISHER)
        return real(fisher * (1e6 if fisher.data_ptr() in marked else 1.0))

    marked: set[int] = set()

    def marking(*args: Any, **kwargs: Any) -> Any:
        found = measure(*args, **kwargs)
        marked.add(found[name].get(Stat.FISHER).data_ptr())
        return found

    with (
        mock.patch.object(LQLoRA, "importance", changed),
        mock.patch("spectrim.engines.run.measure", marking),
    ):
        outcome = compress_model(dense, LQLoRA(**LQ), 0.3, IDS)
    assert marked
    bits = {key: module.base.form.bits for key, module in packed_in(outcome).items()
            if isinstance(module.base, NormalStore)}  # fmt: skip
    assert bits[name] == 8 > min(bits.values())


@needs_scipy
def test_training_of_the_low_rank_parts_lowers_the_divergence_and_leaves_codes_alone():
    dense, cut = made("lq-lora", 0.25, **LQ)
    _, trained = made("lq-lora", 0.25, steps=30, batch_size=8, **LQ)
    before, after = bases_of(cut), bases_of(trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert divergence(trained.model, dense) < 0.8 * divergence(cut.model, dense)


def test_ranks_are_the_papers_at_its_width_and_smaller_below():
    sizes = {(4096, 4096): 64, (4096, 11008): 93, (384, 384): 6, (384, 1024): 8, (32, 32): 0}
    for (outputs, inputs), rank in sizes.items():
        layer = Layer(name="x", block=0, outputs=outputs, inputs=inputs, has_bias=False)
        assert LQLoRA().rank_of(layer) == rank
        assert LQLoRA(rank_bits=16.0).rank_of(layer) <= min(outputs, inputs)
        assert LQLoRA(rank_bits=0.0).rank_of(layer) == 0


def test_every_entry_of_the_menu_fits_every_layer():
    for outputs, inputs in ((1, 1), (3, 10), (384, 1024)):
        layer = Layer(name="x", block=0, outputs=outputs, inputs=inputs, has_bias=False)
        menu = menu_of(layer)
        assert len(menu) == len(MENU) == 144
        for form in menu:
            entry = NormalStore(outputs, inputs, form, device="meta").entry()
            assert NormalStore.from_entry(outputs, inputs, entry, device="meta").form == form


def test_without_scipy_it_is_refused_before_anything_is_loaded_and_works_uniformly():
    with mock.patch.object(lq_lora, "has_solver", return_value=False):
        with pytest.raises(UsageError, match=r"install spectrim\[ilp\], or pass --set allocation=uniform"):
            made("lq-lora", 0.3, **LQ)
        assert made("lq-lora", 0.3, allocation="uniform", **LQ)[1].placed


# ---------- int2.1


def test_training_lowers_the_divergence_and_leaves_the_base_alone():
    dense, start = made("int2.1", 0.5, steps=0, **INT)
    _, trained = made("int2.1", 0.5, steps=30, **INT)
    assert divergence(trained.model, dense) < 0.8 * divergence(start.model, dense)
    before, after = bases_of(start), bases_of(trained)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(
        not torch.equal(one.U.weight, other.U.weight)
        for one, other in zip(packed_in(start).values(), packed_in(trained).values(), strict=True)
        if one.U is not None and other.U is not None
    )


@pytest.mark.parametrize("start", ["eora", "svd", "diagonal"])
def test_it_starts_as_eora_does(start):
    options = {key: value for key, value in INT.items() if key != "batch_size"}
    _, own = made("int2.1", 0.5, steps=0, start=start, **INT)
    _, theirs = made("eora", 0.5, metric=start, **options)
    one, other = own.model.state_dict(), theirs.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_start_of_zero_is_the_base_and_learns():
    dense, start = made("int2.1", 0.5, steps=0, start="lora", **INT)
    _, base = made("rtn", 0.5, bits=2, group_size=8, search=False)
    torch.testing.assert_close(logits_of(start.model, IDS), logits_of(base.model, IDS), rtol=1e-5, atol=1e-5)
    _, trained = made("int2.1", 0.5, steps=30, start="lora", **INT)
    assert divergence(trained.model, dense) < 0.8 * divergence(start.model, dense)


# ---------- refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lq-lora", {"solver": "rows"}, "method lq-lora: solver must be"),
        ("lq-lora", {"rank_bits": -0.1}, "method lq-lora: rank_bits must be in"),
        ("lq-lora", {"weigh": "gram"}, "method lq-lora: weigh must be one of fisher, none"),
        ("lq-lora", {"allocation": "hull"}, "method lq-lora: allocation must be one of ilp, uniform"),
        ("lq-lora", {"iterations": 0}, "method lq-lora: iterations must be in"),
        ("lq-lora", {"steps": -1}, "method lq-lora: steps must be in"),
        ("int2.1", {"base": "2:4"}, "method int2.1: base must be one of rtn2, rtn3, rtn4, gptq2, gptq3, gptq4"),
        ("int2.1", {"start": "zero"}, "method int2.1: start must be one of eora, svd, diagonal, lora"),
        ("int2.1", {"group_size": -1}, "group_size must be in"),
    ],
)
def test_options_out_of_range_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        make_method(name, options=options)


@needs_scipy
def test_a_budget_below_two_bits_is_refused_with_one_that_is_enough():
    with pytest.raises(UsageError, match=r"lq-lora with 2 bits=everywhere, rank_bits=1.0 stores") as refused:
        made("lq-lora", 0.1, **LQ)
    keep = float(str(refused.value).split("Pass --keep ")[1].split()[0])
    assert made("lq-lora", keep, **LQ)[1].placed


def test_training_without_anything_to_train_is_refused():
    with pytest.raises(UsageError, match=r"rank_bits=0 leaves every layer a low-rank part of rank 0.* 5 steps"):
        made("lq-lora", 0.5, steps=5, rank_bits=0.0, allocation="uniform")
    dense = tiny("llama-gqa-bias")
    walk = find_layers(dense)
    method = INT21(**INT)
    share = method.bases(walk).total / (2 * walk.numbers)
    with pytest.raises(UsageError, match=r"int2.1: at keep .* leaves 0 bytes, too few for a correction of rank 1 "):
        compress_model(dense, method, share, IDS)
