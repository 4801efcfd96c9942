"""The plugins for vLLM and SGLang against stand-ins for what they import: registration, choice of layers, loading.

The stand-ins have the names and signatures of vLLM 0.33.0 and SGLang 0.5.23 and nothing else. tests/matrix/test_vllm.py
runs vLLM itself.
"""

import importlib
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.errors import InputError
from spectrim.nn.linears import LowRankLinear

ROOT = Path(__file__).parents[2]
ENGINES = {
    "vllm": ("vllm.model_executor.layers", "vllm.general_plugins"),
    "sglang": ("sglang.srt.layers", "sglang.srt.plugins"),
}


class LinearBase(nn.Module):
    """As far as a plugin sees it."""


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod:
    pass


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin's module, imported beside the stand-ins; `registered` is the engine's table."""
    layers, _ = ENGINES[request.param]
    registered: dict[str, type] = {}

    def decorator(name: str) -> Any:
        return lambda kind: registered.setdefault(name, kind)

    parts = layers.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    for name, held in {
        "linear": {"LinearBase": LinearBase, "LinearMethodBase": LinearMethodBase,
                   "UnquantizedLinearMethod": UnquantizedLinearMethod},
        "quantization": {"QUANTIZATION_METHODS": registered, "register_quantization_config": decorator},
        "quantization.base_config": {"QuantizationConfig": QuantizationConfig, "LinearMethodBase": LinearMethodBase},
        "quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
    }.items():  # fmt: skip
        module = ModuleType(f"{layers}.{name}")
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, f"{layers}.{name}", module)
    monkeypatch.delitem(sys.modules, f"spectrim.integrations.{request.param}", raising=False)
    plugin = importlib.import_module(f"spectrim.integrations.{request.param}")
    del sys.modules[plugin.__name__]  # not for others: it holds stand-ins
    return SimpleNamespace(plugin=plugin, registered=registered, name=request.param)


def config(rank: int = 5, **more: Any) -> dict[str, Any]:
    entry = {"codec": "factor", "rank": rank, "bias": False}
    return {"quant_method": "spectrim", "format_version": 1, "modules": {"m.q_proj": entry, "m.o_proj": entry}, **more}


def test_the_entry_points_name_what_is_there(engine):
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][ENGINES[engine.name][1]]
    assert points == {"spectrim": f"spectrim.integrations.{engine.name}:register"}
    assert callable(engine.plugin.register)


def test_registering_twice_is_fine(engine):
    engine.plugin.register()
    engine.plugin.register()
    (kind,) = engine.registered.values()
    made = kind.from_config(config())
    assert list(engine.registered) == [made.get_name()] == ["spectrim"]
    assert torch.bfloat16 in made.get_supported_act_dtypes()
    assert (made.get_min_capability(), made.get_config_filenames()) == (0, [])


def made(engine: Any) -> Any:
    engine.plugin.register()
    found = engine.registered["spectrim"].from_config(config())
    found.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return found


def test_listed_layers_are_low_rank_and_others_the_engines_own(engine):
    found = made(engine)
    assert found.get_quant_method(LinearBase(), "m.qkv_proj").entries[1:] == [None, None]
    assert found.get_quant_method(LinearBase(), "m.o_proj").entries[0]["rank"] == 5
    assert isinstance(found.get_quant_method(LinearBase(), "m.down_proj"), UnquantizedLinearMethod)
    assert found.get_quant_method(nn.Embedding(2, 2), "m.embed_tokens") is None


def test_a_layer_is_created_loaded_and_run(engine):
    """q is low-rank; k and v are dense."""
    torch.manual_seed(0)
    q, k, v = LowRankLinear(12, 16, 5, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
    method, layer = made(engine).get_quant_method(LinearBase(), "m.qkv_proj"), LinearBase()
    method.create_weights(layer, 12, [16, 8, 8], 12, 32, torch.float32, weight_loader=None)
    for shard, part in (("q", q), ("k", k), ("v", v)):
        for key, tensor in part.state_dict().items():
            parameter = layer.get_parameter(key)
            parameter.weight_loader(parameter, tensor, shard)
    method.process_weights_after_loading(layer)
    x: Tensor = torch.randn(3, 12)
    expected = torch.cat([q(x), k(x), v(x)], -1)
    torch.testing.assert_close(method.apply(layer, x), expected)
    torch.testing.assert_close(method.apply(layer, x, torch.ones(32)), expected + 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_split_layer(engine, rank):
    """vLLM says on which device a layer is; SGLang's layers are refused when they are split."""
    torch.manual_seed(0)
    part, layer = LowRankLinear(12, 16, 5, bias=False), LinearBase()
    layer.tp_rank = rank
    method = made(engine).get_quant_method(layer, "m.o_proj")
    if engine.name == "sglang":
        with pytest.raises(InputError, match=r"m.o_proj: SGLang splits this layer"):
            method.create_weights(layer, 6, [16], 12, 16, torch.float32)
        return
    method.create_weights(layer, 6, [16], 12, 16, torch.float32)
    for key, tensor in part.state_dict().items():
        layer.get_parameter(key).weight_loader(layer.get_parameter(key), tensor)
    method.process_weights_after_loading(layer)
    x, own = torch.randn(3, 12), slice(6 * rank, 6 * rank + 6)
    torch.testing.assert_close(method.apply(layer, x[:, own]), x[:, own] @ part.dense_weight()[:, own].mT)


def test_what_cannot_be_served_is_refused_at_the_start(engine):
    engine.plugin.register()
    kind = engine.registered["spectrim"]
    with pytest.raises(InputError, match="upgrade spectrim"):
        kind.from_config(config(format_version=2))
    packed = {"m.q_proj": {"codec": "packed", "rank": 4, "bias": False}}
    with pytest.raises(InputError, match="stored as packed are not served"):
        kind.from_config(config(modules=packed))


def test_vllms_other_names_of_modules(engine):
    if engine.name != "vllm":
        return
    found = made(engine)
    found.apply_vllm_mapper(SimpleNamespace(apply_dict=lambda names: {f"language.{k}": v for k, v in names.items()}))
    assert found.get_quant_method(LinearBase(), "language.m.o_proj").entries[0]["rank"] == 5
