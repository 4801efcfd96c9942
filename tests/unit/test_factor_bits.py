"""Low-rank layers in few bits on whole small models: `factor_bits` from the request to the folder, and its refusals."""

import json
from typing import Any
from unittest import mock

import pytest
import torch

import spectrim
from command_line import QUICK, call, hashes, small_model, small_text
from memory_checkpoint import MemoryCheckpoint
from spectrim import job
from spectrim.engines import quantise_factors as engine
from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.engines.quantise_factors import group_of, quantise_behind, quantise_factors, quantise_layer
from spectrim.errors import NumericalError, UsageError
from spectrim.job import Request, run
from spectrim.linalg.columns import gptq
from spectrim.linalg.quantise import dequantise
from spectrim.linalg.solver import SolverError
from spectrim.models.load import load_model, resolve
from spectrim.models.walk import weight_of
from spectrim.nn.linears import LowRankLinear
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QUANTISED, QuantisedFactorLinear, QuantisedLinear
from spectrim.nn.stores_uniform import UniformStore
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
GRAM = frozenset({Stat.GRAM})
both_storages = pytest.mark.parametrize("storage", ["factor", "pivot"])


def made(
    bits: int | None = 4, method: str = "svd-llm", keep: float = 0.8, architecture: str = "llama-gqa-bias", **more: Any
) -> Outcome:
    options = {"storage": more.pop("storage")} if "storage" in more else {}
    return compress_model(
        tiny(architecture), make_method(method, options=options | more.pop("options", {})), keep, IDS,
        factor_bits=bits, factor_group_size=16, gradient_windows=4, **more,
    )  # fmt: skip


def layers_of(outcome: Outcome) -> dict[str, Any]:
    return {layer.name: outcome.model.get_submodule(layer.name) for layer in outcome.walk.layers}


# ---------- what becomes of the layers


@both_storages
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt", "qwen3-moe"])
def test_every_layer_is_in_codes_and_the_numbers_are_those_of_before(architecture, storage):
    outcome, before = (made(bits, architecture=architecture, storage=storage) for bits in (4, None))
    for name, layer in layers_of(outcome).items():
        was = before.placed[name]
        assert outcome.placed[name].numbers == was.numbers
        codec = {"dense": "packed"}.get(was.codec, f"quantised-{was.codec}")
        assert (layer.codec, layer.rank, layer.has_bias) == (codec, was.rank, was.bias is not None)
        if was.bias is not None:
            assert torch.equal(layer.bias, was.bias)
        stores = layer.stores.values() if isinstance(layer, QuantisedLinear) else [layer.base]
        assert all(isinstance(store, UniformStore) and store.bits == 4 for store in stores)
    assert outcome.factor_quantization == (4, 16)


@both_storages
def test_more_bits_are_closer_to_the_model_of_before(storage):
    before = logits_of(made(None, storage=storage).model, IDS)
    lost = [float((logits_of(made(bits, storage=storage).model, IDS) - before).abs().mean()) for bits in (3, 4, 8)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 0.1 * lost[0]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("soco", {"newton": 1, "steps": 0, "coupling": "none"}),
        ("soco", {"steps": 2, "batch_size": 2, "coupling": "none"}),
        ("acip", {"steps": 4, "batch_size": 2, "adapter_rank": 2}),
        ("lpaf", {"prune_steps": 1, "mixed_steps": 1, "batch_size": 2}),
        ("lord", {}),
    ],
)
def test_methods_of_all_kinds_can_be_quantised(method, options):
    outcome, before = (made(bits, method, options=options) for bits in (8, None))
    assert {layer.codec for layer in layers_of(outcome).values()} <= {*QUANTISED, "packed"}
    found, expected = logits_of(outcome.model, IDS), logits_of(before.model, IDS)
    assert float((found - expected).square().mean()) < 1e-3 * float(expected.square().mean())


def test_layers_that_stayed_dense_are_what_gptq_makes_of_them():
    model = tiny("llama")
    outcome = made(None, architecture="llama", keep=1.0)
    stats = measure(model, outcome.walk, IDS, GRAM)
    quantise_factors(model, outcome.walk, stats, 4, group_size=16)
    for name, layer in layers_of(outcome).items():
        packed, weight = model.get_submodule(name), weight_of(layer).detach().double()
        assert isinstance(packed, PackedLinear)
        rounded = gptq(weight, stats[name].get(Stat.GRAM), 4, 16, symmetric=False, search=True)
        assert torch.equal(packed.dense_weight(), dequantise(rounded, 4, torch.float32))


@both_storages
def test_outputs_lose_less_than_when_each_part_is_rounded_for_itself(storage):
    before = made(None, storage=storage, keep=0.6)
    stats = measure(before.model, before.walk, IDS, GRAM)
    ours = plain = 0.0
    for name, layer in layers_of(before).items():
        gram, weight = stats[name].get(Stat.GRAM), layer.dense_weight().double()
        lost = quantise_layer(layer, gram, 3, 16).dense_weight().double() - weight
        ours += float((lost @ gram * lost).sum())
        parts = [layer.V, layer.U] if isinstance(layer, LowRankLinear) else [layer.pivot, layer.rest]
        kept = [part.weight.detach().clone() for part in parts]
        first = parts[0].weight.detach().double()
        for part, moment in zip(parts, (gram, first @ gram @ first.mT), strict=True):
            wide = part.weight.detach().double()
            rounded = gptq(wide, moment, 3, group_of(wide.shape[1], 16), symmetric=False, search=True)
            part.weight.data = dequantise(rounded, 3, torch.float32)
        lost = layer.dense_weight().double() - weight
        plain += float((lost @ gram * lost).sum())
        for part, was in zip(parts, kept, strict=True):
            part.weight.data = was
    assert ours < 0.9 * plain


def test_a_block_is_calibrated_behind_the_quantised_blocks_before_it():
    once, behind = (made(None, storage="factor", architecture="llama") for _ in range(2))
    quantise_factors(once.model, once.walk, measure(once.model, once.walk, IDS, GRAM), 3, group_size=16)
    quantise_behind(behind.model, behind.walk, IDS, 3, group_size=16)
    first, second = once.model.state_dict(), behind.model.state_dict()
    codes = [key for key in first if key.endswith("codes")]
    # Their statistics are added up over the same batches, so even the rounding of sums is the same.
    assert all(torch.equal(first[key], second[key]) for key in codes if ".layers.0." in key)
    assert any(not torch.equal(first[key], second[key]) for key in codes if ".layers.1." in key)


def test_bits_may_differ_by_layer_and_layers_may_be_left_out():
    outcome = made(None, storage="factor")
    names = list(layers_of(outcome))
    stats = measure(outcome.model, outcome.walk, IDS, GRAM)
    quantise_factors(outcome.model, outcome.walk, stats, {names[0]: 3, names[1]: 8}, group_size=16)
    found = layers_of(outcome)
    for name, bits in ((names[0], 3), (names[1], 8)):
        layer = found[name]
        assert isinstance(layer, QuantisedFactorLinear)
        assert {store.entry()["bits"] for store in layer.stores.values()} == {bits}
    assert all(not isinstance(found[name], QuantisedLinear | PackedLinear) for name in names[2:])


@both_storages
def test_gradients_of_the_outputs_are_used_where_they_were_measured(storage):
    outcome = made(None, storage=storage, keep=0.6)
    both = measure(outcome.model, outcome.walk, IDS, GRAM | {Stat.OUTPUT_GRAD})
    weighed = even = 0.0
    for name, layer in layers_of(outcome).items():
        gram, outputs = both[name].get(Stat.GRAM), both[name].get(Stat.OUTPUT_GRAD)
        weight = layer.dense_weight().double()
        for metric in (outputs, None):
            lost = quantise_layer(layer, gram, 3, 16, outputs=metric).dense_weight().double() - weight
            error = float((outputs @ lost @ gram * lost).sum())
            weighed, even = (weighed + error, even) if metric is not None else (weighed, even + error)
    assert weighed < even


@pytest.mark.parametrize(
    ("inputs", "asked", "found"),
    [(256, 128, 128), (96, 128, 96), (157, 128, 0), (150, 128, 75), (62, 128, 62), (8, 128, 0), (32, 0, 0), (7, 4, 1)],
)
def test_groups_of_the_rank_dimension(inputs, asked, found):
    assert group_of(inputs, asked) == found


# ---------- the same again, and after a failure


def test_it_is_deterministic_and_a_run_that_goes_on_gives_the_same():
    checkpoint = MemoryCheckpoint(every=1, closed=True)
    first, again, other = (
        made(4, storage="pivot", recovery=("refit",), checkpoint=kept).model.state_dict()
        for kept in (checkpoint, checkpoint, None)
    )
    assert checkpoint.states
    for key, tensor in first.items():
        assert torch.equal(tensor, again[key]), key
        assert torch.equal(tensor, other[key]), key


def test_the_dense_model_is_not_changed():
    dense = tiny("llama")
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    compress_model(dense, make_method("svd-llm"), 1.0, IDS, factor_bits=4, factor_group_size=16)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dense.state_dict().items())


def test_a_layer_that_cannot_be_solved_is_named_and_the_model_is_as_it_was():
    outcome = made(None)
    before = layers_of(outcome)
    name = list(before)[3]
    real = engine.quantise_layer

    def fail(module: Any, *given: Any, **more: Any) -> Any:
        if module is before[name]:
            raise SolverError("Cholesky failed", torch.zeros(1))
        return real(module, *given, **more)

    with mock.patch.object(engine, "quantise_layer", fail), pytest.raises(NumericalError, match=rf"^{name}: Cholesky"):
        quantise_behind(outcome.model, outcome.walk, IDS, 4, group_size=16)
    assert all(layer is before[name] for name, layer in layers_of(outcome).items())


def test_scales_and_statistics_that_are_not_finite_name_the_layer():
    outcome = made(None, storage="factor")
    stats = measure(outcome.model, outcome.walk, IDS, GRAM)
    name = next(n for n, layer in layers_of(outcome).items() if isinstance(layer, LowRankLinear))
    bad = stats[name].get(Stat.GRAM) * torch.nan
    with pytest.raises(NumericalError, match=rf"{name}: its statistics hold NaN or Inf"):
        quantise_factors(outcome.model, outcome.walk, {name: Stats(tokens=4, gram=bad)}, 4, group_size=16)
    layer = outcome.model.get_submodule(name)
    assert isinstance(layer, LowRankLinear)
    layer.V.weight.data[0, 0] = torch.inf
    with pytest.raises(NumericalError, match=rf"{name}: its V.weight hold NaN or Inf"):
        quantise_factors(outcome.model, outcome.walk, stats, 4, group_size=16)


# ---------- what is refused


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"factor_bits": 5}, "factor_bits must be one of 8, 4, 3, got 5"),
        ({"factor_bits": 4, "factor_group_size": -1}, "factor_group_size must be at least 0"),
        ({"factor_bits": 4, "method": "gptq"}, "method gptq: factor_bits quantise .* its layers are packed"),
        ({"factor_bits": 4, "method": "slicegpt"}, "its layers are plain ones"),
        ({"factor_bits": 4, "method": "dsformer"}, "its layers are semi-sparse"),
        ({"factor_bits": 4, "method": "basis-sharing"}, "its layers are factor, shared"),
        ({"factor_bits": 4, "any_size": True}, "leave --factor-bits out with --any-size"),
    ],
)
def test_requests_that_cannot_be_are_refused_without_a_model(request_, says):
    with pytest.raises(UsageError, match=says):
        Request(**{"model": "none", "keep": 0.8, "method": "soco", **request_}).check()


def test_the_engine_refuses_the_same():
    with pytest.raises(UsageError, match="its layers are packed"):
        made(4, "rtn", options={"group_size": 8})
    with pytest.raises(UsageError, match=r"factor_group_size 5 does not divide the 32 inputs of model\.layers\.0"):
        compress_model(tiny("llama"), make_method("svd"), 0.8, IDS, factor_bits=4, factor_group_size=5)
    with pytest.raises(UsageError, match="factor_bits must be one of"):
        made(2)


# ---------- whole runs


@both_storages
def test_the_folder_is_packed_loads_and_says_what_it_is(tmp_path, storage):
    """The fresh process that reloads is `run`'s own test; here the folder is loaded in this one."""
    asked = {"calib": str(small_text(tmp_path / "text.txt")), "calib_windows": 4, "calib_length": 32, "eval": "none"}
    request = Request(
        model=str(small_model(tmp_path / "model")), keep=0.6, method="svd-llm", options={"storage": storage},
        dtype="bfloat16", factor_bits=4, factor_group_size=16, **asked,
    )  # fmt: skip
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        done = run(request, tmp_path / "out")
    stored, out = done.report["stored"], tmp_path / "out"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["factor_quantization"] == done.report["factor_quantization"] == {"bits": 4, "group_size": 16}
    assert {entry["codec"] for entry in config["modules"].values()} <= {f"quantised-{storage}", "packed"}
    assert {row["codec"] for row in done.report["layers"]} == {entry["codec"] for entry in config["modules"].values()}
    assert 0.5 < stored["keep"] <= 0.6
    assert stored["linear_numbers"] == sum(row["numbers"] for row in done.report["layers"])
    assert stored["keep_bytes"] == stored["linear_bytes"] / (2 * stored["linear_numbers_dense"])
    assert 0.25 * stored["keep"] < stored["keep_bytes"] < 0.45 * stored["keep"]
    assert f"{stored['linear_bytes_counted']:,} ({stored['keep_bytes']:.4f})" in (out / "README.md").read_text()
    loaded = load_model(resolve(str(out)), torch.device("cpu"), torch.float32)
    codes = [m for m in loaded.modules() if isinstance(m, QuantisedLinear | PackedLinear)]
    assert len(codes) == len(done.outcome.walk.layers)
    counted = sum(module.counted_bytes for module in codes)
    assert counted == stored["linear_bytes_counted"]
    ids = torch.arange(8)[None] * 61
    ours, theirs = (m.float()(input_ids=ids, use_cache=False).logits for m in (done.model, loaded))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_from_the_command_line_to_a_dense_folder(tmp_path):
    model, text = small_model(tmp_path / "model"), small_text(tmp_path / "text.txt")
    common = ("--calib", text, *QUICK, "--eval", text, "--keep", "0.7", "--method", "svd-llm", "--dtype", "bfloat16")
    bits = ("--factor-bits", "4", "--factor-group-size", "16")
    answer = call("compress", model, *common, *bits, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["request"]["factor_bits"] == 4
    assert answer.json["reload"]["relative_logit_difference"] <= 1e-3
    shown = call("inspect", tmp_path / "out", "--no-spectrum")
    assert shown.code == 0
    assert f"keep {answer.json['stored']['keep_bytes']:.4f} of" in shown.out
    assert "quantised-factor" in call("inspect", tmp_path / "out", "--json").out
    dense = call("export", tmp_path / "out", "--out", tmp_path / "dense", "--json")
    assert dense.code == 0, dense.err
    judged = ("--text", text, "--windows", "2", "--length", "64", "--no-speed", "--json")
    ours, multiplied = (call("eval", tmp_path / where, *judged).json["model"] for where in ("out", "dense"))
    assert ours["perplexity"] == pytest.approx(multiplied["perplexity"], rel=0.02)


def test_mistakes_exit_with_2_and_write_nothing(tmp_path):
    model = small_model(tmp_path / "model")
    before = hashes(tmp_path)
    for words, says in (
        (("--factor-bits", "6"), "must be one of 8, 4, 3, got 6"),
        (("--factor-bits", "4", "--factor-group-size", "7"), "factor_group_size 7 does not divide the 32 inputs"),
        (("--factor-bits", "4", "--method", "rtn"), "its layers are packed"),
    ):
        answer = call("compress", model, "--out", tmp_path / "out", *words)
        assert answer.code == 2
        assert says in answer.message
    assert hashes(tmp_path) == before


def test_the_python_interface_takes_them_in_memory_too():
    small = spectrim.compress(
        tiny("llama"), keep=0.8, method="svd-llm", calibration=IDS, factor_bits=4, factor_group_size=16
    )
    assert small.report["factor_quantization"]["factor_bits"] == 4
    assert any(isinstance(module, QuantisedFactorLinear) for module in small.model.modules())
