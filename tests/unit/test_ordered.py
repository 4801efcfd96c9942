"""Orders of removal: the engine's cut, the rules against slow oracles, Zero-Sum's prices against the loss itself."""

from contextlib import nullcontext

import pytest
import torch

from spectrim.engines import measure as measure_engine
from spectrim.engines.measure import measure
from spectrim.engines.ordered import costs_by_rank
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import menu_of
from spectrim.errors import UsageError
from spectrim.linalg.allocate import cut_in_order
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from spectrim.stats import Stats
from tiny_models import tiny, token_ids

IDS = token_ids(8, 16)


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    """Products in bf16, where the CPU has them, would hide errors of a per cent."""
    monkeypatch.setattr(measure_engine, "autocast", lambda _device: nullcontext())


def next_token_loss(model, ids: torch.Tensor) -> torch.Tensor:
    log_p = model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).sum() / ids.numel()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_slope_is_the_gradient_of_the_texts_own_loss(architecture):
    model = tiny(architecture)
    method = make_method("zero-sum")
    stats = measure(model, find_layers(model), IDS, method.needs, batch_size=3)
    wide = tiny(architecture).double()
    next_token_loss(wide, IDS).backward()
    for layer in find_layers(model).layers:
        module = wide.get_submodule(layer.name)
        expected = module.weight.grad
        expected = expected if weight_of(module).shape == expected.shape and architecture != "gpt2" else expected.mT
        found = stats[layer.name].slope
        assert found is not None
        assert float((found - expected).norm() / expected.norm()) < 2e-5, layer.name


def test_a_price_is_the_first_order_change_of_the_loss():
    model, method = tiny("llama").double(), make_method("zero-sum")
    stats = measure(tiny("llama"), find_layers(model), IDS, method.needs)["model.layers.1.mlp.up_proj"]
    module = model.get_submodule("model.layers.1.mlp.up_proj")
    weight = weight_of(module).detach().clone()
    spectrum = method.decompose(weight, stats)
    prices = method.prices(weight, spectrum, stats)
    share = 1e-4
    with torch.no_grad():
        before = next_token_loss(model, IDS)
        for k in range(0, len(prices), 7):
            module.weight.copy_(weight - share * torch.outer(spectrum.left[:, k], spectrum.right[k]))  # type: ignore
            change = float(next_token_loss(model, IDS) - before) / share
            assert change == pytest.approx(float(prices[k]), abs=0.03 * float(prices.abs().max()))


def slow_zero_sum(prices: list[list[float]]) -> list[int]:
    """No heaps: look at every layer's last component each time."""
    left, total, order = [list(p) for p in prices], 0.0, []
    while any(left):
        last = {layer: own[-1] for layer, own in enumerate(left) if own}
        against = {layer: x for layer, x in last.items() if (x > 0) == (total <= 0)}
        layer = min(against or last, key=lambda layer: (abs(last[layer]), layer))
        total += left[layer].pop()
        order.append(layer)
    return order


@pytest.mark.parametrize("seed", range(5))
def test_zero_sum_equals_the_slow_oracle_and_stays_near_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    prices = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (7, 12, 1, 9)]
    order = make_method("zero-sum").removal_order(prices)
    assert order == slow_zero_sum([p.tolist() for p in prices])
    left, total, sums = [p.tolist() for p in prices], 0.0, []
    for layer in order:
        total += left[layer].pop()
        sums.append(abs(total))
    assert max(sums[:15]) <= 2 * max(float(p.abs().max()) for p in prices)


def test_welore_is_one_threshold_on_normalised_singular_values():
    """After any number of removals the kept components are those at or above some z, and z does not know the scale."""
    method = make_method("welore")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(o, i, generator=generator, dtype=torch.float64) for o, i in ((9, 7), (5, 8), (6, 6))]
    stats = Stats(tokens=1)

    def prices(factor: float) -> list[torch.Tensor]:
        return [method.prices(w, method.decompose(w * factor, stats), stats) for w in weights]  # type: ignore

    for price, weight in zip(prices(1.0), weights, strict=True):
        singular = torch.linalg.svdvals(weight)
        expected = (singular - singular.min()) / (singular.max() - singular.min())
        assert torch.allclose(price, expected, atol=1e-9)
    order = method.removal_order(prices(1.0))
    assert order == method.removal_order(prices(1e3))
    for count in (3, 9, 15):
        kept = [len(p) - order[:count].count(layer) for layer, p in enumerate(prices(1.0))]
        lowest = min(float(p[n - 1]) for p, n in zip(prices(1.0), kept, strict=True) if n)
        highest = max(float(p[n]) for p, n in zip(prices(1.0), kept, strict=True) if n < len(p))
        assert highest <= lowest
    flat = method.prices(weights[2], method.decompose(torch.eye(6).double(), stats), stats)  # type: ignore
    assert torch.equal(flat, torch.ones(6).double())


def test_the_cut_ends_at_the_budget_and_leaves_rank_one():
    costs = [torch.tensor([10, 20, 25, 25]), torch.tensor([5, 10, 15])]  # four components, the last saves nothing
    assert cut_in_order(costs, [0, 0, 1, 0, 1], 40) == [4, 3]
    assert cut_in_order(costs, [0, 0, 1, 0, 1], 39) == [2, 3]  # 25 -> 25 -> 20
    assert cut_in_order(costs, [0, 0, 0, 0, 1, 1], 20) == [1, 2]
    with pytest.raises(ValueError, match="the order ends at 25 numbers, above the budget of 14"):
        cut_in_order(costs, [0, 0, 0, 0], 14)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("name", ["zero-sum", "welore"])
def test_the_pipeline_meets_the_budget_by_the_methods_order(name, storage):
    model = tiny("llama-gqa-bias")
    for keep in (0.9, 0.5):
        outcome = compress_model(model, make_method(name, options={"storage": storage}), keep, IDS)
        counted = sum(placed.numbers for placed in outcome.placed.values())
        assert (keep - 0.03) * outcome.walk.numbers <= counted <= keep * outcome.walk.numbers
        assert counted == outcome.plan.numbers_after
    ranks = {target.rank for target in outcome.plan.targets.values()}
    assert len(ranks) > 4
    assert outcome.plan != compress_model(model, make_method(name, options={"allocation": "uniform"}), 0.5, IDS).plan
    full = compress_model(model, make_method(name), 1.0, IDS)
    assert all(target.codec == "dense" for target in full.plan.targets.values())


def test_ranks_that_do_not_pay_cost_what_dense_does():
    model = tiny("llama")
    walk = find_layers(model)
    menu = menu_of(make_method("svd"), walk, {la.name: torch.ones(min(la.outputs, la.inputs)) for la in walk.layers})
    for own in menu:
        costs = costs_by_rank(own, min(own.layer.outputs, own.layer.inputs))
        assert costs.tolist() == sorted(costs.tolist())
        assert int(costs[-1]) == own.layer.weight_numbers


def test_only_methods_with_an_order_offer_it():
    with pytest.raises(
        UsageError, match="method svd: allocation must be one of uniform, global, sensitivity, evopress,"
    ):
        make_method("svd", options={"allocation": "order"})
