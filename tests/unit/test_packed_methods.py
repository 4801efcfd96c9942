"""rtn, gptq and eora on whole small models: against their formulas written out, and what they refuse."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from command_line import small_model
from spectrim import job
from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.engines.plan import estimate
from spectrim.errors import NumericalError, UsageError
from spectrim.job import Request, run
from spectrim.linalg.columns import gptq
from spectrim.linalg.quantise import dequantise, round_to_nearest
from spectrim.methods.weights.eora import METRICS, EoRA
from spectrim.models.load import load_model, resolve
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
every_base = pytest.mark.parametrize("base", ["rtn2", "gptq3", "2:4", "2:4+rtn4"])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name: str, keep: float = 0.9, architecture: str = "llama-gqa-bias", **options: Any) -> tuple[Any, Outcome]:
    dense = tiny(architecture)
    return dense, compress_model(
        dense, make_method(name, options={"group_size": 8, "search": False, **options}), keep, IDS
    )


def layers_of(dense: Any, outcome: Outcome) -> list[tuple[str, Tensor, PackedLinear]]:
    found = []
    for layer in outcome.walk.layers:
        packed = outcome.model.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        found.append((layer.name, weight_of(dense.get_submodule(layer.name)).detach().double(), packed))
    return found


def loss(missing: Tensor, gram: Tensor) -> float:
    return float((missing @ gram * missing).sum())


# ---------- rtn and gptq


@pytest.mark.parametrize(
    ("architecture", "bits", "search"), [("llama", 3, True), ("gpt2", 4, False), ("gpt2", 8, False)]
)
def test_layers_hold_what_the_formulas_give(architecture, bits, search):
    dense, nearest = made("rtn", architecture=architecture, bits=bits, search=search)
    for _, weight, packed in layers_of(dense, nearest):
        expected = dequantise(round_to_nearest(weight, bits, 8, symmetric=False, search=search), bits)
        assert torch.equal(packed.dense_weight(), expected.float())
    _, calibrated = made("gptq", architecture=architecture, bits=bits, search=search)
    grams = measure(dense, calibrated.walk, IDS, frozenset({Stat.GRAM}))
    for name, weight, packed in layers_of(dense, calibrated):
        gram = grams[name].get(Stat.GRAM)
        expected = dequantise(gptq(weight, gram, bits, 8, symmetric=False, search=search), bits)
        assert torch.equal(packed.dense_weight(), expected.float()), name


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_loses_less_of_the_outputs_than_rtn(bits):
    dense, nearest = made("rtn", bits=bits)
    _, calibrated = made("gptq", bits=bits)
    grams = measure(dense, nearest.walk, IDS, frozenset({Stat.GRAM}))
    for (name, weight, one), (_, _, other) in zip(layers_of(dense, nearest), layers_of(dense, calibrated), strict=True):
        gram = grams[name].get(Stat.GRAM)
        assert loss(weight - other.dense_weight(), gram) < loss(weight - one.dense_weight(), gram), name


def test_more_bits_are_closer_to_the_dense_model():
    differences = []
    for bits in (2, 3, 4, 8):
        dense, outcome = made("gptq", bits=bits)
        differences.append(float((logits_of(outcome.model, IDS) - logits_of(dense, IDS)).abs().mean()))
    assert differences == sorted(differences, reverse=True)
    assert differences[-1] < 0.02 * differences[0]


# ---------- eora


def slow_eora(missing: Tensor, gram: Tensor, rank: int) -> Tensor:
    """As the paper has it: into the eigenspace, SVD, and back with the inverse."""
    values, basis = torch.linalg.eigh(gram)
    into = basis * values.sqrt()
    u, s, vt = torch.linalg.svd(missing @ into, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(into)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_the_correction_is_the_papers(shape):
    missing, x = normal(1, *shape), normal(2, 200, shape[1]) @ normal(3, shape[1], shape[1])
    gram = x.mT @ x / 200
    stats = Stats(tokens=200, gram=gram, mean_abs=x.abs().mean(0))
    found = EoRA().correction(missing, stats, 5)
    assert found is not None
    torch.testing.assert_close(found.left @ found.right, slow_eora(missing, gram, 5), rtol=1e-6, atol=1e-8)
    plain = EoRA(metric="svd").correction(missing, stats, 5)
    assert plain is not None
    u, s, vt = torch.linalg.svd(missing)
    torch.testing.assert_close(plain.left @ plain.right, (u[:, :5] * s[:5]) @ vt[:5], rtol=1e-8, atol=1e-10)
    scaled = EoRA(metric="diagonal").correction(missing, stats, 5)
    assert scaled is not None
    u, s, vt = torch.linalg.svd(missing * x.abs().mean(0))
    expected = (u[:, :5] * s[:5]) @ vt[:5] / x.abs().mean(0)
    torch.testing.assert_close(scaled.left @ scaled.right, expected, rtol=1e-8, atol=1e-10)


@every_base
def test_eora_loses_the_least_of_every_layer_at_equal_bytes(base):
    sizes, losses = set(), []
    for metric in METRICS:
        dense, outcome = made("eora", base=base, metric=metric, group_size=4, keep=0.95)
        grams = measure(dense, outcome.walk, IDS, frozenset({Stat.GRAM}))
        sizes.add(sum(placed.size("bytes") for placed in outcome.placed.values()))
        losses.append(
            [
                loss(weight - packed.dense_weight().double(), grams[name].get(Stat.GRAM))
                for name, weight, packed in layers_of(dense, outcome)
            ]
        )
    assert len(sizes) == 1
    eora, *others = losses
    assert all(best <= other * (1 + 1e-6) for rest in others for best, other in zip(eora, rest, strict=True))
    assert all(sum(eora) < sum(rest) for rest in others)


@every_base
def test_the_base_alone_at_the_bytes_it_takes_and_the_weight_itself_at_full_rank(base):
    method = EoRA(base=base, group_size=4, search=False)
    dense = tiny("llama-gqa-bias")
    walk = find_layers(dense)
    share = method.bases(walk).total / (2 * walk.numbers)
    outcome = compress_model(dense, method, share, IDS)
    assert {packed.correction for _, _, packed in layers_of(dense, outcome)} == {0}
    assert sum(placed.size("bytes") for placed in outcome.placed.values()) == method.bases(walk).total
    layer = walk.layers[0]
    weight = weight_of(dense.get_submodule(layer.name)).detach().double()
    stats = measure(dense, walk, IDS, method.needs)[layer.name]
    store = method.store_of(weight, stats, torch.float64).matrix().detach()
    whole = method.correction(weight - store, stats, min(weight.shape))
    assert whole is not None
    torch.testing.assert_close(store + whole.left @ whole.right, weight, rtol=0, atol=1e-9)


def test_ranks_are_equal_and_use_up_what_there_is():
    dense, outcome = made("eora", keep=0.7, base="rtn3")
    ranks = [packed.correction for _, _, packed in layers_of(dense, outcome)]
    assert min(ranks) >= 1
    assert max(ranks) - min(ranks) <= 1
    used = sum(placed.size("bytes") for placed in outcome.placed.values())
    smallest = 2 * min(layer.outputs + layer.inputs for layer in outcome.walk.layers)
    assert 0 <= int(0.7 * 2 * outcome.walk.numbers) - used < smallest


def test_rounded_values_of_a_pruned_weight_cost_a_quarter():
    dense, outcome = made("eora", keep=0.6, base="2:4+rtn4")
    entry = layers_of(dense, outcome)[0][2].entry()["base"]
    assert entry["kind"] == "half"
    assert entry["values"] == {"kind": "uniform", "bits": 4, "group_size": 8, "symmetric": False}
    _, packed = layers_of(dense, outcome)[0][1:]
    zeros = (packed.base.matrix() == 0).reshape(-1, 4).sum(1)
    assert int(zeros.min()) >= 2


def test_wanda_and_sparsegpt_choose_differently():
    one, other = (made("eora", base="2:4", pruner=pruner)[1].model.state_dict() for pruner in ("wanda", "sparsegpt"))
    assert any(not torch.equal(one[key], other[key]) for key in one if key.endswith("places"))


# ---------- refused


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rtn", {"bits": 5}, "method rtn: bits must be one of 2, 3, 4, 8, got 5"),
        ("gptq", {"bits": 0}, "method gptq: bits must be one of"),
        ("rtn", {"group_size": -1}, "method rtn: group_size must be in"),
        ("gptq", {"damping": 0.0}, "method gptq: damping must be in"),
        ("gptq", {"symmetric": 1}, "option symmetric takes bool"),
        ("eora", {"base": "rtn5"}, "method eora: base must be one of rtn2"),
        ("eora", {"metric": "fisher"}, "method eora: metric must be one of eora, svd, diagonal"),
        ("eora", {"pruner": "magnitude"}, "method eora: pruner must be one of"),
    ],
)
def test_options_out_of_range_are_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        make_method(name, options=options)


@pytest.mark.parametrize("name", ["rtn", "gptq", "eora"])
def test_a_group_size_that_divides_no_layer_is_refused_with_those_that_do(name):
    with pytest.raises(
        UsageError, match=r"group_size 7 does not divide the 32 inputs of model\.layers\.0.* 4, 8, 16, 32 would"
    ):
        made(name, group_size=7)


def test_a_budget_below_the_bits_is_refused_with_what_they_take():
    with pytest.raises(
        UsageError, match=r"rtn with bits=4, group_size=8, symmetric=True stores .* 0\.3\d+ of what they"
    ):
        made("rtn", keep=0.3, bits=4, symmetric=True)
    with pytest.raises(UsageError, match=r"eora with base=2:4.* keep 0\.5 allows .*Pass --keep 0\.5\d+ or more"):
        made("eora", keep=0.5, base="2:4")


def test_what_the_message_says_is_enough():
    with pytest.raises(UsageError) as refused:
        made("rtn", keep=0.1, bits=3)
    keep = float(str(refused.value).split("Pass --keep ")[1].split()[0])
    assert made("rtn", keep=keep, bits=3)[1].placed


def test_pruning_by_fours_needs_fours():
    dense = tiny(
        "llama", hidden_size=36, num_attention_heads=2, num_key_value_heads=2, head_dim=18, intermediate_size=50
    )
    with pytest.raises(UsageError, match=r"base 2:4 needs fours of inputs; .*down_proj has 50"):
        compress_model(dense, EoRA(base="2:4"), 0.9, IDS)


def test_statistics_that_are_not_finite_name_their_layer():
    dense = tiny("llama")
    layer = find_layers(dense).layers[0]
    stats = Stats(tokens=4, gram=torch.full((layer.inputs, layer.inputs), torch.nan, dtype=torch.float64))
    method = make_method("gptq", options={"group_size": 8})
    with pytest.raises(NumericalError, match=rf"{layer.name}: its statistics hold NaN or Inf"):
        method._packed(dense.get_submodule(layer.name), layer, stats, 0)  # pyright: ignore[reportAttributeAccessIssue]


# ---------- a whole run


def test_a_run_counts_bytes_and_its_folder_stays_packed(tmp_path):
    """The fresh process that reloads is `run`'s own test; here the folder is loaded in this one."""
    model = small_model(tmp_path / "model")
    asked = {"calib_windows": 4, "calib_length": 32, "eval": "none", "device": "cpu", "dtype": "bfloat16"}
    request = Request(model=str(model), keep=0.5, method="eora", options={"group_size": 8, "base": "rtn4"}, **asked)
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        done = run(request, tmp_path / "out")
    stored = done.report["stored"]
    assert stored["keep_unit"] == "bytes"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stored in the form `packed`" in card
    sizes = f"{2 * stored['linear_numbers_dense']:,} | {stored['linear_counted']:,}"
    assert f"| bytes in decoder linears, at 16 bits | {sizes} |" in card
    assert 0.45 < stored["keep"] <= 0.5
    assert stored["linear_bytes"] == pytest.approx(stored["keep"] * 2 * stored["linear_numbers_dense"])
    loaded = load_model(resolve(str(tmp_path / "out")), torch.device("cpu"), torch.float32)
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == len(done.outcome.walk.layers)
    before = sum(module.counted_bytes for module in packed)
    logits_of(loaded, token_ids(1, 8))
    assert sum(t.nbytes for m in packed for t in m.state_dict().values()) <= 2 * before
    plan = estimate(
        resolve(str(model)),
        request.check(),
        request,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert plan["linear_bytes"]["after"] == pytest.approx(stored["linear_bytes"], abs=2)
