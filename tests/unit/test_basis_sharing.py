"""Basis sharing: against its parts, what is stored and counted, references that load and that are refused."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import spectrim
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.errors import InputError, UsageError
from spectrim.integrations.transformers import make_dense
from spectrim.linalg.shared import fitted, shared_factors
from spectrim.models.walk import find_layers, linear_at, weight_of
from spectrim.nn.linears import LowRankLinear
from spectrim.nn.shared import SharedLinear
from spectrim.registry import make_method
from spectrim.stats import Stat
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

IDS = token_ids(8, 16)
OWNER, BORROWER = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def compressed(name: str = "llama", keep: float = 0.6, layers: int = 3, **options: Any) -> Any:
    return compress_model(
        tiny(name, num_hidden_layers=layers), make_method("basis-sharing", options=options), keep, IDS
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks with biases, float32: two share, the third is alone."""
    model = tiny("llama-gqa-bias", num_hidden_layers=3)
    small = spectrim.compress(model, keep=0.6, method="basis-sharing", calibration=IDS)
    return small.save_pretrained(tmp_path_factory.mktemp("shared") / "model")


@pytest.fixture
def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


# The method


def gram_error(dense: PreTrainedModel, small: nn.Module, stats: Any, name: str) -> float:
    lost = weight_of(linear_at(dense, name)).double() - small.get_submodule(name).dense_weight().double()
    return float((lost @ stats[name].gram * lost).sum().detach())


def test_layers_hold_what_the_stacked_decomposition_gives():
    dense = tiny("llama", num_hidden_layers=2)
    stats = measure(dense, find_layers(dense), IDS, frozenset({Stat.GRAM}))
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    weights = [weight_of(linear_at(dense, name)).detach().double() for name in names]
    grams = [stats[name].get(Stat.GRAM) for name in names]
    for fit in ("pooled", "own"):
        outcome = compress_model(dense, make_method("basis-sharing", options={"fit": fit}), 0.6, IDS)
        found = shared_factors(weights, (grams[0] + grams[1]) / 2, outcome.placed[names[0]].rank)
        for name, weight, own, gram in zip(names, weights, found.coefficients, grams, strict=True):
            expected = (own if fit == "pooled" else fitted(weight, found.basis, gram)) @ found.basis
            assert torch.allclose(outcome.model.get_submodule(name).dense_weight().double(), expected, atol=1e-5)


def test_groups_of_one_are_svd_llm():
    alone, plain = compressed(group_size=1, fit="pooled"), compress_model(
        tiny("llama", num_hidden_layers=3), make_method("svd-llm"), 0.6, IDS
    )  # fmt: skip
    assert {n: (t.codec, t.rank) for n, t in alone.plan.targets.items()} == {
        n: (t.codec, t.rank) for n, t in plain.plan.targets.items()
    }
    assert torch.allclose(logits_of(alone.model, IDS), logits_of(plain.model, IDS), atol=1e-4)


def test_own_coefficients_lower_the_error_of_every_layer():
    dense = tiny("llama", num_hidden_layers=4)
    stats = measure(dense, find_layers(dense), IDS, frozenset({Stat.GRAM}))
    small = {
        fit: compress_model(dense, make_method("basis-sharing", options={"fit": fit}), 0.5, IDS).model
        for fit in ("pooled", "own")
    }
    shared = [n for n, m in small["own"].named_modules() if isinstance(m, SharedLinear)]
    assert len(shared) == 4 * 5
    errors = {fit: [gram_error(dense, model, stats, name) for name in shared] for fit, model in small.items()}
    assert all(own <= pooled * (1 + 1e-5) for own, pooled in zip(errors["own"], errors["pooled"], strict=True))
    assert sum(errors["own"]) < 0.999 * sum(errors["pooled"])


def test_drifted_coefficients_are_fitted_on_the_inputs_of_the_compressed_model():
    dense = tiny("llama", num_hidden_layers=2)
    before = compress_model(dense, make_method("basis-sharing"), 0.6, IDS).model
    stats = measure(before, find_layers(dense), IDS, frozenset({Stat.GRAM}))
    after = compress_model(dense, make_method("basis-sharing", options={"fit": "drifted"}), 0.6, IDS).model
    for name in (OWNER, BORROWER, "model.layers.1.mlp.down_proj"):
        module = before.get_submodule(name)
        basis = (module.owner if isinstance(module, SharedLinear) else module).V.weight.detach().double()
        weight = weight_of(linear_at(dense, name)).detach().double()
        expected = fitted(weight, basis, stats[name].get(Stat.GRAM)) @ basis
        assert torch.allclose(after.get_submodule(name).dense_weight().double(), expected, atol=1e-4), name
    first = before.get_submodule(OWNER).get_parameter("U.weight")  # nothing before the first layer has changed
    assert torch.allclose(after.get_submodule(OWNER).get_parameter("U.weight"), first, atol=1e-3)


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt", "qwen3-moe"])
def test_the_budget_is_met_and_nearly_used_and_the_dense_model_is_left_alone(architecture, keep):
    dense = tiny(architecture, num_hidden_layers=3)
    before = state_of(dense)
    outcome = compress_model(dense, make_method("basis-sharing"), keep, token_ids(24, 16))
    assert_same_state(before, state_of(dense))
    stored = sum(
        t.numel() for la in outcome.walk.layers for t in outcome.model.get_submodule(la.name).state_dict().values()
    )
    assert stored == outcome.plan.numbers_after
    assert keep - 0.02 < stored / outcome.walk.numbers <= keep
    assert any(isinstance(m, SharedLinear) for m in outcome.model.modules())


def test_keep_1_stays_dense_and_too_little_names_the_smallest():
    assert {p.codec for p in compressed(keep=1.0).placed.values()} == {"dense"}
    with pytest.raises(UsageError, match=r"rank 1 everywhere takes [\d,]+\. The smallest .* is 0\.\d+") as told:
        compressed(keep=0.01)
    smallest = float(str(told.value).rsplit(" ", 1)[1])
    assert {p.rank for p in compressed(keep=smallest).placed.values()} == {1}


def test_only_what_reads_the_residual_stream_is_shared_unless_all_is_asked_for():
    some, every = compressed(layers=2), compressed(layers=2, share="all")
    kinds = {name.rpartition(".")[2] for name, placed in some.placed.items() if placed.codec == "shared"}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {placed.codec for placed in every.placed.values()} == {"shared"}


def test_a_model_without_readers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    for module in list(model.modules()):
        if "Norm" in type(module).__name__:
            module.__class__ = type("Scaled", (type(module),), {})
    with pytest.raises(UsageError, match="LlamaForCausalLM no linear layer reads what a norm puts out"):
        compress_model(model, make_method("basis-sharing"), 0.6, IDS)
    compress_model(model, make_method("basis-sharing", options={"share": "all"}), 0.6, IDS)


@pytest.mark.parametrize("options", [{"group_size": 0}, {"share": "some"}, {"fit": "none"}, {"group_size": 2.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        make_method("basis-sharing", options=options)


# The layer


def pair() -> tuple[nn.Module, SharedLinear, SharedLinear]:
    torch.manual_seed(0)
    owner = SharedLinear(6, 5, 3, bias=True)
    borrower = SharedLinear(6, 4, 3, bias=False, basis="first")
    model = nn.ModuleDict({"second": borrower, "first": owner})
    borrower.link(model)
    return model, owner, borrower


def test_the_forward_pass_is_that_of_the_weight_it_stands_for():
    _, owner, borrower = pair()
    x = torch.randn(2, 7, 6)
    for layer in (owner, borrower):
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.dense_weight(), layer.bias), atol=1e-6)


def test_the_basis_is_one_parameter_and_its_gradient_comes_from_all():
    model, owner, borrower = pair()
    assert sorted(model.state_dict()) == [
        "first.U.bias", "first.U.weight", "first.V.weight", "first.weight", "second.U.weight", "second.weight",
    ]  # fmt: skip
    assert len(list(model.parameters())) == len(list(model.named_parameters(remove_duplicate=False))) == 4
    x = torch.randn(3, 6)
    (owner(x).sum() + borrower(x).sum()).backward()
    both = owner.V.weight.grad
    assert both is not None
    owner.V.weight.grad = None
    borrower(x).sum().backward()
    alone = owner.V.weight.grad
    assert alone is not None
    assert float((both - alone).abs().max()) > 1e-3


def test_borrowers_follow_casts_moves_copies_and_pickles():
    model, owner, borrower = pair()
    x = torch.randn(2, 6)
    expected = borrower(x)
    twin = copy.deepcopy(model)
    assert twin["second"].owner is twin["first"]
    with torch.no_grad():
        twin["first"].V.weight.zero_()
    assert torch.equal(borrower(x), expected)
    assert not bool(twin["second"](x).any())
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again["second"](x), expected)
    model.half()
    assert borrower.owner.V.weight.dtype == torch.float16
    assert torch.allclose(borrower(x.half()).float(), expected, atol=1e-2)
    model.double().to("meta")
    assert owner.V.weight.is_meta
    assert borrower(torch.empty(2, 6, dtype=torch.float64, device="meta")).shape == (2, 4)


def test_whatever_wraps_the_basis_holds_for_the_group():
    _, owner, borrower = pair()
    x = torch.randn(2, 6)
    before, inner = borrower(x), owner.V
    owner.V = nn.Sequential(inner, nn.Softplus())
    assert torch.allclose(borrower(x), borrower.U(nn.functional.softplus(inner(x))))
    assert not torch.allclose(borrower(x), before)


def test_a_borrower_that_was_never_linked_says_so():
    with pytest.raises(RuntimeError, match="shares the basis of first was used before it was linked"):
        SharedLinear(6, 4, 3, bias=False, basis="first")(torch.randn(2, 6))


# The folder


def test_the_file_holds_every_basis_once_and_config_names_its_owner(folder):
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    tensors = load_file(folder / "model.safetensors")
    shared = {path: entry for path, entry in modules.items() if entry["codec"] == "shared"}
    assert len(shared) == 10
    assert shared[OWNER] == {"codec": "shared", "rank": shared[OWNER]["rank"], "bias": True, "basis": None}
    assert shared[BORROWER]["basis"] == OWNER
    assert sum(f"{path}.V.weight" in tensors for path in shared) == 5
    assert {path for path in shared if f"{path}.V.weight" in tensors} == {
        p for p, e in shared.items() if e["basis"] is None
    }
    alone = {path for path, entry in modules.items() if entry["codec"] == "factor"}
    assert alone == {p for p in modules if ".2." in p or p.endswith(("o_proj", "down_proj"))}


def test_plain_loading_gives_the_same_logits_and_the_same_folder_again(folder, tmp_path):
    small = compress_model(tiny("llama-gqa-bias", num_hidden_layers=3), make_method("basis-sharing"), 0.6, IDS).model
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits_of(model, IDS), logits_of(small, IDS), atol=1e-5)
    expected = logits_of(model, IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, IDS), expected)
    assert twin.get_submodule(BORROWER).owner is twin.get_submodule(OWNER)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), IDS), expected)
    half = logits_of(model.to(torch.bfloat16), IDS).float()
    assert torch.allclose(half, expected, atol=0.3)
    assert not torch.equal(half, expected)


def test_headless_and_half_precision_loads(folder, loaded):
    headless = AutoModel.from_pretrained(folder).eval()
    assert headless.get_submodule(BORROWER.removeprefix("model.")).owner is headless.get_submodule(
        OWNER.removeprefix("model.")
    )
    assert torch.equal(headless(input_ids=IDS).last_hidden_state, loaded.model(input_ids=IDS).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert half.get_submodule(BORROWER).owner.V.weight.dtype == torch.float16


def test_sharded_folders_load(folder, loaded, tmp_path):
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards").eval()
    assert torch.equal(logits_of(again, IDS), logits_of(loaded, IDS))


def test_multiplied_back_it_is_a_dense_model_with_the_same_logits(loaded):
    expected = logits_of(loaded, IDS)
    dense = make_dense(loaded)
    assert not any(isinstance(m, SharedLinear | LowRankLinear) for m in dense.modules())
    assert torch.allclose(logits_of(dense, IDS), expected, atol=1e-4)


Edit = Callable[[dict[str, Any]], None]


def put(path: str, **values: Any) -> Edit:
    return lambda modules: modules[path].update(values)


def without_basis(modules: dict[str, Any]) -> None:
    del modules[BORROWER]["basis"]


def loop(modules: dict[str, Any]) -> None:
    modules[OWNER]["basis"], modules[BORROWER]["basis"] = BORROWER, OWNER


BROKEN: dict[str, tuple[Edit, str]] = {
    "no such layer": (put(BORROWER, basis="model.layers.9.self_attn.q_proj"), "which this model does not have"),
    "empty path": (put(BORROWER, basis=""), "expected null where the layer holds its group's basis"),
    "a number": (put(BORROWER, basis=3), "expected null where"),
    "a list": (put(BORROWER, basis=[OWNER]), "expected null where"),
    "left out": (without_basis, "expected null where"),
    "itself": (put(BORROWER, basis=BORROWER), "which has none of its own"),
    "another borrower": (put(BORROWER, basis="model.layers.1.self_attn.k_proj"), "which has none of its own"),
    "two in a loop": (loop, "V.weight: the files hold shape"),
    "a layer of another codec": (put(BORROWER, basis="model.layers.0.self_attn.o_proj"), "which is a LowRankLinear"),
    "a norm": (put(BORROWER, basis="model.norm"), "which is a LlamaRMSNorm"),
    "a child of the owner": (put(BORROWER, basis=f"{OWNER}.U"), "which is a Linear"),
    "a basis of another rank": (put(BORROWER, basis="model.layers.0.mlp.up_proj"), "the basis in .* has 32 and"),
    "a borrower made an owner": (put(BORROWER, basis=None), "V.weight: the files do not hold it"),
    "a rank above the inputs": (put(BORROWER, rank=33), "has at most 32 vectors"),
    "another rank": (put(OWNER, rank=1), "the files hold shape"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_references_that_do_not_fit_are_refused(folder, tmp_path, case):
    edit, says = BROKEN[case]
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    edit(config["quantization_config"]["modules"])
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        AutoModelForCausalLM.from_pretrained(copied)


def test_the_rank_may_be_above_the_outputs_of_a_narrow_layer():
    """One basis for many narrow layers (keys of grouped queries) holds more vectors than one of them has outputs."""
    outcome = compressed("gemma", keep=0.9, layers=4, group_size=4)
    narrow = outcome.model.get_submodule("model.layers.1.self_attn.k_proj")
    assert isinstance(narrow, SharedLinear)
    assert narrow.rank > narrow.out_features == 8
    weight: Tensor = narrow.dense_weight()
    assert weight.shape == (8, 32)
