"""What every serving engine asks of a format and of a layer's method, answered once (vllm.py, sglang.py).

vLLM and SGLang have the same two interfaces; their plugins inherit from these classes and from the engine's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from spectrim.integrations.serving import ServedLinear, Share, check_served, parts_of
from spectrim.integrations.transformers import QUANT_METHOD, SpectrimConfig


class ServedFormat:
    """Which layers of a model are low-rank, by config.json; before the engine's `QuantizationConfig`."""

    engine: ClassVar[str]

    def __init__(self, modules: Mapping[str, dict[str, Any]]) -> None:
        super().__init__()
        self.modules = dict(modules)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """`quantization_config` of config.json; `InputError` for folders that are not served."""
        stored = SpectrimConfig(**config)
        check_served(stored.modules, stored.any_size, cls.engine)
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

    def entries_of(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[Any] | None:
        """Entries of the parts of a layer of the engine; None where it is left to the engine."""
        return parts_of(self.modules, prefix, fused)


class ServedMethod:
    """One (perhaps fused) layer; before the engine's `LinearMethodBase`, which adds `create_weights`."""

    def __init__(self, prefix: str, entries: list[Any]) -> None:
        super().__init__()
        self.prefix, self.entries = prefix, entries

    def attach(self, layer: nn.Module, share: Share, dtype: torch.dtype) -> None:
        """Before loading."""
        self.served = ServedLinear(self.prefix, self.entries, share)
        self.served.attach(layer, dtype)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """After loading."""
        self.served.finish(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (tokens, I) to (tokens, O)."""
        return self.served.forward(layer, x, bias)
