"""The folder format: what is in it, how it loads in many ways, and how damaged or foreign ones are refused."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import TestCase

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import spectrim
from spectrim.errors import InputError
from spectrim.integrations.transformers import (
    SpectrimConfig,
    SpectrimHfQuantizer,
    check_installed,
    detach,
    make_dense,
    register,
)
from spectrim.linalg.pivot import unpack_mask
from spectrim.nn.linears import LowRankLinear, PivotLinear
from tiny_models import logits_of, tiny, token_ids, transformers_alone

IDS = token_ids(3, 12, seed=2)
QUERY = "model.layers.0.self_attn.q_proj"
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", params=["pivot", "factor"])
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


def compressed_to(codec: str) -> spectrim.api.Compressed:
    """A Llama with biases and tied embeddings, all of its fourteen layers in one codec."""
    model = tiny("llama-gqa-bias", tie_word_embeddings=True)
    return spectrim.compress(model, keep=0.5, method="svd", options={"storage": codec}, calibration=token_ids(2))


@pytest.fixture(scope="module")
def small(codec: str) -> spectrim.api.Compressed:
    return compressed_to(codec)


@pytest.fixture(scope="module")
def folder(small: spectrim.api.Compressed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_pretrained(tmp_path_factory.mktemp("format") / "model")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def load(folder: Path, **kwargs: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def edit_config(folder: Path, edit: Edit) -> None:
    """Change `quantization_config` in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def stored_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


# What is in the folder


def test_config_names_codec_rank_and_bias_of_every_layer(small, folder, codec):
    found = stored_config(folder)
    assert found["quant_method"] == "spectrim"
    assert found["format_version"] == 1
    assert found["tool_version"] == spectrim.__version__
    assert found["method"]["method"] == "svd"
    placed = small.outcome.placed
    assert len(placed) == 14
    assert found["modules"] == {name: {"codec": codec, "rank": p.rank, "bias": True} for name, p in placed.items()}


def test_tensors_on_disk_have_the_names_and_shapes_of_the_format(folder, codec):
    tensors = load_file(folder / "model.safetensors")
    expected = {"model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,)}
    shapes = {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32)}
    shapes |= {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}
    for path, entry in stored_config(folder)["modules"].items():
        (outputs, inputs), rank = shapes[path.rpartition(".")[2]], entry["rank"]
        expected[f"{path}.weight"] = (0,)
        if codec == "factor":
            expected |= {f"{path}.V.weight": (rank, inputs), f"{path}.U.weight": (outputs, rank)}
            expected[f"{path}.U.bias"] = (outputs,)
        else:
            expected |= {f"{path}.pivot.weight": (rank, inputs), f"{path}.rest.weight": (outputs - rank, rank)}
            expected |= {f"{path}.bias": (outputs,), f"{path}.mask": (outputs // 8,)}
    for i in range(2):
        expected[f"model.layers.{i}.input_layernorm.weight"] = (32,)
        expected[f"model.layers.{i}.post_attention_layernorm.weight"] = (32,)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    assert {t.dtype for n, t in tensors.items() if n.endswith(".mask")} <= {torch.uint8}


def test_the_weights_on_disk_multiply_to_those_of_the_model(small, folder, codec):
    """The format read by hand, as its description says, without spectrim's modules."""
    tensors = load_file(folder / "model.safetensors")
    for path in stored_config(folder)["modules"]:
        module = small.model.get_submodule(path)
        if codec == "factor":
            weight = tensors[f"{path}.U.weight"] @ tensors[f"{path}.V.weight"]
        else:
            rows, rest = tensors[f"{path}.pivot.weight"], tensors[f"{path}.rest.weight"]
            mask = unpack_mask(tensors[f"{path}.mask"], module.out_features)
            weight = torch.empty(module.out_features, module.in_features)
            weight[mask], weight[~mask] = rows, rest @ rows
        torch.testing.assert_close(weight, module.dense_weight(), atol=1e-6, rtol=1e-5)


@pytest.mark.fault(70)
def test_unknown_information_survives_a_round_trip(copied, tmp_path):
    edit_config(copied, lambda q: q.update(from_the_future={"a": [1]}))
    load(copied).save_pretrained(tmp_path / "again")
    assert stored_config(tmp_path / "again")["from_the_future"] == {"a": [1]}
    assert stored_config(tmp_path / "again")["modules"] == stored_config(copied)["modules"]


# Loading without spectrim


@pytest.mark.fault(71)
def test_a_load_without_spectrim_fails_loudly(codec, tmp_path):
    """Refused in a process that never imports spectrim: tests/unit/test_cli.py."""
    folder = compressed_to(codec).save_pretrained(tmp_path / codec)
    with (
        transformers_alone(),
        TestCase().assertLogs("transformers", "WARNING") as said,
        pytest.raises(RuntimeError, match="ignore_mismatched_sizes"),
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    # The zero-element guard is what stopped it: named for the layers.
    text = "\n".join(said.output)
    for layer in ("self_attn.q_proj", "mlp.down_proj"):
        assert f"{layer}.weight" in text
    assert text.count("torch.Size([0])") >= 2


def test_releases_that_would_compute_something_else_are_refused(folder, monkeypatch):
    """4.57 takes the default for the base of rotary positions (tests/matrix/test_old_release.py)."""
    monkeypatch.setattr("spectrim.integrations.transformers.transformers.__version__", "4.57.6")
    refuse(folder, "transformers 4.57.6", "rope_parameters", "transformers>=5.0,<6")


# Folders that are damaged, edited, or from a later version


def refuse(folder: Path, *parts: str) -> None:
    """Loading raises InputError whose message holds every part."""
    with pytest.raises(InputError) as caught:
        load(folder)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("change", [1, -1])
def test_a_wrong_rank_is_refused(copied, change):
    rank = stored_config(copied)["modules"][QUERY]["rank"]
    edit_config(copied, lambda q: q["modules"][QUERY].update(rank=rank + change))
    refuse(copied, QUERY, f"rank {rank + change}", "the files hold shape")


@pytest.mark.fault(54)
def test_a_rank_above_what_the_layer_allows_is_refused(copied):
    edit_config(copied, lambda q: q["modules"][QUERY].update(rank=33))
    refuse(copied, QUERY, "rank 33", "32 x 32", "at most 32")


@pytest.mark.parametrize(
    "entry",
    [
        {"codec": "zip"},
        {"codec": None},
        {"codec": ["pivot"]},
        {"rank": "7"},
        {"rank": 7.0},
        {"rank": True},
        {"rank": 0},
        {"rank": -3},
        {"bias": 1},
        {"bias": None},
    ],
    ids=str,
)
def test_a_malformed_entry_is_refused_with_its_place(copied, entry):
    edit_config(copied, lambda q: q["modules"][QUERY].update(entry))
    refuse(copied, "config.json", f"quantization_config.modules['{QUERY}']", repr(next(iter(entry.values()))))


@pytest.mark.parametrize("entry", [3, None, [], {}], ids=str)
def test_an_entry_that_is_not_a_description_is_refused(copied, entry):
    edit_config(copied, lambda q: q["modules"].update({QUERY: entry}))
    refuse(copied, "config.json", QUERY)


@pytest.mark.fault(70)
def test_a_later_format_version_is_refused(copied):
    edit_config(copied, lambda q: q.update(format_version=2))
    refuse(copied, "config.json", "format_version is 2", "upgrade spectrim")


@pytest.mark.fault(70)
@pytest.mark.parametrize("version", ["1", None, 1.0, True, 0], ids=repr)
def test_a_malformed_format_version_is_refused(copied, version):
    edit_config(copied, lambda q: q.update(format_version=version))
    refuse(copied, "config.json", "format_version", repr(version))


def test_modules_that_are_no_mapping_are_refused(copied):
    edit_config(copied, lambda q: q.update(modules=[QUERY]))
    refuse(copied, "config.json", "modules is a list")


def test_a_listed_module_that_is_not_linear_is_refused(copied):
    edit_config(copied, lambda q: q["modules"].update({"model.norm": {"codec": "factor", "rank": 1, "bias": False}}))
    refuse(copied, "model.norm", "LlamaRMSNorm", "not a linear layer")


def test_a_folder_of_which_no_module_exists_is_refused(copied):
    edit_config(copied, lambda q: q.update(modules={f"other.{k}": v for k, v in q["modules"].items()}))
    refuse(copied, "none of the 14 compressed layers", "LlamaForCausalLM")


def test_a_layer_missing_from_the_list_is_refused(copied):
    """The guard again: the dense layer's shape does not fit the zero-element weight."""
    edit_config(copied, lambda q: q["modules"].pop(QUERY))
    with pytest.raises(RuntimeError, match="mismatch"):
        load(copied)


def test_the_wrong_codec_is_refused(copied, codec):
    """transformers alone would fill the missing factors with random numbers and go on."""
    other = {"pivot": "factor", "factor": "pivot"}[codec]
    edit_config(copied, lambda q: q["modules"][QUERY].update(codec=other))
    refuse(copied, QUERY, other, "the files")


def test_a_bias_that_is_in_no_file_is_refused(copied, codec):
    key = f"{QUERY}.U.bias" if codec == "factor" else f"{QUERY}.bias"
    edit_tensors(copied, lambda tensors: tensors.pop(key))
    refuse(copied, key, "the files do not hold it", "shape [32]")


def test_a_bias_that_config_denies_is_refused(copied, codec):
    key = f"{QUERY}.U.bias" if codec == "factor" else f"{QUERY}.bias"
    edit_config(copied, lambda q: q["modules"][QUERY].update(bias=False))
    refuse(copied, key, "it does not exist")


def test_a_missing_factor_is_refused(copied, codec):
    key = f"{QUERY}.V.weight" if codec == "factor" else f"{QUERY}.rest.weight"
    edit_tensors(copied, lambda tensors: tensors.pop(key))
    refuse(copied, key, "the files do not hold it")


def test_a_damaged_mask_is_refused(copied, codec):
    if codec == "factor":
        pytest.skip("factors have no mask")
    edit_tensors(copied, lambda tensors: tensors[f"{QUERY}.mask"].fill_(255))
    refuse(copied, QUERY, "pivot mask marks 32 rows")


def test_a_mask_of_the_wrong_length_is_refused(copied, codec):
    if codec == "factor":
        pytest.skip("factors have no mask")
    edit_tensors(copied, lambda tensors: tensors.update({f"{QUERY}.mask": torch.zeros(5, dtype=torch.uint8)}))
    refuse(copied, f"{QUERY}.mask", "shape [5]")


def test_check_installed_catches_a_wrong_shape_by_itself(small, codec):
    """For versions of transformers that skip shape checks, and for checkpoints that are not safetensors."""
    model = make_dense(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **_sizes())))
    low = LowRankLinear(32, 32, 4, bias=False) if codec == "factor" else PivotLinear(32, 32, 4, bias=False)
    model.model.layers[0].self_attn.q_proj = low
    (low.V if codec == "factor" else low.pivot).weight = nn.Parameter(torch.zeros(5, 32))
    with pytest.raises(InputError, match=rf"{QUERY}.*\(5, 32\).*rank 4.*\(4, 32\)"):
        check_installed(model)


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }


def test_a_format_config_for_a_dense_checkpoint_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        load(tmp_path, quantization_config=SpectrimConfig())


def test_a_codec_that_is_not_known_may_be_of_a_newer_spectrim():
    entry = {"codec": "factor", "rank": 2, "bias": False}
    with pytest.raises(InputError, match="a newer spectrim may have written it: upgrade"):
        SpectrimConfig(modules={"a": {**entry, "codec": "braided"}})
    with pytest.raises(InputError, match=r"bias true or false$"):
        SpectrimConfig(modules={"a": {**entry, "rank": 0}})


# Loading in many ways


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder, small, device_map):
    loaded = load(folder, device_map=device_map)
    assert torch.equal(logits_of(loaded, IDS), logits_of(small.model, IDS))


@pytest.mark.fault(19)
def test_the_hub_caches_links_are_followed(folder, small, tmp_path):
    """A snapshot in the hub's cache is links to files with other names."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        (tmp_path / "snapshot" / file.name).symlink_to(blob)
    assert torch.equal(logits_of(load(tmp_path / "snapshot"), IDS), logits_of(small.model, IDS))


DISK = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
DISK |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def test_layers_on_disk(folder, small, tmp_path):
    loaded = load(folder, device_map=DISK, offload_folder=tmp_path)
    assert next(loaded.model.layers[1].parameters()).is_meta
    torch.testing.assert_close(logits_of(loaded, IDS), logits_of(small.model, IDS), atol=1e-6, rtol=0)


def test_an_offloaded_mask_is_refused_not_guessed(folder, codec, small, tmp_path):
    """Found: the order of the outputs, which follows from the mask, was whatever the memory held."""
    if codec == "factor":
        loaded = load(folder, device_map=DISK, offload_folder=tmp_path, offload_buffers=True)
        torch.testing.assert_close(logits_of(loaded, IDS), logits_of(small.model, IDS), atol=1e-6, rtol=0)
        return
    with pytest.raises(InputError, match=r"model.layers.1.*mask was offloaded.*offload_buffers"):
        load(folder, device_map=DISK, offload_folder=tmp_path, offload_buffers=True)


def test_a_headless_load_gives_the_hidden_states(folder, small):
    headless = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        mine = headless(IDS, use_cache=False).last_hidden_state
        theirs = small.model.model(IDS, use_cache=False).last_hidden_state
    assert torch.equal(mine, theirs)


def test_a_headless_save_loads_with_and_without_a_head(folder, small, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    assert torch.equal(logits_of(load(tmp_path), IDS), logits_of(small.model, IDS))  # the head is tied
    with torch.no_grad():
        again = AutoModel.from_pretrained(tmp_path)(IDS, use_cache=False).last_hidden_state
        assert torch.equal(again, small.model.model(IDS, use_cache=False).last_hidden_state)


def test_a_list_written_from_a_headless_model_loads_with_and_without_a_head(folder, small, tmp_path):
    """Paths in the list then lack the first level, as the tensors do."""
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda q: q.update(modules={k.removeprefix("model."): v for k, v in q["modules"].items()}))
    assert torch.equal(logits_of(load(tmp_path), IDS), logits_of(small.model, IDS))
    with torch.no_grad():
        headless = AutoModel.from_pretrained(tmp_path)(IDS, use_cache=False).last_hidden_state
        assert torch.equal(headless, small.model.model(IDS, use_cache=False).last_hidden_state)


def test_another_head_loads(folder, small):
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    with torch.no_grad():
        hidden = classifier.model(IDS, use_cache=False).last_hidden_state
        assert torch.equal(hidden, small.model.model(IDS, use_cache=False).last_hidden_state)


@pytest.mark.fault(72)
def test_sharded_files_load(small, tmp_path):
    small.model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert torch.equal(logits_of(load(tmp_path), IDS), logits_of(small.model, IDS))


@pytest.mark.fault(8)
def test_a_missing_tensor_in_a_shard_is_refused(small, codec, tmp_path):
    small.model.save_pretrained(tmp_path, max_shard_size="8KB")
    key = f"{QUERY}.U.weight" if codec == "factor" else f"{QUERY}.rest.weight"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shard = tmp_path / index["weight_map"][key]
    tensors = load_file(shard)
    del tensors[key]
    save_file(tensors, shard, metadata={"format": "pt"})
    refuse(tmp_path, key, "the files do not hold it")


def test_the_stored_dtype_is_the_default(folder, small, tmp_path):
    wide = logits_of(small.model, IDS)
    model = load(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    for kwargs in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        narrow = load(tmp_path, **kwargs)
        assert narrow.dtype == torch.bfloat16
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
        assert torch.equal(logits_of(narrow, IDS), logits_of(model, IDS))
    assert 0 < (logits_of(narrow, IDS).float() - wide).abs().max() < 0.1 * wide.abs().max()
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}


def test_a_model_in_bfloat16_is_stored_in_bfloat16(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", dtype=torch.bfloat16)
    small = spectrim.compress(model, keep=0.6, method="two-sided", calibration=token_ids())
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loaded = load(small.save_pretrained(tmp_path / "small"))
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded, IDS), logits_of(small.model, IDS))


@pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("float", torch.float32)])
def test_casting_after_the_load(folder, small, cast, dtype):
    loaded = load(folder, dtype=torch.bfloat16)
    loaded = getattr(loaded, cast)()
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    got, want = logits_of(loaded, IDS), logits_of(small.model, IDS)
    assert got.dtype == dtype
    assert (got.float() - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.fault(71)
def test_spectrim_load_equals_plain_loading(folder, small):
    loaded = spectrim.load(folder, device="cpu")
    assert torch.equal(logits_of(loaded, IDS), logits_of(small.model, IDS))


# What other tools see


def test_every_factor_is_a_real_linear_child(folder, codec):
    """How PEFT and torchao look for their targets."""
    loaded = load(folder)
    linears = {name for name, m in loaded.named_modules() if type(m) is nn.Linear}
    children = ("U", "V") if codec == "factor" else ("pivot", "rest")
    wanted = {f"{path}.{child}" for path in stored_config(folder)["modules"] for child in children}
    assert linears == wanted | {"lm_head"}
    assert all(linear.weight.ndim == 2 and linear.weight.numel() > 0 for linear in map(loaded.get_submodule, wanted))


def test_adapters_on_the_children_change_the_output(folder):
    """What PEFT does to a target: wrap the child's forward."""
    loaded = load(folder)
    before = logits_of(loaded, IDS)
    name = next(n for n, m in loaded.named_modules() if type(m) is nn.Linear and n.startswith(QUERY))
    inner = loaded.get_submodule(name)

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = inner
            self.down, self.up = nn.Linear(inner.in_features, 2), nn.Linear(2, inner.out_features)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    loaded.set_submodule(name, Adapter())
    assert (logits_of(loaded, IDS) - before).abs().max() > 1e-3


def test_gradients_reach_every_factor(folder, codec):
    loaded = load(folder).train()
    keys = [
        k for k, _ in loaded.named_parameters() if any(k.startswith(p + ".") for p in stored_config(folder)["modules"])
    ]
    assert len(keys) == 14 * 3  # two factors and a bias
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=1e-2)
    first = loaded(input_ids=IDS, labels=IDS).loss
    first.backward()
    for key in keys:
        gradient = loaded.get_parameter(key).grad
        assert gradient is not None, key
        assert torch.isfinite(gradient).all(), key
        # A softmax does not see a shift of its scores that all keys share: the bias of k_proj has no gradient.
        assert gradient.abs().max() > (0 if "k_proj" not in key else -1), key
    optimizer.step()
    assert loaded(input_ids=IDS, labels=IDS).loss < first


def test_trainer_accepts_the_model(folder):
    from transformers.trainer_utils import validate_quantization_for_training

    validate_quantization_for_training(load(folder))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [LowRankLinear, PivotLinear])
def test_compiled_equals_eager(kind, bias):
    torch.manual_seed(0)
    layer = kind(24, 20, 7, bias=bias)
    if kind is PivotLinear:
        layer.mask.copy_(torch.tensor([0b01010101, 0b00000111, 0], dtype=torch.uint8))
        layer.refresh_order()
    x = torch.randn(3, 5, 24, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager = layer(x)
    torch.testing.assert_close(compiled(x), eager, atol=1e-6, rtol=0)
    torch.testing.assert_close(eager, x @ layer.dense_weight().mT + (0 if layer.bias is None else layer.bias))
    (mine,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(mine, theirs)


def test_the_static_cache_generates_the_same(folder):
    loaded = load(folder)
    kwargs = {"attention_mask": torch.ones(2, 6, dtype=torch.long), "max_new_tokens": 6, "do_sample": False}
    plain = loaded.generate(IDS[:2, :6], **kwargs)
    static = loaded.generate(IDS[:2, :6], cache_implementation="static", disable_compile=True, **kwargs)
    assert torch.equal(plain, static)


# Back to dense


def test_dequantize_gives_a_dense_model_that_saves_as_one(folder, small, tmp_path):
    dense = load(folder).dequantize()
    assert not any(isinstance(m, LowRankLinear | PivotLinear) for m in dense.modules())
    assert not dense.training
    assert not any(m.training for m in dense.modules())
    torch.testing.assert_close(logits_of(dense, IDS), logits_of(small.model, IDS), atol=1e-4, rtol=1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert type(again.get_submodule(QUERY)) is nn.Linear
    assert torch.equal(logits_of(again, IDS), logits_of(dense, IDS))


def test_make_dense_alone_makes_the_model_forget(folder, tmp_path):
    """Found: it kept the list of modules, and the saved folder could not be loaded."""
    dense = make_dense(load(folder))
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits_of(load(tmp_path), IDS), logits_of(dense, IDS))


def test_dequantize_to_another_dtype(folder):
    dense = load(folder, dtype=torch.bfloat16).dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}


def test_detach_undoes_attach(folder):
    model = load(folder)
    assert isinstance(model.hf_quantizer, SpectrimHfQuantizer)
    detach(model)
    assert model.hf_quantizer is None
    assert not hasattr(model.config, "quantization_config")
    detach(model)  # twice is fine


# Registration


def test_registering_again_is_fine(folder, small):
    kind = AUTO_QUANTIZER_MAPPING["spectrim"]
    register()
    importlib.reload(spectrim)
    assert AUTO_QUANTIZER_MAPPING["spectrim"] is kind
    assert torch.equal(logits_of(load(folder), IDS), logits_of(small.model, IDS))


def test_a_folder_of_dense_layers_only_loads(tmp_path):
    """keep=1: the format with an empty list."""
    model = tiny("llama")
    full = spectrim.compress(model, keep=1.0, method="svd", calibration=token_ids(2))
    out = full.save_pretrained(tmp_path / "full")
    assert stored_config(out)["modules"] == {}
    assert torch.equal(logits_of(load(out), IDS), logits_of(model, IDS))
