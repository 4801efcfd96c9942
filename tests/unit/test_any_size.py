"""Folders that hold all sizes: slices against dedicated runs, budgets, loading, exporting, and what is refused."""

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import spectrim
from command_line import PLAIN, QUICK, call, small_model, small_text
from spectrim.engines import descent
from spectrim.engines.any_size import AnySize, build, compress_any_size
from spectrim.engines.layerwise import apply_plan
from spectrim.engines.learned import skeleton
from spectrim.engines.order import closed_order
from spectrim.engines.pipeline import closed_form
from spectrim.engines.ranks import plan_ranks
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.integrations import any_size as format_side
from spectrim.integrations import folder as folder_side
from spectrim.integrations.export import export_dense, export_size
from spectrim.integrations.folder import copy_in, write_nested
from spectrim.linalg.factor import Spectrum
from spectrim.linalg.ladder import are_levels
from spectrim.method import LearnedMethod
from spectrim.models.load import load_model, resolve
from spectrim.models.walk import find_layers
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.nested import NestedLinear
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids, transformers_alone

ANCHORS = (0.9, 0.6, 0.4)
GRID = [0.4 + 0.6 * k / 24 for k in range(25)]
ARCHITECTURES = ["llama", "llama-gqa-bias", "gpt2"]
IDS = token_ids(3, 12, seed=2)
QUERY = "model.layers.0.self_attn.q_proj"


@functools.lru_cache
def sizes_of(
    architecture: str, method: str = "two-sided", dtype: torch.dtype = torch.float32, **options: Any
) -> AnySize:
    method_ = make_method(method, options.pop("preset", None), options)
    return compress_any_size(tiny(architecture), method_, token_ids(8), anchors=ANCHORS, dtype=dtype)


def written(sizes: AnySize, folder: Path, *, dtype: torch.dtype = torch.float32, default: float = 0.6) -> Path:
    folder.mkdir(exist_ok=True)
    write_nested(folder, sizes, dtype, default, None, "tiny")
    return folder


@pytest.fixture(scope="module")
def sizes() -> AnySize:
    """GQA with biases, pivot storage, stored in bfloat16."""
    return sizes_of("llama-gqa-bias", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def folder(sizes: AnySize, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(sizes, tmp_path_factory.mktemp("any-size") / "model", dtype=torch.bfloat16)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def load(folder: Path, size: Any = None, **kwargs: Any) -> Any:
    if size is not None:
        kwargs["size_ratio"] = size
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def same(one: Any, other: Any) -> None:
    """Bit for bit, names and all."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# A slice is what a run for that size makes of the same spectra


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["pivot", "factor"])
@pytest.mark.parametrize("method", ["svd", "two-sided"])
def test_a_slice_is_the_dedicated_closed_form_of_the_same_spectra(architecture, storage, method):
    sizes = sizes_of(architecture, method, storage=storage)
    spectra = {n: Spectrum(la.left.double().mT, la.right.double(), la.left[:, 0]) for n, la in sizes.layers.items()}
    low_rank = 0
    for size in (0.4, 0.8):
        plan, found = sizes.plan(size), sizes.at(size)
        dedicated = skeleton(sizes.dense)
        apply_plan(dedicated, sizes.walk, plan, spectra)
        for layer in sizes.walk.layers:
            target, mine = plan.targets[layer.name], found.get_submodule(layer.name)
            theirs = dedicated.get_submodule(layer.name)
            assert type(mine) is type(theirs)
            if target.codec == "pivot":
                same(mine, theirs)
            elif target.codec == "factor":
                nested = sizes.layers[layer.name]
                assert isinstance(mine, LowRankLinear)
                assert torch.equal(mine.U.weight, nested.left[: target.rank].mT)
                assert torch.equal(mine.V.weight, nested.right[: target.rank])
                torch.testing.assert_close(mine.dense_weight(), theirs.dense_weight(), atol=1e-5, rtol=1e-4)
            low_rank += target.codec != "dense"
    assert low_rank >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["pivot", "factor"])
def test_at_size_one_the_model_is_the_dense_one(architecture, storage):
    sizes = sizes_of(architecture, storage=storage)
    assert {target.codec for target in sizes.plan(1.0).targets.values()} == {"dense"}
    torch.testing.assert_close(logits_of(sizes.at(1.0), IDS), logits_of(sizes.dense, IDS), atol=1e-4, rtol=1e-4)


def closed(architecture: str, **options: Any) -> tuple[Any, Any, Any]:
    """Method, walk and spectra, measured at one size, with nothing rounded."""
    dense, method = tiny(architecture), make_method("two-sided", None, options)
    walk = find_layers(dense)
    spectra, _, _ = closed_form(
        dense, method, walk, 0.6, token_ids(8), gradient_windows=8, seed=0, clock={}, progress=None
    )
    return dense, method, (walk, spectra)


@pytest.mark.parametrize("storage", ["pivot", "factor"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_the_one_order_costs_little_error_over_ranks_chosen_for_each_size(storage, allocation):
    """Ranks of a run for one size spend the left-over numbers freely; a prefix of one order may not."""
    dense, method, (walk, spectra) = closed("llama-gqa-bias", storage=storage, allocation=allocation)
    sizes = build(dense, method, walk, closed_order(method, walk, spectra, ANCHORS), torch.float32)
    energies = {name: s.energy for name, s in spectra.items()}
    total = sum(float(e.sum()) for e in energies.values())

    def error(plan: Any) -> float:
        lost = (float(energies[n][t.rank :].sum()) for n, t in plan.targets.items() if t.codec != "dense")
        return sum(lost) / total

    for size in (0.4, 0.5, 0.65, 0.8, 0.9):
        mine, theirs = error(sizes.plan(size)), error(plan_ranks(method, walk, energies, size))
        assert mine <= theirs * 1.15 + 0.005, size


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounding_components_costs_about_what_rounding_the_weight_does(architecture):
    """Errors of rounded components add up; they would be far above those of the weight if components cancelled."""
    sizes = sizes_of(architecture)
    for name, nested in sizes.layers.items():
        norms = nested.left.norm(dim=1), nested.right.norm(dim=1)
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-6)
        whole = (nested.left.mT @ nested.right).square().sum()
        assert float((norms[0] * norms[1]).square().sum() / whole) < 2, name


# Budgets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["pivot", "factor"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_ranks_grow_with_the_size_and_every_budget_is_met(architecture, storage, allocation):
    sizes = sizes_of(architecture, storage=storage, allocation=allocation)
    largest_step = max(layer.outputs + layer.inputs for layer in sizes.walk.layers)
    before = dict.fromkeys(sizes.layers, 0)
    for size in GRID:
        plan = sizes.plan(size)
        assert size * sizes.walk.numbers - largest_step - 1 < plan.numbers_after <= size * sizes.walk.numbers
        ranks = {name: target.rank for name, target in plan.targets.items()}
        assert all(ranks[name] >= before[name] for name in ranks)
        before = ranks
    model = sizes.at(0.6)
    stored = sum(p.numel() for n in sizes.layers for p in model.get_submodule(n).state_dict().values())
    assert stored == sizes.plan(0.6).numbers_after
    assert before == {layer.name: min(layer.outputs, layer.inputs) for layer in sizes.walk.layers}


# Loading


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("storage", ["pivot", "factor"])
def test_loading_a_size_is_bitwise_what_export_writes(architecture, storage, tmp_path):
    sizes = sizes_of(architecture, storage=storage, dtype=torch.bfloat16)
    folder = written(sizes, tmp_path / "all", dtype=torch.bfloat16)
    for size in (0.45, 0.8):
        loaded = load(folder, size)
        facts = export_size(resolve(str(folder)), tmp_path / f"{size}", size=size)
        plain = load(tmp_path / f"{size}")
        same(loaded, plain)
        assert torch.equal(logits_of(loaded, IDS), logits_of(plain, IDS))
        same(loaded, copy_in(sizes.at(size), torch.bfloat16))
        assert facts["stored"]["linear_numbers"] == sizes.plan(size).numbers_after
        assert facts["stored"]["keep"] <= size
        config = json.loads((tmp_path / f"{size}" / "config.json").read_text())
        assert "size_ratio" not in config
        assert "any_size" not in config["quantization_config"]
        # In another dtype than the stored one the two stay the same as well.
        same(load(folder, size, dtype=torch.float32), load(tmp_path / f"{size}", dtype=torch.float32))


def test_without_a_size_the_default_one_is_loaded(folder):
    same(load(folder), load(folder, 0.6))
    with pytest.raises(AssertionError):
        same(load(folder), load(folder, 0.7))


def test_a_loaded_size_saves_as_an_ordinary_folder(folder, tmp_path):
    loaded = load(folder, 0.5)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    same(loaded, again)
    config = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert {entry["codec"] for entry in config["modules"].values()} == {"pivot"}
    assert config["size_ratio"] == 0.5
    with pytest.raises(TypeError, match="size_ratio"):
        load(tmp_path / "again", 0.5)


def test_loading_is_silent_and_leaves_the_random_state_alone(folder, capfd, recwarn):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    _, info = load(folder, 0.5, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "MISSING" not in capfd.readouterr().err
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_the_slice_is_read(folder, monkeypatch):
    """No factor is read whole, and what is read is what the ranks ask for."""
    read: dict[str, int] = {}

    def note(self: Any, path: str, key: str, rows: int | None = None) -> torch.Tensor:
        tensor = original(self, path, key, rows)
        read[f"{path}.{key}"] = tensor.numel()
        assert rows is not None or key not in ("left", "right")
        return tensor

    original = format_side.Slices._read
    monkeypatch.setattr(format_side.Slices, "_read", note)
    entries = load(folder, 0.4).config.quantization_config.modules
    stored = load_file(folder / "model.safetensors")
    for path, entry in entries.items():
        for key in ("left", "right"):
            assert read[f"{path}.{key}"] == entry["rank"] * stored[f"{path}.{key}"].shape[1]
            assert read[f"{path}.{key}"] < stored[f"{path}.{key}"].numel()


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder, device_map):
    same(load(folder, 0.5, device_map=device_map), load(folder, 0.5))


def test_offloaded_layers_are_refused_with_the_way_out(folder, tmp_path):
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(InputError, match=r"export --keep 0\.5"):
        load(folder, 0.5, device_map=device_map, offload_folder=tmp_path / "offloaded")


def test_a_headless_load_gives_the_same_layers(folder):
    headless, whole = AutoModel.from_pretrained(folder, size_ratio=0.5), load(folder, 0.5)
    same(headless, whole.model)


def test_sharded_files_load(sizes, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_side, "MAX_SHARD_SIZE", "20KB")
    sharded = written(sizes, tmp_path / "shards", dtype=torch.bfloat16)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    same(load(sharded, 0.7), load(folder, 0.7))


def test_export_dense_multiplies_the_size_back(folder, tmp_path):
    export_dense(resolve(str(folder)), tmp_path / "dense", size=0.5)
    dense, small = load(tmp_path / "dense", dtype=torch.float32), load(folder, 0.5, dtype=torch.float32)
    assert not [m for m in dense.modules() if isinstance(m, LowRankLinear | PivotLinear)]
    torch.testing.assert_close(logits_of(dense, IDS), logits_of(small, IDS), atol=0.05, rtol=0.05)


def test_the_stored_layer_itself_computes_the_whole_weight(sizes):
    nested = sizes_of("llama-gqa-bias").layers[QUERY]
    layer = NestedLinear(nested.left, nested.right, nested.scores, nested.levels, nested.bias)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), sizes.dense.get_submodule(QUERY)(x), atol=1e-4, rtol=1e-4)


# What is refused


@pytest.mark.parametrize("size", [0.399, 1.01, 0.0, -0.5, math.nan, math.inf, True, "0.5", [0.5]], ids=repr)
def test_a_size_that_the_folder_does_not_hold_is_refused_with_the_range(folder, size):
    with pytest.raises(UsageError, match=r"from 0\.4 to 1"):
        load(folder, size)


def test_a_size_of_a_folder_with_one_size_is_refused(folder, tmp_path):
    export_size(resolve(str(folder)), tmp_path / "one", size=0.5)
    with pytest.raises(UsageError, match="holds one size only"):
        load_model(resolve(str(tmp_path / "one")), torch.device("cpu"), size=0.5)


@pytest.mark.fault(71)
def test_a_load_without_spectrim_fails_loudly(folder):
    with transformers_alone(), pytest.raises(RuntimeError) as refused:
        AutoModelForCausalLM.from_pretrained(folder, size_ratio=0.5)
    assert "ignore_mismatched_sizes" in str(refused.value)


Edit = Callable[[dict[str, Any]], Any]
BAD_CONFIGS: dict[str, Edit] = {
    "storage": lambda q: q["any_size"].update(storage="zip"),
    "anchors-ascend": lambda q: q["any_size"].update(anchors=[1.0, 0.4, 0.6]),
    "anchors-start": lambda q: q["any_size"].update(anchors=[0.9, 0.6, 0.4, 0.3]),
    "anchors-zero": lambda q: q["any_size"].update(anchors=[1.0, 0.9, 0.6, 0.0]),
    "anchors-text": lambda q: q["any_size"].update(anchors=[1.0, "0.9", 0.6, 0.4]),
    "anchors-true": lambda q: q["any_size"].update(anchors=[True, 0.9, 0.6, 0.4]),
    "anchors-none": lambda q: q["any_size"].pop("anchors"),
    "anchors-fewer": lambda q: q["any_size"]["anchors"].pop(),
    "modules-empty": lambda q: q["modules"].clear(),
    "any-size-list": lambda q: q.update(any_size=[1]),
    "any-size-gone": lambda q: q.pop("any_size"),
    "storage-other": lambda q: q["any_size"].update(storage="factor"),
    "rank": lambda q: q["modules"][QUERY].update(rank=31),
    "codec": lambda q: q["modules"][QUERY].update(codec="pivot"),
    "bias": lambda q: q["modules"][QUERY].update(bias=False),
    "layer-gone": lambda q: q["modules"].pop(QUERY),
    "layer-unknown": lambda q: q["modules"].update({"model.layers.7.mlp.up_proj": q["modules"][QUERY]}),
    "layer-not-linear": lambda q: q["modules"].update({"model.norm": q["modules"][QUERY]}),
}


@pytest.mark.fault(9, 70)
@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_damaged_config_is_refused(copied, name):
    config = json.loads((copied / "config.json").read_text())
    BAD_CONFIGS[name](config["quantization_config"])
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load(copied, 0.8)


def test_a_default_size_that_is_no_size_is_refused(copied):
    for value in ("0.5", None, 7, math.nan):
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps({**config, "size_ratio": value}))
        with pytest.raises(UsageError, match=r"from 0\.4 to 1"):
            load(copied)


def swapped_levels(t: dict[str, torch.Tensor]) -> None:
    t[f"{QUERY}.levels"] = t[f"{QUERY}.levels"].flip(0)


def repeated_levels(t: dict[str, torch.Tensor]) -> None:
    t[f"{QUERY}.levels"][1:] = t[f"{QUERY}.levels"][:-1].clone()


BAD_TENSORS: dict[str, tuple[Edit, type[Exception], str]] = {
    "levels-swapped": (swapped_levels, InputError, "one order"),
    "levels-repeated": (repeated_levels, InputError, "one order"),
    "levels-float": (lambda t: t.update({f"{QUERY}.levels": t[f"{QUERY}.levels"].float()}), InputError, "I32"),
    "left-int": (lambda t: t.update({f"{QUERY}.left": t[f"{QUERY}.left"].int()}), InputError, "expected F32 or"),
    "scores-half": (lambda t: t.update({f"{QUERY}.scores": t[f"{QUERY}.scores"].half()}), InputError, "expected F32"),
    "levels-gone": (lambda t: t.pop(f"{QUERY}.levels"), InputError, QUERY),
    "left-gone": (lambda t: t.pop(f"{QUERY}.left"), InputError, QUERY),
    "left-short": (lambda t: t.update({f"{QUERY}.left": t[f"{QUERY}.left"][:9].clone()}), InputError, QUERY),
    "extra": (lambda t: t.update({f"{QUERY}.more": torch.ones(2)}), InputError, QUERY),
    "scores-nan": (lambda t: t[f"{QUERY}.scores"].fill_(math.nan), NumericalError, "scores"),
    "right-inf": (lambda t: t[f"{QUERY}.right"].fill_(math.inf), NumericalError, "right"),
}


@pytest.mark.fault(3, 44)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_damaged_tensors_are_refused(copied, name):
    edit, error, words = BAD_TENSORS[name]
    tensors = load_file(copied / "model.safetensors")
    edit(tensors)
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(error, match=words):
        load(copied, 0.5)


@pytest.mark.fault(68)
@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("soco", {"preset": "best"}, "distil_steps=600"),
        ("svd-llm", {"update": "sequential"}, "refit"),
    ],
)
def test_methods_that_fit_one_size_are_refused(method, options, words):
    with pytest.raises(UsageError, match=words):
        sizes_of("llama", method, **options)


@pytest.mark.parametrize("anchors", [(), (0.5, 0.6), (1.0, 0.5), (0.5, 0.0), (0.5, 0.5), (math.nan,)], ids=str)
def test_bad_anchors_are_refused(anchors):
    with pytest.raises(UsageError, match="anchors must descend"):
        compress_any_size(tiny("llama"), make_method("svd"), token_ids(2), anchors=anchors)


def test_an_anchor_below_rank_one_is_refused():
    with pytest.raises(UsageError, match="smallest reachable keep"):
        compress_any_size(tiny("llama"), make_method("svd"), token_ids(2), anchors=(0.5, 0.01))


def test_a_run_for_one_size_does_not_ignore_any_size():
    with pytest.raises(UsageError, match="run_any_size"):
        spectrim.compress("builtin:tiny", keep=0.8, method="svd", eval="none", any_size=True)


# Learning the order


def test_what_was_learned_at_an_anchor_is_what_its_slice_gives(monkeypatch):
    """At each anchor: the same components, the same weights, whatever went later; pruned components stay pruned."""
    seen: dict[float, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    original = descent.Descent.to

    def note(self: descent.Descent, size: float) -> None:
        original(self, size)
        if size in ANCHORS:
            state = {n: (layer.mask.clone(), layer.weight_now().detach()) for n, layer in self.scored.items()}
            seen[size] = state

    monkeypatch.setattr(descent.Descent, "to", note)
    method = make_method("soco", None, {"batch_size": 4, "project_every": 2, "learning_rate": 0.05})
    assert isinstance(method, LearnedMethod)
    sizes = compress_any_size(
        tiny("llama-gqa-bias"), method, token_ids(8), anchors=ANCHORS, steps=24, dtype=torch.float32
    )
    assert len(sizes.losses) == 24
    assert are_levels([nested.levels for nested in sizes.layers.values()])
    for before, after in ((0.9, 0.6), (0.6, 0.4)):
        assert all(bool((seen[after][n][0] <= seen[before][n][0]).all()) for n in seen[after])
    moved = max(float((nested.scores - 1).abs().max()) for nested in sizes.layers.values())
    assert moved > 0.01
    for size, state in seen.items():
        model, plan = sizes.at(size), sizes.plan(size)
        for name, (mask, weight) in state.items():
            assert int(mask.sum()) == plan.targets[name].rank
            module = model.get_submodule(name)
            mine = module.dense_weight() if isinstance(module, PivotLinear) else module.weight
            torch.testing.assert_close(mine, weight, atol=2e-5, rtol=1e-4)


@pytest.mark.fault(55)
def test_the_same_seed_gives_the_same_bytes():
    method = make_method("soco", None, {"batch_size": 4, "project_every": 2})
    both = [compress_any_size(tiny("llama"), method, token_ids(8), anchors=ANCHORS, steps=6) for _ in range(2)]
    for name, nested in both[0].layers.items():
        for key in ("left", "right", "scores", "levels"):
            assert torch.equal(getattr(nested, key), getattr(both[1].layers[name], key))


def test_too_few_steps_for_the_anchors_are_refused():
    with pytest.raises(UsageError, match="each needs at least one"):
        compress_any_size(tiny("llama"), make_method("soco"), token_ids(8), anchors=ANCHORS, steps=2)


# The command line


@pytest.mark.fresh_process
def test_the_command_line_from_one_run_to_one_size(tmp_path):
    model, text = small_model(tmp_path / "dense"), small_text(tmp_path / "text.txt")
    common = ("--calib", text, "--eval", text, *QUICK)
    out, one = tmp_path / "all", tmp_path / "one"
    made = call(
        "compress", model, "--any-size", "--anchors", "0.8,0.5", "--any-size-steps", "4", "--set", "batch_size=2",
        "--out", out, *common, "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    report = made.json
    assert [row["size"] for row in report["sizes"]] == [0.8, 0.5]
    assert all(row["quality"]["kl"] > 0 and row["keep"] <= row["size"] for row in report["sizes"])
    assert report["dense"]["perplexity"] > 1
    assert report["reload"]["size"] == 0.8
    card = (out / "README.md").read_text()
    assert "![size curve](size-curve.svg)" in card
    assert f"{report['sizes'][1]['quality']['perplexity']:.2f}" in card
    assert (out / "size-curve.svg").read_text().startswith("<svg")
    assert call("export", out, "--keep", "0.5", "--out", one).code == 0
    assert {"manifest.json", "report.json", "config.json", "tokenizer.json"} <= {p.name for p in one.iterdir()}
    whole = call(
        "eval", out, "--size", "0.5", "--text", text, "--windows", "2", "--length", "64", "--no-speed", "--json"
    )
    plain = call("eval", one, "--text", text, "--windows", "2", "--length", "64", "--no-speed", "--json")
    assert whole.json["model"] == plain.json["model"]
    assert whole.json["model"]["perplexity"] == pytest.approx(report["sizes"][1]["quality"]["perplexity"], rel=1e-4)
    shown = call("inspect", out, "--size", "0.5", "--no-spectrum")
    assert "holds every size from 0.5 to 1 in pivot storage" in shown.out
    assert call("generate", out, "--size", "0.5", "--prompt", "def", "--max-new-tokens", "2").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--preset", "best"], "use --preset balanced or fast"),
        (["--recover", "refit"], "leave it out with --any-size"),
        (["--keep", "0.2"], "the sizes go from 0.35 to 1"),
        (["--anchors", "0.5;0.4"], "expected sizes with commas"),
        (["--anchors", "0.5,0.6"], "must descend strictly"),
        (["--any-size-steps", "3"], "at least the number of anchors, 8"),
    ],
    ids=str,
)
def test_the_command_line_refuses_before_anything_is_read(options, words, tmp_path):
    answer = call("compress", "builtin:tiny", "--any-size", "--out", tmp_path / "out", *PLAIN, *options)
    assert answer.code == 2
    assert words in answer.message
    assert not (tmp_path / "out").exists()


def test_export_of_a_size_needs_a_folder_that_holds_it(tmp_path, folder):
    assert "known: dense, size" in call("export", folder, "--to", "zip", "--out", tmp_path / "x").message
    assert "needs --keep" in call("export", folder, "--to", "size", "--out", tmp_path / "x").message
    outside = call("export", folder, "--keep", "0.3", "--out", tmp_path / "x")
    assert outside.code == 2
    assert "from 0.4 to 1" in outside.message
    assert not (tmp_path / "x").exists()
