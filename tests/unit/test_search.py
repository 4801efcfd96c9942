"""Allocations that look at what the model does: budgets, exchanges, and whether they find what is better."""

import pytest
import torch

from spectrim.engines import search
from spectrim.engines.layerwise import apply_plan, decompose_all
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import budget_under, menu_of, plan_of
from spectrim.engines.search import draw, exchanged, levels_of
from spectrim.errors import UsageError
from spectrim.evaluate.language import evaluate
from spectrim.models.walk import find_layers
from spectrim.options import check_serves_all_sizes
from spectrim.registry import make_method
from spectrim.replacement import stored_numbers
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

IDS = token_ids(24, 16)
SEARCHES = {
    "sensitivity": {"allocation": "sensitivity"},
    "evopress": {"allocation": "evopress", "generations": 6, "offspring": 8},
}
every_search = pytest.mark.parametrize("how", SEARCHES)


def menu(name: str, architecture: str = "llama", keep: float = 0.6):
    model, method = tiny(architecture), make_method(name)
    walk = find_layers(model)
    spectra = decompose_all(method, model, walk, measure(model, walk, IDS, method.needs))
    return menu_of(method, walk, {n: s.energy for n, s in spectra.items()}), budget_under(method, walk, keep)


@every_search
@pytest.mark.parametrize("name", ["svd-llm", "afm", "two-sided", "tfwsvd"])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_any_method_meets_the_budget_and_leaves_the_model_alone(how, name, architecture):
    model = tiny(architecture)
    before = state_of(model)
    outcome = compress_model(model, make_method(name, options=SEARCHES[how]), 0.6, IDS)
    numbers = sum(placed.numbers for placed in outcome.placed.values())
    assert 0.57 * outcome.walk.numbers <= numbers <= 0.6 * outcome.walk.numbers
    assert numbers == outcome.plan.numbers_after
    assert outcome.seconds["search"] > 0
    assert_same_state(before, state_of(model))


@every_search
def test_the_same_seed_finds_the_same_ranks(how):
    method = make_method("svd-llm", options=SEARCHES[how])
    plans = [compress_model(tiny("llama"), method, 0.6, IDS, seed=seed).plan for seed in (1, 1, 2)]
    assert plans[0] == plans[1]
    uniform = compress_model(tiny("llama"), make_method("svd-llm"), 0.6, IDS).plan
    assert plans[0].targets != uniform.targets


@every_search
def test_a_layer_that_matters_more_gets_more(how):
    """One block does next to nothing (its results are scaled down): what its layers give up serves the other."""
    model = tiny("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.0.{name}").weight.mul_(1e-3)
    options = {**SEARCHES[how], **({"generations": 30} if how == "evopress" else {})}
    searched = compress_model(model, make_method("svd-llm", options=options), 0.5, IDS)
    uniform = compress_model(model, make_method("svd-llm"), 0.5, IDS)

    def spent(outcome, block: int) -> int:
        return sum(outcome.placed[la.name].numbers for la in outcome.walk.layers if la.block == block)

    assert spent(searched, 1) > 1.15 * spent(uniform, 1)
    held_out = token_ids(16, 16, seed=5)
    better, plain = (evaluate(outcome.model, held_out, dense=model).kl for outcome in (searched, uniform))
    assert better < 0.8 * plain


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3, 0.1])
@pytest.mark.parametrize("name", ["svd-llm", "afm"])
def test_levels_ascend_and_the_starting_level_meets_the_budget(name, keep):
    priced, budget = menu(name, keep=keep)
    levels, start = levels_of(priced, budget)
    costs = [[int(own.options.cost[k]) for k in level] for own, level in zip(priced, levels, strict=True)]
    assert all(cost == sorted(cost) for cost in costs)
    assert all(own.targets[level[-1]].codec == "dense" for own, level in zip(priced, levels, strict=True))
    spent = sum(cost[start] for cost in costs)
    least = sum(cost[0] for cost in costs)
    assert spent <= max(budget, least)
    for own in priced:
        low_rank = [t for t in own.targets if t.codec != "dense"]
        extra = own.layer.outputs if name == "afm" else 0
        assert [int(c) for c in own.options.cost[:-1]] == [
            stored_numbers(own.layer.outputs, own.layer.inputs, t) + extra for t in low_rank
        ]


@pytest.mark.parametrize("seed", [0, 1])
def test_near_rank_one_no_choice_costs_more_than_the_budget(seed):
    """A small layer's share buys no rank there; its first option costs more than the share."""
    model = tiny("llama-gqa-bias", hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=2)
    method = make_method("afm", options=SEARCHES["evopress"])
    outcome = compress_model(model, method, 0.075, IDS, seed=seed)
    assert sum(placed.numbers for placed in outcome.placed.values()) <= 0.075 * outcome.walk.numbers


def test_exchanges_keep_the_levels_of_each_shape_in_sum_and_in_range():
    generator = torch.Generator().manual_seed(0)
    groups, options = [[0, 1, 2], [3, 4], [5]], [list(range(4))] * 6
    parent = (1, 1, 1, 2, 2, 3)
    children = [exchanged(parent, groups, options, generator) for _ in range(400)]
    for child in children:
        assert [sum(child[k] for k in group) for group in groups] == [3, 4, 3]
        assert all(0 <= level <= 3 for level in child)
    moved = [sum(abs(a - b) for a, b in zip(child, parent, strict=True)) // 2 for child in children]
    assert set(moved) <= {0, 1, 2, 3}
    assert moved.count(1) > moved.count(2) > moved.count(3)
    assert exchanged((1,), [[0]], [[0, 1, 2]], generator) == (1,)


def test_the_parent_is_judged_by_the_windows_of_its_generation_only(monkeypatch):
    """Every fitness of a last stage, the parent's too, comes from one and the same mini-batch."""
    seen: list[tuple[tuple[int, ...], int]] = []
    whole = search.Searched.fitness

    def note(self, choice, judged):
        seen.append((tuple(choice), hash(judged.ids.numpy().tobytes())))
        return whole(self, choice, judged)

    monkeypatch.setattr(search.Searched, "fitness", note)
    compress_model(tiny("llama"), make_method("svd-llm", options={**SEARCHES["evopress"], "generations": 3}), 0.6, IDS)
    batches: dict[int, list[tuple[int, ...]]] = {}
    for choice, batch in seen:
        batches.setdefault(batch, []).append(choice)
    assert len(batches) == 3 * len(search.STAGES)
    assert all(len(set(choices)) == len(choices) for choices in batches.values())
    assert [len(choices) for choices in batches.values()][1::2] == [5, 5, 5]  # four survivors and the parent


@pytest.mark.parametrize("name", ["svd-llm", "afm"])
@pytest.mark.parametrize("architecture", ["llama", "llama-gqa-bias", "gpt2"])
def test_a_level_gives_the_model_that_compress_would_write_and_dense_is_the_way_back(name, architecture):
    """Found: a layer that had been given a bias kept it when it was set back to dense."""
    model, method = tiny(architecture), make_method(name)
    walk = find_layers(model)
    stats = measure(model, walk, IDS, method.needs)
    spectra = decompose_all(method, model, walk, stats)
    means = {n: own.mean for n, own in stats.items()} if method.centres else {}
    searched = search.searchable(method, model, walk, spectra, means, 0.6)
    top, cut = list(searched.now), [searched.start] * len(searched.now)
    dense = logits_of(model, IDS)
    searched.set(cut)
    picked = [options[searched.start] for options in searched.options]
    student = skeleton(model)
    apply_plan(student, walk, plan_of(searched.priced, picked, walk), spectra, means=means)
    written = logits_of(student, IDS)
    assert float((written - dense).abs().max()) > 0.05
    torch.testing.assert_close(logits_of(searched.student, IDS), written, atol=1e-3, rtol=1e-3)
    searched.set(top)
    torch.testing.assert_close(logits_of(searched.student, IDS), dense, atol=1e-3, rtol=1e-3)


def test_windows_are_drawn_without_repeats():
    drawn = draw(torch.arange(10)[:, None], 6, torch.Generator().manual_seed(0))
    assert len(set(drawn.flatten().tolist())) == 6
    assert len(draw(torch.arange(3)[:, None], 6, torch.Generator().manual_seed(0))) == 3


def test_searches_are_refused_where_they_cannot_be():
    with pytest.raises(UsageError, match="allocation=evopress finds the ranks of one size"):
        check_serves_all_sizes(make_method("svd-llm", options={"allocation": "evopress"}))
    with pytest.raises(UsageError, match="method soco: allocation must be one of uniform, global"):
        make_method("soco", options={"allocation": "evopress"})
