"""The vLLM plugin: `vllm serve DIR` of a compressed folder, once spectrim is installed beside vLLM.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`) and finds the format by the
folder's `quant_method`. Imported by nothing but vLLM: it is no dependency.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (  # type: ignore[import-not-found]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # type: ignore[import-not-found]
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # type: ignore[import-not-found]

from spectrim.integrations.serving import ServedLinear, Share, check_served, parts_of
from spectrim.integrations.transformers import QUANT_METHOD, SpectrimConfig


class SpectrimVllmConfig(QuantizationConfig):
    """Which layers of a model are low-rank, by config.json."""

    def __init__(self, modules: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = dict(modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectrimVllmConfig":
        """`quantization_config` of config.json; `InputError` for folders that are not served."""
        stored = SpectrimConfig(**config)
        check_served(stored.modules, stored.any_size, "vLLM")
        return cls(stored.modules)

    def get_name(self) -> str:
        """As in `quant_method`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What the weights may be in: any float."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Plain matrix products: every device."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None beside config.json."""
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM names the modules of some models otherwise."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A low-rank method for the layers that config.json lists; embeddings and experts are left to vLLM."""
        if not isinstance(layer, LinearBase):
            return None
        entries = parts_of(self.modules, prefix, self.packed_modules_mapping)
        return UnquantizedLinearMethod() if entries is None else LowRankMethod(prefix, entries)


class LowRankMethod(LinearMethodBase):
    """One (perhaps fused) layer."""

    def __init__(self, prefix: str, entries: list[Any]) -> None:
        self.prefix, self.entries = prefix, entries

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Before loading."""
        share = Share(
            inputs=input_size_per_partition,
            outputs=tuple(output_partition_sizes),
            rank=getattr(layer, "tp_rank", 0),
            replicas=getattr(layer, "num_kv_head_replicas", 1),
            over_inputs=input_size_per_partition != input_size,
            over_outputs=sum(output_partition_sizes) != output_size,
        )
        self.served = ServedLinear(self.prefix, self.entries, share)
        self.served.attach(layer, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """After loading."""
        self.served.finish(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, I) to (tokens, O)."""
        return self.served.forward(layer, x, bias)


def register() -> None:
    """Make vLLM know the format; safe to call again."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SpectrimVllmConfig)
