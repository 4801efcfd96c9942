"""The SGLang plugin: as the one for vLLM, by entry point group `sglang.srt.plugins`.

Tested with the loader and the layers of SGLang 0.5.23 on a CPU, not in a server; it has no decorator for formats, only
a table. On one device: how its layers name their share of several is not tested. Imported by SGLang.
"""

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase  # type: ignore[import-not-found]
from sglang.srt.layers.quantization import QUANTIZATION_METHODS  # type: ignore[import-not-found]
from sglang.srt.layers.quantization.base_config import (  # type: ignore[import-not-found]
    LinearMethodBase,
    QuantizationConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod  # type: ignore[import-not-found]
from torch import nn

from spectrim.errors import InputError
from spectrim.integrations.served_format import ServedFormat, ServedMethod
from spectrim.integrations.serving import Share
from spectrim.integrations.transformers import QUANT_METHOD

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What SGLang's models fuse where they do not say so themselves."""


class SpectrimSglangConfig(ServedFormat, QuantizationConfig):
    """Which layers of a model are low-rank, by config.json."""

    engine = "SGLang"

    def get_scaled_act_names(self) -> list[str]:
        """No activation is scaled."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A low-rank method for the layers that config.json lists; embeddings and experts are left to SGLang."""
        if not isinstance(layer, LinearBase):
            return None
        entries = self.entries_of(prefix, FUSED | self.packed_modules_mapping)
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
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InputError(
                f"{self.prefix}: SGLang splits this layer between devices, which the plugin does not do; start it with "
                "--tp-size 1, serve with vLLM, or serve the dense export (spectrim export DIR --to dense)"
            )
        self.attach(layer, Share(inputs=input_size, outputs=tuple(output_partition_sizes)), params_dtype)


def register() -> None:
    """Make SGLang know the format; safe to call again."""
    QUANTIZATION_METHODS[QUANT_METHOD] = SpectrimSglangConfig
