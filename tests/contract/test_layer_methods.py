"""Properties that every registered method must satisfy. A new method is tested by being in the registry.

CASES holds each method of the registry with its default options, and once more for every other value of its own
`Literal` options. What cannot be derived from the contract is said in three small tables: the metric in which a
method promises its error, the methods that a rotation of the inputs changes, and the reasons.

Letters: O outputs, I inputs, R rank, N tokens; A = E[x x^T], B = E[g g^T].
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import spectrim.methods
from spectrim.errors import SpectrimError, UsageError
from spectrim.linalg.allocate import factor_cost, pivot_cost
from spectrim.linalg.curvature import add_gram
from spectrim.method import LayerMethod, LearnedMethod, OrderedMethod
from spectrim.nn.linears import LINEARS
from spectrim.registry import METHODS, all_methods, make_method, method_class
from spectrim.replacement import Codec, Target, dense_replacement, stored_numbers
from spectrim.stats import Stat, Stats

SHAPES = [(20, 12), (12, 20), (15, 15)]
CODECS: tuple[Codec, ...] = ("factor", "pivot")
SHARED_OPTIONS = {"storage", "allocation"}  # the engine's business; compress is told the codec


def variants(name: str) -> list[dict[str, Any]]:
    """The default options, and every other value of the method's own Literal options."""
    hints, default = typing.get_type_hints(method_class(name)), make_method(name)
    found: list[dict[str, Any]] = [{}]
    for field in dataclasses.fields(default):
        if field.name not in SHARED_OPTIONS and typing.get_origin(hints[field.name]) is Literal:
            values = [v for v in typing.get_args(hints[field.name]) if v != getattr(default, field.name)]
            found += [{field.name: value} for value in values]
    return found


CASES = [
    pytest.param(make_method(name, options=options), id="-".join([name, *map(str, options.values())]))
    for name in METHODS
    for options in variants(name)
]
every_case = pytest.mark.parametrize("method", CASES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
every_codec = pytest.mark.parametrize("codec", CODECS)
every_name = pytest.mark.parametrize("name", list(METHODS))

# ---------- the metric in which a method's predicted error is exact: (B or None, A or None)

Metric = tuple[Tensor | None, Tensor | None]


def shrunk(covariance: Tensor, ratio: float) -> Tensor:
    return (1 - ratio) * covariance + ratio * torch.eye(len(covariance)).double() * covariance.trace() / len(covariance)


def two_sided_metric(method: Any, stats: Stats) -> Metric:
    return shrunk(stats.output_grad, method.output_shrinkage), shrunk(stats.gram, method.input_shrinkage)


def fwsvd_metric(method: Any, stats: Stats) -> Metric:
    importance = stats.fisher.sum(0 if method.weigh == "inputs" else 1)
    return (None, torch.diag(importance)) if method.weigh == "inputs" else (torch.diag(importance), None)


def afm_metric(method: Any, stats: Stats) -> Metric:
    return None, stats.gram - torch.outer(stats.mean, stats.mean)


OWN_METRIC: dict[str, Callable[[Any, Stats], Metric]] = {
    "svd": lambda method, stats: (None, None),
    "welore": lambda method, stats: (None, None),
    "acip": lambda method, stats: (None, None),
    "asvd": lambda method, stats: (None, torch.diag(stats.mean_abs ** (2 * method.alpha))),
    "fwsvd": fwsvd_metric,
    "afm": afm_metric,
    "lord": afm_metric,
    "svd-llm": lambda method, stats: (None, stats.gram),
    "zero-sum": lambda method, stats: (None, stats.gram),
    "mpifa": lambda method, stats: (None, stats.gram),
    "two-sided": two_sided_metric,
    "soco": lambda method, stats: two_sided_metric(method, stats) if method.basis == "two-sided" else NotImplemented,
}
"""soco with basis="svd" prices each component alone: singular components are not orthogonal in its metric, so the error
of several is not the sum. A method that is not listed here states no additive error."""

NOT_ROTATION_EQUIVARIANT = {
    "asvd": "mean |x| of each input depends on the axes in which the inputs are written",
    "fwsvd": "the Fisher information of each entry depends on the axes",
    "tfwsvd": "the Fisher information of each entry depends on the axes",
}


def own_metric(method: LayerMethod, stats: Stats) -> Metric:
    metric = OWN_METRIC.get(method.info.name, lambda method, stats: NotImplemented)(method, stats)
    if metric is NotImplemented:
        pytest.skip(
            f"{method.info.name} {method.to_config().get('basis', '')}: no additive error in a metric is promised"
        )
    return metric


# ---------- a synthetic layer


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples(seed: int, tokens: int, width: int) -> Tensor:
    """Correlated rows (N, width) whose directions differ in strength by about 30."""
    mixing = torch.linalg.qr(normal(seed, width, width)).Q * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return normal(seed + 1, tokens, width) @ mixing @ torch.linalg.qr(normal(seed + 2, width, width)).Q


def statistics(x: Tensor, g: Tensor, sequence: int = 8) -> Stats:
    """All that calibration can measure, by definition, in float64."""
    length = min(sequence, len(x))
    slopes = g.unflatten(0, (-1, length)).mT @ x.unflatten(0, (-1, length))  # of each sequence
    return Stats(
        tokens=len(x),
        gram=x.mT @ x / len(x),
        mean=x.mean(0),
        mean_abs=x.abs().mean(0),
        output_grad=g.mT @ g / len(g),
        fisher=slopes.square().mean(0),
        slope=g.mT @ x / len(x),
    )


@dataclasses.dataclass(frozen=True)
class Problem:
    weight: Tensor
    x: Tensor
    g: Tensor

    @functools.cached_property
    def stats(self) -> Stats:
        return statistics(self.x, self.g)


@functools.cache
def problem(shape: tuple[int, int], *, tokens: int = 400, seed: int = 0) -> Problem:
    outputs, inputs = shape
    return Problem(
        normal(seed, outputs, inputs), samples(seed + 10, tokens, inputs), samples(seed + 20, tokens, outputs)
    )


@functools.cache
def rival(name: str, shape: tuple[int, int], rank: int) -> Tensor:
    """What a method of the registry makes of a layer."""
    p = problem(shape)
    return product(make_method(name), p.weight, p.stats, rank)


def metric_error(difference: Tensor, metric: Metric) -> float:
    """tr(B D A D^T), without roots."""
    b, a = metric
    left = difference if b is None else b @ difference
    right = difference if a is None else difference @ a
    return float((left * right).sum())


def product(method: LayerMethod, weight: Tensor, stats: Stats, rank: int, codec: Codec = "factor") -> Tensor:
    return method.compress(weight, stats, Target(rank=rank, codec=codec)).dense()


def assert_same(actual: Tensor, expected: Tensor, accuracy: float) -> None:
    """Largest difference relative to the largest entry."""
    assert actual.shape == expected.shape
    difference = float((actual.double() - expected.double()).abs().max())
    assert difference <= accuracy * float(expected.abs().max()), f"{difference:.3g}"


# ---------- 1, 2, 16: what must come back


@every_case
@every_shape
@every_codec
def test_full_rank_gives_the_weight_back(method, shape, codec):
    p = problem(shape)
    replacement = method.compress(p.weight, p.stats, Target(rank=min(shape), codec=codec))
    assert_same(replacement.dense(), p.weight, 1e-9)
    assert replacement.predicted_error == 0.0


@every_case
@every_shape
def test_the_dense_codec_returns_the_very_weight(method, shape):
    p = problem(shape)
    replacement = method.compress(p.weight, p.stats, Target(rank=min(shape), codec="dense"))
    assert torch.equal(replacement.dense(), p.weight)
    assert replacement.numbers == p.weight.numel()


@pytest.mark.fault(48)
@every_case
@every_shape
@every_codec
@pytest.mark.parametrize("rank", [1, 5])
def test_a_weight_of_rank_r_compressed_to_r_is_unchanged(method, shape, codec, rank):
    p = problem(shape)
    weight = normal(1, shape[0], rank) @ normal(2, rank, shape[1])
    assert_same(product(method, weight, p.stats, rank, codec), weight, 1e-6)
    assert_same(product(method, weight, p.stats, rank + 2, codec), weight, 1e-6)


@pytest.mark.fault(47)
@every_case
@every_shape
@every_codec
@pytest.mark.parametrize("tokens", [1, 8])
def test_fewer_tokens_than_inputs_work(method, shape, codec, tokens):
    p = problem(shape, tokens=tokens)
    assert_same(product(method, p.weight, p.stats, min(shape), codec), p.weight, 1e-4)
    cut = method.compress(p.weight, p.stats, Target(rank=4, codec=codec))
    assert bool(torch.isfinite(cut.dense()).all())
    assert int(torch.linalg.matrix_rank(cut.dense(), rtol=1e-9)) == 4


@pytest.mark.fault(46)
@every_case
@every_codec
def test_inputs_and_gradients_that_never_fire_work(method, codec):
    p = problem((12, 10))
    silent = Problem(p.weight, p.x * 0, p.g * 0)
    assert_same(product(method, p.weight, silent.stats, 10, codec), p.weight, 1e-9)
    assert bool(torch.isfinite(product(method, p.weight, silent.stats, 3, codec)).all())


@pytest.mark.fault(48)
@every_case
@every_shape
@every_codec
def test_a_zero_weight_stays_zero(method, shape, codec):
    p = problem(shape)
    assert torch.equal(product(method, p.weight * 0, p.stats, 3, codec), p.weight * 0)


# ---------- 3, 4, 5, 11: error


@every_case
@every_shape
def test_more_rank_never_raises_the_methods_own_error(method, shape):
    p = problem(shape)
    spectrum = method.decompose(p.weight, p.stats)
    assert spectrum.left.shape == (shape[0], min(shape))
    assert spectrum.right.shape == (min(shape), shape[1])
    assert bool((spectrum.energy >= 0).all())
    assert bool((spectrum.energy[:-1] >= spectrum.energy[1:]).all())
    predicted = [
        method.compress(p.weight, p.stats, Target(rank=r, codec="factor")).predicted_error
        for r in range(1, min(shape) + 1)
    ]
    assert predicted == sorted(predicted, reverse=True)
    assert predicted == pytest.approx(spectrum.tail()[1:].tolist(), rel=1e-12)
    assert predicted[0] > 0


@every_case
@every_shape
@every_codec
def test_predicted_error_equals_the_error_recomputed_without_roots(method, shape, codec):
    p = problem(shape)
    metric = own_metric(method, p.stats)
    whole = metric_error(p.weight, metric)
    for rank in (1, 4, min(shape) - 1):
        replacement = method.compress(p.weight, p.stats, Target(rank=rank, codec=codec))
        error = metric_error(p.weight - replacement.dense(), metric)
        assert replacement.predicted_error == pytest.approx(error, rel=1e-6, abs=1e-9 * whole)


@pytest.mark.fault(48)
@every_case
@every_shape
def test_equals_the_slow_oracle_in_its_own_metric(method, shape):
    """Cholesky roots, explicit SVD, mapped back with inverses: how the papers write it."""
    p = problem(shape)
    b, a = own_metric(method, p.stats)
    left = torch.eye(shape[0]).double() if b is None else torch.linalg.cholesky(b)
    right = torch.eye(shape[1]).double() if a is None else torch.linalg.cholesky(a)
    u, s, vt = torch.linalg.svd(left.mT @ p.weight @ right, full_matrices=False)
    for rank in (1, 3, 8):
        cut = (u[:, :rank] * s[:rank]) @ vt[:rank]
        expected = torch.linalg.inv(left).mT @ cut @ torch.linalg.inv(right)
        assert_same(product(method, p.weight, p.stats, rank), expected, 1e-6)


@every_case
@every_shape
def test_methods_optimal_in_the_gram_are_never_worse_than_any_other_there(method, shape):
    if not method.optimal_in_gram:
        pytest.skip(f"{method.info.name} does not claim to be optimal in the input Gram")
    p = problem(shape)
    metric = (None, p.stats.gram)
    for rank in range(1, min(shape)):
        own = metric_error(p.weight - product(method, p.weight, p.stats, rank), metric)
        optimum = float(torch.linalg.svdvals(p.x @ p.weight.mT)[rank:].square().sum()) / len(p.x)
        assert own == pytest.approx(optimum, rel=1e-7)
        for other in METHODS:
            theirs = metric_error(p.weight - rival(other, shape, rank), metric)
            assert own <= theirs * (1 + 1e-9), other
    plain = metric_error(p.weight - product(make_method("svd"), p.weight, p.stats, 3), metric)
    assert metric_error(p.weight - product(method, p.weight, p.stats, 3), metric) < 0.9 * plain


@every_case
@every_shape
def test_components_sum_to_the_weight(method, shape):
    p = problem(shape)
    spectrum = method.decompose(p.weight, p.stats)
    assert_same(spectrum.left @ spectrum.right, p.weight, 1e-9)
    assert {t.dtype for t in spectrum} == {torch.float64}


# ---------- 6: numbers


@pytest.mark.fault(54)
@every_case
@every_shape
@every_codec
@pytest.mark.parametrize("rank", [1, 7])
def test_reported_numbers_equal_counted_ones(method, shape, codec, rank):
    p, target = problem(shape), Target(rank=rank, codec=codec)
    replacement = method.compress(p.weight, p.stats, target)
    outputs, inputs = shape
    if codec == "factor":
        shapes = {"U.weight": (outputs, rank), "V.weight": (rank, inputs)}
    else:
        shapes = {"pivot.weight": (rank, inputs), "rest.weight": (outputs - rank, rank), "mask": (-(-outputs // 8),)}
    assert {name: tuple(t.shape) for name, t in replacement.tensors.items()} == shapes
    counted = sum(math.prod(s) for s in shapes.values())
    assert replacement.numbers == counted + (outputs if method.centres else 0)
    assert stored_numbers(outputs, inputs, target) == counted
    assert int((factor_cost if codec == "factor" else pivot_cost)(outputs, inputs, torch.tensor(rank))) == counted
    assert (replacement.rank, replacement.codec) == (rank, codec)
    assert all(t.is_contiguous() for t in replacement.tensors.values())
    biased = dataclasses.replace(replacement, bias=torch.zeros(outputs))
    assert biased.numbers == counted + outputs
    assert dense_replacement(p.weight).numbers == stored_numbers(outputs, inputs, Target(rank=rank, codec="dense"))


# ---------- the mean


@every_case
@every_shape
@every_codec
def test_methods_that_centre_keep_the_mean_output_and_others_leave_the_bias_alone(method, shape, codec):
    p = problem(shape)
    x = p.x + 3 * normal(9, shape[1])
    replacement = method.compress(p.weight, statistics(x, p.g), Target(rank=2, codec=codec))
    if not method.centres:
        assert replacement.bias is None
        return
    assert replacement.bias.shape == (shape[0],)
    y = x @ replacement.dense().mT + replacement.bias
    assert_same(y.mean(0), (x @ p.weight.mT).mean(0), 1e-9)


# ---------- 7 to 10: symmetries


@pytest.mark.fault(49)
@every_case
@every_shape
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_the_inputs_changes_nothing(method, shape, scale):
    for tokens in (400, 6):  # with 6 tokens an absolute jitter would decide
        p = problem(shape, tokens=tokens)
        scaled = statistics(p.x * scale, p.g)
        assert_same(product(method, p.weight, scaled, 4), product(method, p.weight, p.stats, 4), 1e-6)


@pytest.mark.fault(49)
@every_case
@every_shape
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_the_loss_changes_nothing_and_scaling_the_weight_scales_the_result(method, shape, scale):
    p = problem(shape)
    plain = product(method, p.weight, p.stats, 4)
    assert_same(product(method, p.weight, statistics(p.x, p.g * scale), 4), plain, 1e-6)
    assert_same(product(method, p.weight * scale, p.stats, 4), plain * scale, 1e-6)


@pytest.mark.fault(49)
@every_case
@every_shape
def test_rotating_the_inputs_rotates_the_result(method, shape):
    reason = NOT_ROTATION_EQUIVARIANT.get(method.info.name)
    if reason:
        pytest.skip(f"{method.info.name}: {reason}")
    p = problem(shape)
    q = torch.linalg.qr(normal(3, shape[1], shape[1])).Q
    turned = product(method, p.weight @ q.mT, statistics(p.x @ q.mT, p.g), 4)
    assert_same(turned, product(method, p.weight, p.stats, 4) @ q.mT, 1e-6)


@every_case
@every_shape
def test_permuting_outputs_or_inputs_permutes_the_result(method, shape):
    p = problem(shape)
    plain = product(method, p.weight, p.stats, 4)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(4))
    assert_same(product(method, p.weight[order], statistics(p.x, p.g[:, order]), 4), plain[order], 1e-6)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(5))
    assert_same(product(method, p.weight[:, order], statistics(p.x[:, order], p.g), 4), plain[:, order], 1e-6)


@pytest.mark.fault(55)
@every_case
def test_order_and_split_of_the_calibration_tokens_do_not_matter(method):
    p = problem((14, 11))
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(6))
    grams = torch.zeros(11, 11).double(), torch.zeros(14, 14).double()
    for part in shuffled.split([13, 200, 1, 186]):
        add_gram(grams[0], p.x[part])
        add_gram(grams[1], p.g[part])
    streamed = dataclasses.replace(p.stats, gram=grams[0] / 400, output_grad=grams[1] / 400)
    assert_same(product(method, p.weight, streamed, 4), product(method, p.weight, p.stats, 4), 1e-4)


@every_case
def test_blending_a_measurement_with_itself_changes_nothing(method):
    p = problem((14, 11))
    twice = p.stats.blend(p.stats)
    assert twice.tokens == 800
    assert_same(product(method, p.weight, twice, 4), product(method, p.weight, p.stats, 4), 1e-9)


# ---------- 12 to 15: dtypes, bytes, NaN


@every_case
@every_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_in_is_dtype_out_and_the_arithmetic_is_float64(method, codec, dtype):
    p, target = problem((14, 11)), Target(rank=4, codec=codec)
    weight = p.weight.to(dtype)
    stored = method.compress(weight, p.stats, target).tensors
    wide = method.compress(weight.double(), p.stats, target).tensors
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.uint8 if name == "mask" else dtype)
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name  # cast once, at the end


@pytest.mark.fault(55)
@every_case
@every_shape
@every_codec
def test_same_inputs_same_bytes_and_inputs_unchanged(method, shape, codec):
    p, target = problem(shape), Target(rank=4, codec=codec)
    weight, stats = p.weight.float(), p.stats
    kept = {f.name: getattr(stats, f.name) for f in dataclasses.fields(stats)}
    before = weight.clone(), {n: v.clone() for n, v in kept.items() if isinstance(v, Tensor)}
    first = method.compress(weight, stats, target)
    torch.manual_seed(99)  # a method that draws from the global generator shows here
    again = make_method(method.info.name, options=configured(method)).compress(weight, stats, target)
    for name, tensor in first.tensors.items():
        assert tensor.numpy().tobytes() == again.tensors[name].numpy().tobytes(), name
    assert first.predicted_error == again.predicted_error
    assert torch.equal(weight, before[0])
    assert all(torch.equal(getattr(stats, name), tensor) for name, tensor in before[1].items())


@every_case
@every_codec
def test_save_load_equal_in_the_file_and_in_the_module(method, codec, tmp_path):
    p = problem((20, 12))
    replacement = method.compress(p.weight.float(), p.stats, Target(rank=4, codec=codec))
    save_file(dict(replacement.tensors), tmp_path / "layer.safetensors")
    loaded = load_file(tmp_path / "layer.safetensors")
    assert set(loaded) == set(replacement.tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in replacement.tensors.items())
    assert torch.equal(dataclasses.replace(replacement, tensors=loaded).dense(), replacement.dense())
    module = LINEARS[codec](12, 20, 4, bias=False)
    module.load_state_dict({**loaded, "weight": module.weight})
    assert_same(module.dense_weight(), replacement.dense(), 1e-6)
    with torch.no_grad():
        y = module(p.x.float())
    assert_same(y, p.x @ replacement.dense().double().mT, 1e-5)


def read(method: LayerMethod, weight: Tensor, stats: Stats) -> list[Tensor]:
    """All that a method makes of a layer, statistics for its own order of removal included."""
    spectrum = method.decompose(weight, stats)
    return [*spectrum, *([method.prices(weight, spectrum, stats)] if isinstance(method, OrderedMethod) else [])]


def poisoned(method: LayerMethod, shape: tuple[int, int], bad: float):
    """(what, weight, stats) with one bad number, in the weight and in every statistic that the method reads."""
    p = problem(shape)
    for position in (0, 37, -1):
        weight = p.weight.clone()
        weight.view(-1)[position] = bad
        yield "weight", weight, p.stats
        for stat in method.needs:
            values = p.stats.get(stat).clone()
            values.view(-1)[position % values.numel()] = bad
            yield stat.value, p.weight, dataclasses.replace(p.stats, **{stat.value: values})


# The solver takes another path above 25 rows, in which it returns some finite eigenvalues of a matrix with NaN.
@pytest.mark.fault(44)
@every_case
@pytest.mark.parametrize("shape", [*SHAPES, (40, 30), (30, 40)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_anywhere_never_becomes_a_number(method, shape, bad):
    for what, weight, stats in poisoned(method, shape, bad):
        try:
            found = read(method, weight, stats)
        except (SpectrimError, RuntimeError):
            continue
        finite = all(bool(torch.isfinite(t).all()) for t in found)
        assert not finite, f"{bad} in {what} disappeared"  # the engine refuses what is not finite


@every_case
@every_shape
@every_codec
def test_a_nan_shows_in_the_replacement(method, shape, codec):
    for what, weight, stats in poisoned(method, shape, math.nan):
        try:
            replacement = method.compress(weight, stats, Target(rank=4, codec=codec))
        except (SpectrimError, RuntimeError):
            continue
        finite = math.isfinite(replacement.predicted_error) and bool(torch.isfinite(replacement.dense()).all())
        assert not finite, f"NaN in {what} disappeared"


@every_case
def test_only_declared_statistics_are_read(method):
    p = problem((14, 11))
    declared = {s.value: p.stats.get(s) for s in method.needs}
    bare = Stats(tokens=p.stats.tokens, **declared)
    assert torch.equal(product(method, p.weight, bare, 4), product(method, p.weight, p.stats, 4))
    for stat in method.needs:
        with pytest.raises(AssertionError, match="declare it in `needs`"):
            read(method, p.weight, dataclasses.replace(bare, **{stat.value: None}))


# ---------- configuration


def configured(method: LayerMethod) -> dict[str, Any]:
    return {name: value for name, value in method.to_config().items() if name != "method"}


@every_case
def test_config_round_trips_through_json(method):
    config = json.loads(json.dumps(method.to_config()))
    assert config.pop("method") == method.info.name
    assert set(config) == {f.name for f in dataclasses.fields(method)}
    again = type(method).from_config(config)
    assert again == method
    assert hash(again) == hash(method)
    assert make_method(method.info.name, options=config) == method
    assert json.dumps(again.to_config()) == json.dumps(method.to_config())


@every_case
def test_method_objects_are_frozen_hashable_and_keyword_only(method):
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.storage = "factor"
    other = dataclasses.replace(method, rounds=method.rounds + 1)
    assert other != method
    assert len({method, other, dataclasses.replace(method)}) == 2
    with pytest.raises(TypeError, match="positional"):
        type(method)("factor")
    for field in dataclasses.fields(method):
        assert field.kw_only, field.name
        assert isinstance(field.default, int | float | str), field.name  # a plain default: JSON and the CLI can say it


@pytest.mark.fault(68)
@every_name
def test_unknown_options_are_refused_with_a_suggestion(name):
    for field in dataclasses.fields(method_class(name)):
        typo = field.name + "s"
        if typo in {f.name for f in dataclasses.fields(method_class(name))}:
            continue
        with pytest.raises(UsageError, match=f"unknown option '{typo}'; did you mean '{field.name}'"):
            make_method(name, options={typo: field.default})
    with pytest.raises(UsageError, match=r"unknown option 'zzzzzz'; known: .*storage"):
        make_method(name, options={"zzzzzz": 1})


@pytest.mark.fault(68)
@every_name
def test_options_of_the_wrong_type_are_refused_with_the_type_that_fits(name):
    for field in dataclasses.fields(method_class(name)):
        wanted = type(field.default)
        wrong = [None, [1], "7", True, 1.5, 3]
        for value in wrong:
            fits = type(value) is wanted or (wanted is float and type(value) is int)
            if fits:
                continue
            with pytest.raises(UsageError, match=rf"option {field.name} takes {wanted.__name__}, got"):
                make_method(name, options={field.name: value})


@every_name
def test_values_out_of_range_are_refused_with_the_range(name):
    for field in dataclasses.fields(method_class(name)):
        if isinstance(field.default, str):
            with pytest.raises(UsageError, match=rf"{field.name} must be one of \w.*, got 'zzz'"):
                make_method(name, options={field.name: "zzz"})
            continue
        numbers = [-(10**12), 10**12] if isinstance(field.default, int) else [-1e12, 1e12, math.nan, math.inf]
        for value in numbers:
            with pytest.raises(UsageError, match=rf"{field.name}.* must be in \[.*\], got"):
                make_method(name, options={field.name: value})


@every_name
def test_an_int_is_taken_where_a_float_is_wanted(name):
    for field in dataclasses.fields(method_class(name)):
        if not isinstance(field.default, float):
            continue
        least = min(value for value in (0, 1) if accepted(name, {field.name: value}))
        assert getattr(make_method(name, options={field.name: least}), field.name) == least


def accepted(name: str, options: dict[str, Any]) -> bool:
    try:
        make_method(name, options=options)
    except UsageError as error:
        if "must be in [" not in str(error):
            raise  # refused for its type, not for its value
        return False
    return True


@every_name
def test_presets_are_valid_and_unknown_ones_are_refused(name):
    cls = method_class(name)
    for preset, values in cls.presets.items():
        method = make_method(name, preset)
        assert {key: getattr(method, key) for key in values} == dict(values)
    assert cls.default_preset is None or cls.default_preset in cls.presets
    with pytest.raises(UsageError, match="no presets" if not cls.presets else "unknown preset 'blance'"):
        make_method(name, "blance")


@every_name
def test_info_is_complete(name):
    cls = method_class(name)
    info = cls.info
    assert info.name == name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    assert info.family == Path(inspect.getfile(cls)).parent.name
    assert info.paper.strip()
    assert 10 <= len(info.promise) <= 80
    assert not info.promise.endswith(".")
    assert cls.needs <= frozenset(Stat)
    assert inspect.getdoc(cls)


@every_name
def test_the_file_is_named_as_the_method_and_cites_a_paper(name):
    path = Path(inspect.getfile(method_class(name)))
    assert path.stem == name.replace("-", "_")
    header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert header
    assert re.search(
        r"arXiv[: ]\d{4}\.\d{4,5}|[A-Z][a-z]+ (and [A-Z]\w+ |et al\.,? )?(19|20)\d\d\b", " ".join(header.split())
    ), header


# ---------- learned methods


@every_case
def test_learned_methods_schedule_ends_at_the_budget_and_prices_are_finite(method):
    if not isinstance(method, LearnedMethod):
        pytest.skip(f"{method.info.name} does not learn")
    seen = [method.keep_at(step / 100, 0.4) for step in range(100)]
    budgets = [keep for keep in seen if keep is not None]
    assert all(0.4 <= keep <= 1.0 for keep in budgets)
    assert budgets == sorted(budgets, reverse=True)
    assert not budgets or budgets[-1] == 0.4
    logits, ids = normal(1, 2, 3, 7), torch.randint(0, 7, (2, 3), generator=torch.Generator().manual_seed(3))
    assert float(method.loss(logits + normal(2, 2, 3, 7), ids, logits)) > float(method.loss(logits, ids, logits)) + 0.01


@every_case
def test_an_own_order_removes_every_component_and_each_layers_last_one_first(method):
    if not isinstance(method, OrderedMethod):
        pytest.skip(f"{method.info.name} has no order of removal of its own")
    problems = [problem(shape, seed=seed) for seed, shape in enumerate(SHAPES)]
    spectra = [method.decompose(p.weight, p.stats) for p in problems]
    prices = [method.prices(p.weight, s, p.stats) for p, s in zip(problems, spectra, strict=True)]
    assert [tuple(price.shape) for price in prices] == [(min(shape),) for shape in SHAPES]
    order = method.removal_order(prices)
    assert [order.count(layer) for layer in range(len(SHAPES))] == [min(shape) for shape in SHAPES]
    assert order == method.removal_order(prices)


# ---------- the registry


def test_every_method_in_the_folder_is_registered():
    """A file with a class that states `info` and can be built, but that no line of the registry names, fails here."""
    folder = Path(spectrim.methods.__file__).parent
    found = set()
    for path in sorted(folder.glob("*/*.py")):
        module = importlib.import_module(f"spectrim.methods.{path.parent.name}.{path.stem}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and "info" in vars(cls) and not inspect.isabstract(cls):
                found.add(f"{module.__name__}:{cls.__name__}")
    assert found == set(all_methods().values())


def test_unknown_methods_are_refused_with_a_suggestion():
    with pytest.raises(UsageError, match="unknown method 'svdllm'; did you mean 'svd-llm'"):
        make_method("svdllm")
