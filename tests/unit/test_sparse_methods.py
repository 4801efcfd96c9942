"""squeezellm, spqr and gqsa on whole small models: against their formulas written out, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.linalg.bilevel import BilevelRule
from spectrim.linalg.codebook import kmeans_exact
from spectrim.linalg.columns import UniformRule, inverse_root, solve_columns
from spectrim.linalg.groups import GroupRule, costliest, group_costs
from spectrim.linalg.outliers import OutlierRule, outlier_limit
from spectrim.methods.weights.gqsa import GQSA
from spectrim.methods.weights.packed import PackedMethod
from spectrim.methods.weights.spqr import SpQR
from spectrim.methods.weights.squeezellm import SqueezeLLM
from spectrim.models.walk import weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores import Store
from spectrim.nn.stores_bilevel import BilevelStore
from spectrim.nn.stores_codebook import CodebookStore
from spectrim.nn.stores_groups import GroupStore
from spectrim.nn.stores_outliers import OutlierStore
from spectrim.nn.stores_uniform import UniformStore
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
SPQR: dict[str, Any] = {"group_size": 8, "statistic_rows": 4, "threshold": 0.05, "outliers": 0.2}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str, keep: float = 0.95, architecture: str = "llama-gqa-bias", **options: Any) -> tuple[Any, Outcome]:
    dense = tiny(architecture)
    return dense, compress_model(
        dense, make_method(name, options=options), keep, IDS, gradient_windows=len(IDS), seed=3
    )


def layers_of(dense: Any, outcome: Outcome) -> list[tuple[str, Tensor, PackedLinear]]:
    found = []
    for layer in outcome.walk.layers:
        packed = outcome.model.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        found.append((layer.name, weight_of(dense.get_submodule(layer.name)).detach().double(), packed))
    return found


# ---------- squeezellm


def sides(seed: int, outputs: int = 10, inputs: int = 40) -> tuple[Tensor, Stats]:
    """A weight, and what errors of it cost, over orders of magnitude."""
    return normal(seed, outputs, inputs), Stats(tokens=1, fisher=normal(seed + 1, outputs, inputs).abs() ** 3)


@pytest.mark.parametrize("weigh", ["fisher", "none"])
def test_a_row_loses_nearly_as_little_as_the_best_levels_lose(weigh):
    weight, stats = sides(1)
    fisher = stats.get(Stat.FISHER)
    method = SqueezeLLM(bits=2, weigh=weigh, sensitive=0.02, outliers=0.05)
    apart = method.apart(weight, fisher)
    found = method.store_of(weight, stats, torch.float64).matrix().detach()
    importance = fisher if weigh == "fisher" else torch.ones_like(fisher)
    best = lost = 0.0
    for row in range(len(weight)):
        rest = ~apart[row]
        best += kmeans_exact(weight[row][rest], importance[row][rest], 4)[1]
        lost += float((importance[row] * (weight - found)[row].square())[rest].sum())
    assert 0.99 * best <= lost <= 1.05 * best  # levels are rounded to 16 bits, so that codes may change too


def test_the_most_sensitive_weights_are_apart_and_then_the_largest():
    weight, stats = sides(2)
    fisher = stats.get(Stat.FISHER)
    method = SqueezeLLM(bits=3, sensitive=0.01, outliers=0.02)
    apart = method.apart(weight, fisher)
    places = sorted(range(400), key=lambda p: -float(fisher.flatten()[p]))[:4]
    others = sorted((p for p in range(400) if p not in places), key=lambda p: -float(weight.flatten()[p].abs()))[:8]
    assert apart.flatten().nonzero()[:, 0].tolist() == sorted(places + others)
    store = method.store_of(weight, stats, torch.float64)
    assert isinstance(store, OutlierStore)
    assert torch.equal(store.matrix()[apart], weight[apart])
    assert store.entries == 12


def test_levels_are_dense_without_shares_and_kinds_combine():
    _, outcome = made("squeezellm", bits=3, sensitive=0.0, outliers=0.0)
    assert {type(module.base) for module in outcome.model.modules() if isinstance(module, PackedLinear)} == {
        CodebookStore
    }
    _, outcome = made("squeezellm", bits=3, sensitive=0.01, outliers=0.02)
    for module in outcome.model.modules():
        if isinstance(module, PackedLinear):
            assert isinstance(module.base, OutlierStore)
            assert isinstance(module.base.inner, CodebookStore)


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_sensitive_levels_lose_less_of_what_counts(architecture):
    losses = {}
    for weigh in ("fisher", "none"):
        dense, outcome = made("squeezellm", architecture=architecture, bits=2, weigh=weigh, sensitive=0.0, outliers=0.0)
        stats = measure(dense, outcome.walk, IDS, frozenset({Stat.FISHER}), seed=3)
        losses[weigh] = [
            float((stats[name].get(Stat.FISHER) * (weight - packed.dense_weight()).square()).sum())
            for name, weight, packed in layers_of(dense, outcome)
        ]
    pairs = list(zip(losses["fisher"], losses["none"], strict=True))
    assert all(one < 1.02 * other for one, other in pairs)
    assert sum(losses["fisher"]) < 0.9 * sum(losses["none"])


# ---------- spqr


def columns(seed: int, outputs: int = 12, inputs: int = 32) -> tuple[Tensor, Stats]:
    """A weight with a few large entries, and correlated inputs."""
    x = normal(seed + 1, 4 * inputs, inputs) @ normal(seed + 2, inputs, inputs)
    weight = normal(seed, outputs, inputs)
    large = torch.where(normal(seed + 3, outputs, inputs) > 2, 8 * weight, weight)
    return large, Stats(tokens=len(x), gram=x.mT @ x / len(x))


def lost(weight: Tensor, store: Store, stats: Stats) -> float:
    missing = weight - store.matrix().detach()
    return float((missing @ stats.get(Stat.GRAM) * missing).sum())


def test_the_store_holds_what_the_solver_made():
    weight, stats = columns(4)
    method = SpQR(bits=3, damping=0.01, **SPQR)
    upper = inverse_root(stats.get(Stat.GRAM), damping=0.01)
    rule = OutlierRule(
        weight, BilevelRule(weight, 3, 8, statistic_bits=3, rows=4), 3, outlier_limit(weight, upper, 0.05)
    )
    expected = solve_columns(weight, upper, rule)
    store = method.store_of(weight, stats, torch.float64)
    assert torch.equal(store.matrix(), expected)
    assert isinstance(store, OutlierStore)
    assert 0 < store.entries < 0.2 * weight.numel()
    assert isinstance(store.inner, BilevelStore)


@pytest.mark.parametrize("bits", [2, 3])
def test_outliers_pay_where_there_are_some_and_more_of_them_pay_more(bits):
    weight, stats = columns(5)
    losses = [
        lost(weight, SpQR(bits=bits, **{**SPQR, "outliers": share}).store_of(weight, stats, torch.float64), stats)
        for share in (0.0, 0.02, 0.1)
    ]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.9 * losses[1]


def test_no_outliers_where_nothing_sticks_out():
    """Weights that all lie on a grid leave nothing to keep."""
    weight = torch.randint(4, (8, 16), generator=torch.Generator().manual_seed(0)).double()
    weight[:, ::8], weight[:, 1::8] = 0.0, 3.0
    stats = Stats(tokens=1, gram=torch.eye(16, dtype=torch.float64))
    store = SpQR(bits=2, **SPQR).store_of(weight, stats, torch.float64)
    assert isinstance(store, BilevelStore)
    assert torch.equal(store.matrix(), weight)


# ---------- gqsa


@pytest.mark.parametrize("balance", ["rows", "layer"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_store_holds_the_groups_that_the_solver_kept(balance, symmetric):
    weight, stats = columns(6)
    method = GQSA(bits=3, group_size=8, sparsity=0.5, balance=balance, symmetric=symmetric, search=False)
    upper = inverse_root(stats.get(Stat.GRAM))
    mask = costliest(group_costs(weight, upper, 8, method.saliency), 24, balance)
    expected = solve_columns(weight, upper, GroupRule(UniformRule(weight, 3, 8, symmetric=symmetric), mask))
    store = method.store_of(weight, stats, torch.float64)
    assert torch.equal(store.matrix(), expected)
    assert isinstance(store, GroupStore)
    assert store.kept.outputs == 24
    assert torch.equal(expected.unflatten(1, (4, 8)).ne(0).any(2), mask)


def test_columns_that_are_left_make_up_for_groups_that_are_not():
    """Against the same groups left out and the others rounded, in a matrix that does not mix columns."""
    weight, stats = columns(7)
    apart = Stats(tokens=1, gram=stats.get(Stat.GRAM).diagonal().diag())
    made_up, plain = (GQSA(group_size=8).store_of(weight, s, torch.float64) for s in (stats, apart))
    assert lost(weight, made_up, stats) < 0.8 * lost(weight, plain, stats)


def test_fewer_groups_lose_more_and_none_left_out_is_gptq():
    weight, stats = columns(8)
    losses = [
        lost(weight, GQSA(group_size=8, sparsity=share).store_of(weight, stats, torch.float64), stats)
        for share in (0.0, 0.25, 0.5, 0.75)
    ]
    assert losses == sorted(losses)
    store = GQSA(group_size=8, sparsity=0.0).store_of(weight, stats, torch.float64)
    gptq = make_method("gptq", options={"group_size": 8})
    assert isinstance(gptq, PackedMethod)
    assert isinstance(store, UniformStore)
    assert torch.equal(store.matrix(), gptq.store_of(weight, stats, torch.float64).matrix())


def test_rows_of_unlike_size_are_better_served_by_the_layer_as_a_whole():
    weight, stats = columns(9)
    weight = weight * torch.logspace(0, -2, len(weight), dtype=weight.dtype)[:, None]
    rows, layer = (
        lost(weight, GQSA(group_size=8, balance=balance).store_of(weight, stats, torch.float64), stats)
        for balance in ("rows", "layer")
    )
    assert layer < 0.5 * rows


def test_more_bits_are_closer_to_the_dense_model():
    for name, options, widths in (("spqr", {**SPQR, "outliers": 0.01}, (2, 8)), ("squeezellm", {}, (2, 4))):
        differences = []
        for bits in widths:
            dense, outcome = made(name, keep=1.0, bits=bits, **options)
            differences.append(float((logits_of(outcome.model, IDS) - logits_of(dense, IDS)).abs().mean()))
        assert differences == sorted(differences, reverse=True), name


def test_a_block_may_be_calibrated_behind_the_blocks_before_it():
    _, once = made("spqr", bits=3, **SPQR)
    dense, behind = made("spqr", bits=3, sequential=True, **SPQR)
    pairs = zip(layers_of(dense, once), layers_of(dense, behind), strict=True)
    first, *_, last = ((one[2].dense_weight(), other[2].dense_weight()) for one, other in pairs)
    assert torch.equal(*first)
    assert not torch.equal(*last)


# ---------- bytes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("squeezellm", {"bits": 3, "outliers": 0.02}),
        ("squeezellm", {"bits": 4, "outliers": 0.0, "sensitive": 0.0}),
        ("spqr", {"bits": 3, **SPQR}),
        ("spqr", {"bits": 2, "statistic_rows": 5, "group_size": 4, "outliers": 0.0}),
        ("spqr", {"bits": 4, "statistic_rows": 1000, "group_size": 8}),
        ("gqsa", {"bits": 3, "group_size": 4, "sparsity": 0.3}),
        ("gqsa", {"bits": 4, "group_size": 8, "sparsity": 0.6, "balance": "layer", "symmetric": True}),
        ("gqsa", {"bits": 2, "group_size": 8, "sparsity": 0.0}),
    ],
)
def test_what_is_announced_is_what_is_stored_or_a_little_more(name, options):
    _, outcome = made(name, keep=1.0, **options)
    method = outcome.method
    assert isinstance(method, PackedMethod)
    for layer in outcome.walk.layers:
        packed = outcome.model.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        account = method.account(layer)
        stored = packed.counted_bytes - (2 * layer.outputs if layer.has_bias else 0)
        if isinstance(packed.base, GroupStore):
            assert stored == account.total
            continue
        if not isinstance(packed.base, OutlierStore):
            assert stored == account.total - account.values - account.indices
            continue
        unused = account.values - 2 * packed.base.entries + account.indices - packed.base.gap_bytes
        assert stored == account.total - unused
        assert unused >= 0


# ---------- refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("squeezellm", {"bits": 8}, "method squeezellm: bits must be one of 2, 3, 4, got 8"),
        ("squeezellm", {"weigh": "gram"}, "method squeezellm: weigh must be one of fisher, none"),
        ("squeezellm", {"outliers": 0.5}, "method squeezellm: outliers must be in"),
        ("squeezellm", {"sensitive": -0.1}, "method squeezellm: sensitive must be in"),
        ("squeezellm", {"sequential": True}, "method squeezellm: sequential=true"),
        ("spqr", {"bits": 5}, "method spqr: bits must be one of 2, 3, 4, 8, got 5"),
        ("spqr", {"statistic_bits": 1}, "method spqr: statistic_bits must be one of"),
        ("spqr", {"statistic_rows": 0}, "method spqr: statistic_rows must be in"),
        ("spqr", {"group_size": -1}, "method spqr: group_size must be in"),
        ("spqr", {"threshold": 0.0}, "method spqr: threshold must be in"),
        ("spqr", {"outliers": 1.0}, "method spqr: outliers must be in"),
        ("spqr", {"damping": 0.0}, "method spqr: damping must be in"),
        ("gqsa", {"bits": 5}, "method gqsa: bits must be one of 2, 3, 4, 8, got 5"),
        ("gqsa", {"group_size": 0}, "method gqsa: group_size must be in"),
        ("gqsa", {"sparsity": 0.9}, "method gqsa: sparsity must be in"),
        ("gqsa", {"saliency": "magnitude"}, "method gqsa: saliency must be one of later, all, weights"),
        ("gqsa", {"balance": "columns"}, "method gqsa: balance must be one of rows, layer"),
    ],
)
def test_options_out_of_range_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        make_method(name, options=options)


def test_sizes_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(UsageError, match=r"spqr: group_size 7 does not divide the 32 inputs of model\.layers\.0"):
        made("spqr", group_size=7)
    with pytest.raises(UsageError, match=r"gqsa: group_size 7 does not divide the 32 inputs of model\.layers\.0"):
        made("gqsa", group_size=7)
    with pytest.raises(
        UsageError, match=r"gqsa with bits=4, group_size=8, sparsity=0\.5, .* stores .*keep 0\.1 allows"
    ):
        made("gqsa", keep=0.1, group_size=8)
    with pytest.raises(UsageError, match=r"spqr with bits=4, group_size=8, .*outliers=0\.2 stores .*keep 0\.4 allows"):
        made("spqr", keep=0.4, **SPQR)
    with pytest.raises(UsageError) as refused:
        made("squeezellm", keep=0.1, bits=3)
    keep = float(str(refused.value).split("Pass --keep ")[1].split()[0])
    assert made("squeezellm", keep=keep, bits=3)[1].placed
