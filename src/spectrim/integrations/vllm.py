"""The vLLM plugin: `vllm serve DIR` of a compressed folder, once spectrim is installed beside vLLM.

vLLM calls `register` in each of its processes (entry point group `vllm.general_plugins`) and finds the format by the
folder's `quant_method`. Imported by nothing but vLLM: it is no dependency.
"""

from typing import Any

import torch
from torch import nn
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

from spectrim.integrations.served_format import ServedFormat, ServedMethod
from spectrim.integrations.serving import Share
from spectrim.integrations.transformers import QUANT_METHOD


class SpectrimVllmConfig(ServedFormat, QuantizationConfig):
    """Which layers of a model are low-rank, by config.json."""

    engine = "vLLM"

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM names the modules of some models otherwise."""
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A low-rank method for the layers that config.json lists; embeddings and experts are left to vLLM."""
        if not isinstance(layer, LinearBase):
            return None
        entries = self.entries_of(prefix, self.packed_modules_mapping)
        return UnquantizedLinearMethod() if entries is None else LowRankMethod(prefix, entries)


class LowRankMethod(ServedMethod, LinearMethodBase):
    """One (perhaps fused) layer."""

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
        self.attach(layer, share, params_dtype)


def register() -> None:
    """Make vLLM know the format; safe to call again."""
    if QUANT_METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(QUANT_METHOD)(SpectrimVllmConfig)
