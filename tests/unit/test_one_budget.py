"""One budget: predicted losses against what coding really loses, the menu, the choice, probes, reports."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from spectrim.engines.coded import put_in_form
from spectrim.engines.forms import Code, Form, Menu, code_menu, codes_of, full_menu, low_ranks, uniform_distortion
from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import compress_model
from spectrim.engines.probe import Noise, Probed, corrected, corrections, evolve_forms, kinds_of, steps_of
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg import knapsack
from spectrim.linalg.allocate import Options
from spectrim.linalg.bits import size_of
from spectrim.linalg.columns import inverse_root
from spectrim.linalg.knapsack import price_bound, settle, total_cost, total_error
from spectrim.linalg.metric import shrink
from spectrim.linalg.predicted import Measured, in_codes, in_parts, split
from spectrim.linalg.trellis import code_table, distortion, rate_of
from spectrim.linalg.trellis_columns import (
    decode_weight,
    row_losses,
    trellis_account,
    trellis_columns,
    trellis_with_entries,
    within_table,
)
from spectrim.models.walk import Layer, find_layers, weight_of
from spectrim.nn.stores import store_from_entry
from spectrim.nn.stores_corrected import CorrectedStore
from spectrim.registry import make_method
from spectrim.report.forms import form_of, forms_rows, forms_table
from spectrim.stats import Stats
from tiny_models import tiny, token_ids

WINDOW = 8


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, seed: int) -> Tensor:
    x = normal(seed, 8 * size, size) @ (torch.eye(size).double() + 0.3 * normal(seed + 1, size, size))
    return x.mT @ x / len(x)


def measured_of(weight: Tensor, seed: int = 1) -> Measured:
    outputs, inputs = weight.shape
    gram = covariance(inputs, seed)
    return Measured(weight, gram, inverse_root(gram), shrink(covariance(outputs, seed + 10), 0.2))


def layer_of(weight: Tensor) -> Layer:
    outputs, inputs = weight.shape
    return Layer(name="a", block=0, outputs=outputs, inputs=inputs, has_bias=False)


def decaying(outputs: int, inputs: int) -> Tensor:
    """A weight whose components fall off."""
    u, s, vt = torch.linalg.svd(normal(3, outputs, inputs), full_matrices=False)
    return (u * s * 0.9 ** torch.arange(len(s))) @ vt


def real_loss(measured: Measured, made: nn.Module) -> float:
    error = measured.weight - made.dense_weight().double()
    damped = torch.linalg.inv(measured.upper.mT @ measured.upper)
    return float((measured.outputs @ error @ damped * error).sum()) / 2


@pytest.mark.parametrize(
    "form",
    [
        Form("codes", Code(2, rate_of(2, WINDOW))),
        Form("codes", Code(5, rate_of(5, WINDOW))),
        Form("codes", Code(8)),
        Form("entries", Code(2, rate_of(2, WINDOW)), entries=64),
        Form("entries", Code(8), entries=64),
        Form("correction", Code(2, rate_of(2, WINDOW)), rank=4, side_bits=4),
        Form("correction", Code(3, rate_of(3, WINDOW)), rank=2, side_bits=8),
        Form("factor", Code(3, rate_of(3, WINDOW)), rank=32),
        Form("factor", Code(8), rank=16),
        Form("factor", rank=16),
        Form("pivot", Code(4, rate_of(4, WINDOW)), rank=32),
        Form("pivot", Code(8), rank=16),
        Form("pivot", rank=32),
    ],
    ids=lambda form: form.label,
)
def test_every_form_loses_what_is_predicted_and_takes_what_it_says(form):
    measured = measured_of(decaying(48, 64))
    layer = layer_of(measured.weight)
    made = put_in_form(form, measured, None, torch.float32, 0.01)
    stored = size_of([t for t in made.state_dict().values() if t.numel()], "bytes")
    assert stored <= form.account(layer).total
    if form.kind != "entries":  # which are accounted for at their worst places
        assert stored == form.account(layer).total
    menu = full_menu(layer, measured, WINDOW)
    predicted = dict(zip(menu.forms, menu.options.error.tolist(), strict=True))
    if form not in predicted:  # cuts that no budget would take
        parts = in_parts(measured)
        assert form.kind in ("factor", "pivot")
        predicted[form] = parts.cut(form.rank) + form.code.error * parts.noise(form.rank)
    # Rows of 64 are short: the range of 8-bit codes is less than that of the long ones they are priced for.
    low = 0.3 if form.code.bits == 8 else 0.4
    assert low * predicted[form] < real_loss(measured, made) < 1.7 * predicted[form]


def test_a_cut_in_16_bits_loses_exactly_what_is_predicted():
    measured = measured_of(decaying(32, 48))
    made = put_in_form(Form("factor", rank=16), measured, None, torch.float64, 0.01)
    assert real_loss(measured, made) == pytest.approx(in_parts(measured).cut(16), rel=1e-6)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_split_leaves_the_smallest_rest_that_codes_could_have(shape):
    measured = measured_of(normal(5, *shape))
    left, right = split(measured, 3)
    half = measured.outputs.diagonal().sqrt()[:, None]
    rest = float((half * (measured.weight - left @ right)).square().sum())
    assert rest == pytest.approx(float(torch.linalg.svdvals(measured.by_row)[3:].square().sum()), rel=1e-9)


def test_heavy_tails_are_kept_apart_and_strong_components_corrected():
    weight = normal(6, 64, 64)
    best = {"plain": weight.clone(), "tails": weight.clone(), "strong": weight + 3 * torch.outer(*normal(7, 2, 64))}
    best["tails"].flatten()[::997] *= 60
    chosen = {}
    for name, own in best.items():
        menu = full_menu(layer_of(own), measured_of(own), WINDOW)
        budget = trellis_account(64, 64, rate_of(3)).total
        chosen[name] = menu.forms[settle([menu.options], budget).choice[0]].kind
    assert chosen == {"plain": "codes", "tails": "entries", "strong": "correction"}


def test_a_low_rank_weight_becomes_one():
    weight = normal(8, 64, 16) @ normal(9, 16, 64) + 1e-3 * normal(10, 64, 64)
    menu = full_menu(layer_of(weight), measured_of(weight), WINDOW)
    assert menu.forms[settle([menu.options], 64 * 64 // 4).choice[0]].kind in ("factor", "pivot")
    assert low_ranks(layer_of(weight)) == [16, 32, 48]


def heavy_column() -> Tensor:
    """One input whose weights are nine deviations large."""
    weight = normal(15, 64, 96)
    weight[:, 7] *= 9
    return weight


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_what_lies_beyond_the_table_is_foreseen(bits):
    measured = measured_of(heavy_column())
    form = Form("codes", Code(bits, rate_of(bits, WINDOW)))
    predicted = in_codes(measured, WINDOW).at(within_table(rate_of(bits, WINDOW)))
    made = put_in_form(form, measured, None, torch.float32, 0.01)
    assert 0.4 * predicted < real_loss(measured, made) < 2 * predicted


def test_one_heavy_input_at_4_bits_is_no_longer_in_the_codes():
    measured = measured_of(heavy_column())
    menu = full_menu(layer_of(measured.weight), measured, WINDOW)
    cost = trellis_account(64, 96, rate_of(4)).total + 260
    best = menu.forms[settle([menu.options], cost).choice[0]]
    assert best.kind in ("entries", "correction")
    plain = Form("codes", Code(4, rate_of(4, WINDOW)))
    loss = {f: real_loss(measured, put_in_form(f, measured, None, torch.float32, 0.01)) for f in (best, plain)}
    assert loss[best] < 0.8 * loss[plain]


def test_rows_take_the_scale_that_is_best_for_them():
    weight, eye, rate = heavy_column(), torch.eye(96).double(), rate_of(4, WINDOW)
    rows = row_losses(weight, eye, WINDOW).best(distortion(rate))
    assert float(rows.scales.max()) > 1
    assert float(row_losses(normal(16, 64, 96), eye, WINDOW).best(distortion(rate_of(2, WINDOW))).scales.max()) == 1
    table = code_table(rate).double()
    back = decode_weight(trellis_columns(weight, eye, rate), rate, 96, table)
    assert float((weight - back).square().sum()) < 1.6 * float(rows.losses.sum())


def test_entries_kept_apart_are_exact_and_the_codes_there_are_free():
    weight, rate = normal(11, 20, 24), rate_of(2, WINDOW)
    kept = torch.zeros(20, 24, dtype=torch.bool)
    kept[3, 5] = kept[19, 23] = True
    weight[kept] = 50.0
    coded, entries = trellis_with_entries(weight, torch.eye(24).double(), rate, kept)
    assert entries.values.tolist() == [50.0, 50.0]
    assert entries.positions.tolist() == [3 * 24 + 5, 19 * 24 + 23]
    assert float(coded.scales.abs().max()) < 3  # they do not blow up the scales of their rows


# ---------- the store


def corrected_store() -> CorrectedStore:
    measured = measured_of(normal(12, 24, 16))
    form = Form("correction", Code(2, rate_of(2, WINDOW)), rank=2, side_bits=4)
    store = put_in_form(form, measured, None, torch.float32, 0.01).base
    assert isinstance(store, CorrectedStore)
    return store


def test_a_corrected_store_comes_back_from_its_entry():
    store = corrected_store()
    empty = store_from_entry(24, 16, store.entry())
    assert {key: tuple(t.shape) for key, t in empty.state_dict().items()} == store.shapes()
    empty.load_state_dict(store.state_dict())
    empty.after_load()
    assert torch.equal(empty.matrix(), store.matrix())
    whole = store.inner.matrix() + store.left.matrix().mT @ store.right.matrix()
    assert torch.equal(store.matrix(), whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": True}, "rank True"),
        ({"rank": 17}, "from 1 to 16"),
        ({"left": None}, "a part left with"),
        ({"inner": {"kind": "corrected"}}, "beside another"),
    ],
)
def test_corrected_entries_that_cannot_be_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        store_from_entry(24, 16, {**corrected_store().entry(), **change})


# ---------- the choice


def some_menus(seed: int, layers: int = 4) -> list[Options]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Options(
            torch.rand(5, generator=generator, dtype=torch.float64).sort(descending=True).values,
            torch.randint(1, 30, (5,), generator=generator).sort().values,
        )
        for _ in range(layers)
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_is_within_the_gap_it_claims(seed, monkeypatch):
    menus, budget = some_menus(seed), 50
    best = min(
        total_error(menus, list(ks))
        for ks in product(range(5), repeat=4)
        if total_cost(menus, list(ks)) <= budget
    )  # fmt: skip
    assert price_bound(menus, budget) <= best + 1e-9
    monkeypatch.setattr(knapsack, "has_solver", lambda: False)
    found = settle(menus, budget)
    assert total_cost(menus, found.choice) <= budget
    assert total_error(menus, found.choice) * (1 - found.gap) <= best + 1e-9


@pytest.mark.skipif(not knapsack.has_solver(), reason="needs SciPy")
def test_where_one_price_is_not_enough_the_solver_finds_the_best():
    menus = some_menus(2)
    best = min(
        total_error(menus, list(ks))
        for ks in product(range(5), repeat=4)
        if total_cost(menus, list(ks)) <= 50
    )  # fmt: skip
    assert total_error(menus, settle(menus, 50, gap=0.0).choice) == pytest.approx(best)


# ---------- probes


def probed_model(bits: float = 2) -> tuple[Probed, list[int]]:
    dense = tiny("llama")
    walk = find_layers(dense)
    names = [layer.name for layer in walk.layers]
    measured = {n: measured_of(weight_of(dense.get_submodule(n)).detach().double(), i) for i, n in enumerate(names)}
    menus = [code_menu(layer, in_codes(measured[layer.name], WINDOW), WINDOW) for layer in walk.layers]
    noises = {name: Noise(measured[name], i) for i, name in enumerate(names)}
    choice = [[form.code.bits for form in menu.forms].index(bits) for menu in menus]
    return Probed(dense, skeleton(dense), names, noises, menus), choice


def test_stand_ins_lose_what_is_predicted():
    measured = measured_of(decaying(48, 64))
    noise = Noise(measured, 0)
    damped = torch.linalg.inv(measured.upper.mT @ measured.upper)
    for form, loss in ((Form("codes", Code(2, rate_of(2, WINDOW))), 0.3 * noise.loss), (Form("factor", rank=16), 0.0)):
        error = measured.weight - noise.stand_in(form, loss + in_parts(measured).cut(16) * (form.kind == "factor"))
        own = float((measured.outputs @ error.double() @ damped * error.double()).sum()) / 2
        wanted = loss if form.kind == "codes" else in_parts(measured).cut(16)
        assert own == pytest.approx(wanted, rel=0.15)


def test_a_probe_leaves_the_dense_model_and_itself_as_they_were():
    probed, choice = probed_model()
    ids = token_ids(3, 12)
    before = {key: tensor.clone() for key, tensor in probed.dense.state_dict().items()}
    assert probed.kl({}, ids) == pytest.approx(0.0, abs=1e-6)
    disturbed = probed.kl(dict(zip(probed.names, choice, strict=True)), ids)
    assert disturbed > 1e-4
    assert probed.kl({}, ids) == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(tensor, before[key]) for key, tensor in probed.dense.state_dict().items())


def test_corrections_are_what_the_model_loses_over_what_was_predicted():
    probed, choice = probed_model()
    walk, ids = find_layers(probed.dense), token_ids(4, 12)
    found = corrections(probed, walk, choice, ids)
    kinds = kinds_of(walk)
    assert set(found) == set(kinds)
    assert sorted(i for places in kinds.values() for i in places) == list(range(len(walk.layers)))
    kind, places = next(iter(kinds.items()))
    predicted = sum(float(probed.menus[i].options.error[choice[i]]) for i in places)
    alone = probed.kl({probed.names[i]: choice[i] for i in places}, ids)
    assert found[kind] == pytest.approx(min(max(alone / predicted, 0.25), 4.0))
    scaled = corrected(probed.menus, walk, {kind: 3.0})
    for i, (menu, options) in enumerate(zip(probed.menus, scaled, strict=True)):
        assert torch.allclose(options.error, menu.options.error * (3.0 if i in places else 1.0))


def test_evolution_keeps_the_budget_and_ends_no_worse_where_it_is_judged():
    probed, choice = probed_model()
    budget = sum(int(menu.options.cost[k]) for menu, k in zip(probed.menus, choice, strict=True))
    ids = token_ids(4, 12)
    found = evolve_forms(probed, choice, budget, ids, generations=4, offspring=6, seed=0)
    assert sum(int(menu.options.cost[k]) for menu, k in zip(probed.menus, found, strict=True)) <= budget

    def kl(ks: list[int]) -> float:
        return probed.kl(dict(zip(probed.names, ks, strict=True)), ids)

    assert kl(found) <= kl(choice)  # all four windows judge every generation


def test_steps_leave_out_what_another_beats():
    assert steps_of(Options(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1, 4, 2, 5]))) == [0, 2, 1]


# ---------- the method


@pytest.mark.parametrize("options", [{"forms": "codes"}, {"allocation": "probed"},
                                     {"allocation": "evopress", "generations": 2, "offspring": 3}])  # fmt: skip
def test_other_menus_and_allocations_keep_the_budget_too(options):
    method = make_method("trellis", None, {"window": WINDOW, **options})
    made = compress_model(tiny("llama-gqa-bias"), method, 0.2, token_ids(8, 16))
    assert sum(layer.size("bytes") for layer in made.placed.values()) <= 0.2 * 2 * made.walk.numbers
    if options.get("forms") == "codes":
        assert {layer.codec for layer in made.placed.values()} <= {"packed", "dense"}


@pytest.mark.parametrize("options", [{"forms": "some"}, {"allocation": "best"}, {"generations": 0}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(UsageError, match=next(iter(options))):
        make_method("trellis", None, options)


def test_scales_that_are_not_finite_name_the_layer():
    module = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        module.weight.fill_(3.4e38)  # finite, but no bfloat16 is as large
    stats = Stats(tokens=64, gram=torch.eye(32).double(), output_grad=torch.eye(16).double())
    layer = Layer(name="model.layers.7.mlp.up_proj", block=7, outputs=16, inputs=32, has_bias=False)
    form = Form("codes", Code(2, rate_of(2, WINDOW)))
    with pytest.raises(NumericalError, match=r"layers\.7\.mlp\.up_proj.*NaN or Inf.*nothing is written"):
        make_method("trellis", None, {"window": WINDOW}).placed(module, layer, stats, None, form, 64)


# ---------- reports


def test_other_budgets_are_priced_from_the_same_menus():
    """The frontier falls, keeps to its shares, and passes by the choice that was made."""
    dense, method = tiny("llama"), make_method("trellis", None, {"window": WINDOW})
    made = compress_model(dense, method, 0.3, token_ids(8, 16))
    keeps, losses = zip(*((point["keep"], point["predicted"]) for point in made.frontier), strict=True)
    assert len(keeps) > 5
    assert list(keeps) == sorted(keeps)
    assert list(losses) == sorted(losses, reverse=True)
    assert keeps[-1] <= 1
    assert losses[-1] == 0  # all that is allowed: dense
    again = compress_model(dense, method, 0.35, token_ids(8, 16))
    assert again.frontier == made.frontier  # what is asked for does not matter


def test_a_frontier_is_the_best_choice_of_every_budget():
    """Against all choices of three layers whose menus are convex, where one price finds the optimum to an option."""
    menus = [Options(torch.tensor([8.0, 4.0, 2.0, 1.0]) * k, torch.tensor([1, 2, 3, 4])) for k in (1, 3, 10)]
    every = list(product(range(4), repeat=3))
    points = knapsack.frontier(menus, 12, shares=[0.1, 0.25, 0.5, 0.6, 0.75, 1.0, 1.0])
    assert [point.cost for point in points] == [3, 6, 7, 9, 12]  # 0.1 does not fit; no budget twice
    for point in points:
        within = [choice for choice in every if total_cost(menus, list(choice)) <= point.cost]
        best = min(total_error(menus, list(choice)) for choice in within)
        assert best <= point.error <= 1.1 * best


def test_forms_are_told_in_words_and_counted():
    made = compress_model(tiny("llama"), make_method("trellis", None, {"window": WINDOW}), 0.25, token_ids(8, 16))
    table = forms_table(made.model, made.walk)
    assert sum(row["layers"] for row in table) == len(made.walk.layers)
    assert sum(row["bytes"] for row in table) == sum(layer.size("bytes") for layer in made.placed.values())
    assert [row["bytes"] for row in table] == sorted((row["bytes"] for row in table), reverse=True)
    assert all(len(row) == 5 for row in forms_rows(table))
    store = corrected_store()
    assert form_of(nn.Linear(2, 2)) == "dense"
    for form, words in (
        (Form("correction", Code(2, rate_of(2, WINDOW)), rank=1, side_bits=4), "trellis 2 + low rank in uniform 4"),
        (Form("entries", Code(8), entries=4), "uniform 8 + entries"),
        (Form("factor", Code(3, rate_of(3, WINDOW)), rank=16), "factor of trellis 3, trellis 3"),
        (Form("pivot", rank=16), "pivot"),
    ):
        made_layer = put_in_form(form, measured_of(normal(14, 24, 32)), None, torch.float32, 0.01)
        assert form_of(made_layer) == words
    assert store.rank == 2


def test_codes_of_a_correction_are_measured_not_claimed():
    assert 0.009 < uniform_distortion(4) < 0.02
    assert uniform_distortion(8) < 1e-3
    assert [code.bits for code in codes_of(WINDOW)] == [1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8]
    assert Menu._fields == ("forms", "options")
