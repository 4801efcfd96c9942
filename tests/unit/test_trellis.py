"""Trellis codes: the best path, streams that decode to what was encoded, feedback, bits under a budget."""

from itertools import product

import pytest
import torch
from torch import Tensor

from spectrim.engines.forms import DENSE, code_menu, codes_of
from spectrim.engines.paired import in_order
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.linalg.columns import gptq, inverse_root
from spectrim.linalg.knapsack import settle
from spectrim.linalg.predicted import InCodes
from spectrim.linalg.quantise import dequantise, pack, unpack
from spectrim.linalg.trellis import RATES, WINDOWS, Rate, code_table, decode, distortion, rate_of, states_of, viterbi
from spectrim.linalg.trellis_columns import (
    SCALES,
    STRIP,
    RowLosses,
    best_scales,
    decode_weight,
    steps_of,
    strips_of,
    trellis_account,
    trellis_columns,
)
from spectrim.models.walk import Layer, find_layers, weight_of
from spectrim.nn.stores import store_from_entry
from spectrim.nn.stores_trellis import TrellisStore
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

every_rate = pytest.mark.parametrize("rate", [rate._replace(window=8) for rate in RATES], ids=lambda r: f"{r.bits:g}")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(inputs: int, seed: int = 5) -> Tensor:
    """Of inputs that resemble each other."""
    x = normal(seed, 8 * inputs, inputs) @ normal(seed + 1, inputs, inputs)
    return x.mT @ x / len(x)


def in_metric(error: Tensor, gram: Tensor) -> float:
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("width", [1, 2])
def test_a_table_has_every_quantile_of_the_normal_distribution_once(window, width):
    table = code_table(Rate(2, width, window)).double()
    uniform = (torch.arange(1 << window).double() + 0.5) / (1 << window)
    quantiles = 2**0.5 * torch.erfinv(2 * uniform - 1)
    for column in table.T:
        assert torch.allclose(column.sort().values, quantiles / quantiles.square().mean().sqrt(), atol=1e-6)


TABLE_HEAD = [-1.3766, -1.383, -0.354, 0.8424, -0.9825, 0.3313]


def test_tables_are_part_of_the_format():
    table = code_table(Rate(3, 2, 12))
    assert [round(float(x), 4) for x in table[:3].flatten()] == TABLE_HEAD
    assert abs(float(torch.corrcoef(table.T)[0, 1])) < 0.05
    neighbours = torch.corrcoef(torch.stack([table[:, 0], table[torch.arange(4096) * 8 % 4096, 0]]))
    assert abs(float(neighbours[0, 1])) < 0.05


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("start", [0, 200])
def test_the_path_is_the_best_of_all(width, start):
    rate = Rate(2, width, 8)
    targets, weights = normal(1, 3, 5, width).float(), normal(2, 3, 5, width).square().float()
    path = viterbi(targets, weights, torch.full((3,), start), rate)
    table = code_table(rate)
    best = torch.full((3,), torch.inf)
    for codes in product(range(4), repeat=5):
        state, cost = start, torch.zeros(3)
        for t, code in enumerate(codes):
            state = (state * 4 + code) % 256
            cost = cost + (weights[:, t] * (targets[:, t] - table[state]).square()).sum(1)
        best = torch.minimum(best, cost)
    assert torch.allclose(path.cost, best, rtol=1e-5)
    values = table[path.states]
    assert torch.allclose((weights * (targets - values).square()).sum((1, 2)), best, rtol=1e-5)


@every_rate
def test_codes_decode_to_the_states_of_the_path(rate):
    targets = normal(3, 4, 40, rate.width).float()
    path = viterbi(targets, torch.ones_like(targets), torch.zeros(4, dtype=torch.int64), rate)
    codes = (path.states & ((1 << rate.step_bits) - 1)).to(torch.uint8)
    assert torch.equal(states_of(codes, rate).long(), path.states)
    assert torch.equal(unpack(pack(codes, rate.step_bits), rate.step_bits, 40), codes)
    table = code_table(rate)
    assert torch.equal(decode(codes, rate, table), table[path.states].flatten(1))


def test_short_streams_decode_too():
    codes = torch.tensor([[1, 3]], dtype=torch.uint8)
    assert states_of(codes, Rate(2, 1, 12)).tolist() == [[1, 7]]


@pytest.mark.parametrize(
    ("bits", "most", "bound"),
    [(1, 0.29, 0.25), (1.5, 0.15, 0.125), (2, 0.077, 0.0625), (3, 0.0212, 0.0156), (4, 0.0058, 0.0039)],
)
def test_the_error_lies_between_the_bound_and_what_is_promised(bits, most, bound):
    assert bound < distortion(rate_of(bits)) < most


def test_more_bits_always_cost_less():
    errors = [code.error for code in codes_of(12)]
    assert errors == sorted(errors, reverse=True)
    assert 0 == DENSE.code.error < errors[-1]


@every_rate
@pytest.mark.parametrize("outputs", [STRIP, 24, 3])
def test_a_weight_comes_back_near_what_its_bits_allow(rate, outputs):
    weight = normal(7, outputs, 32) * (0.5 * normal(8, outputs, 1)).exp()
    coded = trellis_columns(weight, torch.eye(32, dtype=torch.float64), rate)
    assert coded.codes.shape == (strips_of(outputs), steps_of(32, rate))
    back = decode_weight(coded, rate, 32, code_table(rate).double())
    error = float((weight - back).square().sum() / weight.square().sum())
    assert error < 1.5 * distortion(rate)


def test_feedback_lowers_what_rounding_costs_the_outputs():
    weight, gram = normal(9, 32, 48), gram_of(48)
    upper, rate = inverse_root(gram), rate_of(2, 8)
    with_feedback = decode_weight(trellis_columns(weight, upper, rate), rate, 48, code_table(rate).double())
    eye = torch.eye(48, dtype=torch.float64)
    without = decode_weight(trellis_columns(weight, eye, rate), rate, 48, code_table(rate).double())
    scalar = dequantise(gptq(weight, gram, 2, 48, symmetric=False, search=True), 2, torch.float64)
    here, there = in_metric(weight - with_feedback, gram), in_metric(weight - without, gram)
    assert here < 0.75 * there
    assert here < 0.8 * in_metric(weight - scalar, gram)


def test_feedback_of_a_block_is_the_best_change_of_the_columns_after_it():
    weight, gram = normal(11, 16, 12), gram_of(12)
    upper = inverse_root(gram, damping=1e-9)
    rate = rate_of(4, 8)
    coded = trellis_columns(weight, upper, rate, block=8)
    first = decode_weight(coded, rate, 12, code_table(rate).double())[:, :8]
    error = weight[:, :8] - first
    # The best change of the rest for that error, straight from the Gram matrix.
    best = error @ gram[:8, 8:] @ torch.linalg.inv(gram[8:, 8:])
    spread = torch.linalg.solve_triangular(upper[:8, :8], error, upper=True, left=False)
    assert torch.allclose(-spread @ upper[:8, 8:], best, rtol=1e-5, atol=1e-8)


def test_scales_are_the_best_for_their_codes():
    weight, codes, gram = normal(12, 4, 10), normal(13, 4, 10), gram_of(10)
    scales = best_scales(weight, codes, inverse_root(gram, damping=1e-12))
    for row in range(4):
        cross, own = weight[row] @ gram @ codes[row], codes[row] @ gram @ codes[row]
        assert float(scales[row]) == pytest.approx(float(cross / own), rel=1e-6)
    assert float(best_scales(weight[:1], torch.zeros(1, 10).double(), inverse_root(gram))[0]) == 0


def test_important_rows_are_coded_better():
    weight, upper, rate = normal(14, 16, 64), torch.eye(64, dtype=torch.float64), rate_of(1, 8)
    importance = torch.ones(16, dtype=torch.float64)
    importance[0] = 100
    table = code_table(rate).double()
    plain = decode_weight(trellis_columns(weight, upper, rate), rate, 64, table)
    drawn = decode_weight(trellis_columns(weight, upper, rate, importance=importance), rate, 64, table)
    assert (weight - drawn)[0].square().sum() < 0.5 * (weight - plain)[0].square().sum()


@every_rate
def test_stores_hold_what_they_count_and_nothing_else(rate):
    weight = normal(15, 24, 20)
    coded = trellis_columns(weight, torch.eye(20, dtype=torch.float64), rate)
    store = TrellisStore.holding(coded, 20, rate, dtype=torch.bfloat16)
    held = {key: tuple(tensor.shape) for key, tensor in store.state_dict().items()}
    assert held == store.shapes()
    assert sum(tensor.nbytes for tensor in store.state_dict().values()) == trellis_account(24, 20, rate).total
    empty = store_from_entry(24, 20, store.entry(), dtype=torch.bfloat16)
    empty.load_state_dict(store.state_dict())
    expected = decode_weight(coded, rate, 20, code_table(rate).double())
    assert torch.allclose(empty.matrix(torch.float64), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"bits": 2.25, "window": 12}, "bits 2.25"),
        ({"bits": True, "window": 12}, "bits True"),
        ({"bits": 2}, "window None"),
        ({"bits": 2, "window": 60}, "window 60"),
        ({"bits": 2, "window": 8, "check": "5"}, "check '5'"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry, said):
    with pytest.raises(ValueError, match=said):
        store_from_entry(16, 16, {"kind": "trellis", **entry})


@pytest.mark.parametrize("changed", [{"window": 12}, {"window": 10, "check": None}, {"check": 7}])
def test_a_window_that_the_codes_were_not_made_with_is_noticed(changed):
    """Streams are as long with any window, and all of them give weights: only the check can tell."""
    rate = rate_of(2, 10)
    store = TrellisStore.holding(trellis_columns(normal(3, 24, 20), torch.eye(20).double(), rate), 20, rate,
                                 dtype=torch.bfloat16)  # fmt: skip
    entry = store.entry()
    assert type(entry["check"]) is int
    loaded = store_from_entry(24, 20, entry | changed, dtype=torch.bfloat16)
    loaded.load_state_dict(store.state_dict())
    if changed.get("check", 0) is None:  # of a folder without it
        loaded.after_load()
        return
    with pytest.raises(ValueError, match=rf"window {changed.get('window', 10)} have the check \d+, and config"):
        loaded.after_load()


def test_a_check_survives_being_built_without_numbers():
    store = store_from_entry(16, 16, {"kind": "trellis", "bits": 2, "window": 8, "check": 5}, device="meta")
    assert store.entry()["check"] == 5


def worth_of(scale: float) -> InCodes:
    """Of a layer that loses so much over D."""
    rows = RowLosses(torch.tensor([2 * scale]).double(), torch.zeros(len(SCALES), 1).double())
    return InCodes(torch.ones(1).double(), rows, scale * 8e-5)


def layer_of(name: str) -> Layer:
    return Layer(name=name, block=0, outputs=32, inputs=32, has_bias=False)


def test_bits_go_where_they_are_worth_most_and_the_budget_is_kept():
    layers = [layer_of("a"), layer_of("b"), layer_of("c")]
    budget = 3 * trellis_account(32, 32, rate_of(2)).total
    menus = [code_menu(la, worth_of(worth), 8) for la, worth in zip(layers, (100.0, 1.0, 1.0), strict=True)]
    chosen = settle([menu.options for menu in menus], budget).choice
    errors = [float(menu.options.error[k]) for menu, k in zip(menus, chosen, strict=True)]
    assert sum(int(menu.options.cost[k]) for menu, k in zip(menus, chosen, strict=True)) <= budget
    assert errors[0] / 100 < min(errors[1:])
    best = min(
        sum(float(menu.options.error[k]) for menu, k in zip(menus, ks, strict=True))
        for ks in product(range(len(menus[0].forms)), repeat=3)
        if sum(int(menu.options.cost[k]) for menu, k in zip(menus, ks, strict=True)) <= budget
    )
    assert sum(errors) <= 1.002 * best


def test_in_order_shows_each_group_the_model_as_it_is_by_then():
    dense, changed = tiny("llama"), tiny("llama")
    walk, seen = find_layers(dense), []

    def treat(names, moments):
        cross, gram = moments
        seen.append((tuple(names), float((cross - gram).abs().max())))
        for name in names:
            weight_of(changed.get_submodule(name)).data.mul_(0.5)

    in_order(dense, changed, walk, token_ids(4, 16), treat)
    assert [name for names, _ in seen for name in names] == [layer.name for layer in walk.layers]
    assert seen[0][1] == 0.0
    assert all(drift > 0 for _, drift in seen[1:])


def test_the_drift_of_inputs_is_made_up_for():
    dense, ids = tiny("llama"), token_ids(64, 16)
    errors = {}
    for propagate in (0.0, 1.0):
        method = make_method("trellis", None, {"window": 8, "propagate": propagate})
        model = compress_model(dense, method, 0.14, ids).model
        with torch.no_grad():
            errors[propagate] = float((model(ids).logits - dense(ids).logits).square().mean())
    assert errors[1.0] < errors[0.0]


def test_a_budget_below_one_bit_is_refused_with_the_smallest_that_is_enough():
    with pytest.raises(UsageError, match=r"smallest reachable keep is 0\.\d+") as failure:
        compress_model(tiny("llama"), make_method("trellis"), 0.05, token_ids(4, 16))
    smallest = float(str(failure.value).rsplit(" ", 1)[1])
    made = compress_model(tiny("llama"), make_method("trellis", None, {"window": 8}), smallest, token_ids(4, 16))
    assert {layer.codec for layer in made.placed.values()} == {"packed"}


def test_keep_1_leaves_layers_as_they_are():
    made = compress_model(tiny("llama"), make_method("trellis", None, {"window": 8}), 1.0, token_ids(4, 16))
    assert {layer.codec for layer in made.placed.values()} == {"dense"}


@every_rate
def test_rows_that_hardly_count_are_never_worse_than_left_out(rate):
    weight = normal(16, 16, 64)
    weight[3] *= 1e-6
    back = decode_weight(
        trellis_columns(weight, torch.eye(64, dtype=torch.float64), rate), rate, 64, code_table(rate).double()
    )
    assert float((weight - back)[3].square().sum()) <= 1.0001 * float(weight[3].square().sum())


def test_tables_do_not_follow_the_device_or_dtype_of_the_moment():
    code_table.cache_clear()
    distortion.cache_clear()
    with torch.device("meta"):
        assert code_table(rate_of(2, 10)).device.type == "cpu"
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        in_double = distortion(rate_of(2, 10))
    finally:
        torch.set_default_dtype(default)
    distortion.cache_clear()
    assert in_double == distortion(rate_of(2, 10))
