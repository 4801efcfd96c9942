"""The SGLang plugin: as the one for vLLM, by entry point group `sglang.srt.plugins`.

Written against the source of SGLang 0.5.23 and tested against stand-ins for it, not in a server; it has no decorator
for formats, only a table. On one device: how its layers name their share of several is not tested. Imported by SGLang.
"""

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase  # type: ignore[import-not-found]
from sglang.srt.layers.quantization import QUANTIZATION_METHODS  # type: ignore[import-not-found]
from sglang.srt.layers.quantization.base_config import (  # type: ignore[import-not-found]
    LinearMethodBase,
    QuantizationConfig,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod  # type: ignore[import-not-found]
from torch import Tensor, nn

from spectrim.errors import InputError
from spectrim.integrations.serving import ServedLinear, Share, check_served, parts_of
from spectrim.integrations.transformers import QUANT_METHOD, SpectrimConfig


class SpectrimSglangConfig(QuantizationConfig):
    """Which layers of a model are low-rank, by config.json."""

    def __init__(self, modules: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = dict(modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SpectrimSglangConfig":
        """`quantization_config` of config.json; `InputError` for folders that are not served."""
        stored = SpectrimConfig(**config)
        check_served(stored.modules, stored.any_size, "SGLang")
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

    def get_scaled_act_names(self) -> list[str]:
        """No activation is scaled."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """A low-rank method for the layers that config.json lists; embeddings and experts are left to SGLang."""
        if not isinstance(layer, LinearBase):
            return None
        entries = parts_of(self.modules, prefix, FUSED | self.packed_modules_mapping)
        return UnquantizedLinearMethod() if entries is None else LowRankMethod(prefix, entries)


FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What SGLang's models fuse where they do not say so themselves."""


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
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise InputError(
                f"{self.prefix}: SGLang splits this layer between devices, which the plugin does not do; start it with "
                "--tp-size 1, serve with vLLM, or serve the dense export (spectrim export DIR --to dense)"
            )
        share = Share(inputs=input_size, outputs=tuple(output_partition_sizes))
        self.served = ServedLinear(self.prefix, self.entries, share)
        self.served.attach(layer, params_dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """After loading."""
        self.served.finish(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, I) to (tokens, O)."""
        return self.served.forward(layer, x, bias)


def register() -> None:
    """Make SGLang know the format; safe to call again."""
    QUANTIZATION_METHODS[QUANT_METHOD] = SpectrimSglangConfig
