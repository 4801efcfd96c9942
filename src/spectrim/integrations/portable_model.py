"""The code inside a portable folder: a compressed model that loads with `trust_remote_code=True`, without spectrim.

`spectrim export --to portable` writes this file into the folder as `modeling_spectrim.py`, with a class of the folder's
own architecture at its end. It imports torch and transformers and nothing else. Where spectrim is imported, its own
layers are used and this file steps back.

The format is described in docs/format.md of spectrim; two of its codecs are here, `factor` and `pivot`.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

try:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
except ImportError:  # a release that keeps it elsewhere: spectrim does not run there either
    AUTO_QUANTIZER_MAPPING = {}


class PortableFactor(nn.Module):
    """`y = U (V x) + bias`: a weight (O, I) of rank R as two factors."""

    weight: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, **options: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.V = nn.Linear(inputs, rank, bias=False, **options)
        self.U = nn.Linear(rank, outputs, bias=bias, **options)
        self.register_buffer("weight", torch.empty(0, **options))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return self.U(self.V(x))


class PortablePivot(nn.Module):
    """A weight (O, I) of rank R as R of its rows, marked by `mask`, and the coefficients of the others."""

    weight: Tensor
    mask: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool, **options: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.pivot = nn.Linear(inputs, rank, bias=False, **options)
        self.rest = nn.Linear(rank, outputs - rank, bias=False, **options)
        self.bias = nn.Parameter(torch.zeros(outputs, **options)) if bias else None
        bytes_ = (outputs + 7) // 8
        self.register_buffer("mask", torch.zeros(bytes_, dtype=torch.uint8, device=options.get("device")))
        self.register_buffer("weight", torch.empty(0, **options))

    def order(self) -> Tensor:
        """Where each output (O,) stands in [pivots, rest]; lowest bit of each byte of the mask first.

        Worked out anew each time: no loader, offloading hook or cast then has to know of it.
        """
        shifts = torch.arange(8, dtype=torch.uint8, device=self.mask.device)
        is_pivot = (self.mask[:, None].bitwise_right_shift(shifts) & 1).flatten()[: self.out_features].bool()
        return torch.where(is_pivot, is_pivot.cumsum(0) - 1, self.rank + (~is_pivot).cumsum(0) - 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        pivots = self.pivot(x)
        y = torch.cat([pivots, self.rest(pivots)], dim=-1).index_select(-1, self.order())
        return y if self.bias is None else y + self.bias.to(y.dtype)


CODECS = {"factor": PortableFactor, "pivot": PortablePivot}


def as_transformers_4_reads_it(config: Any) -> None:
    """Rotary positions where transformers 4 looks for them; it would take defaults without a word. Nothing under 5."""
    if int(transformers.__version__.partition(".")[0]) >= 5:
        return
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return  # a model without them
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError(
            f"rotary positions differ between layers, which transformers {transformers.__version__} ignores"
        )
    given = dict(found)
    config.rope_theta = given.pop("rope_theta", 10_000.0)
    config.rope_scaling = None if given.get("rope_type", "default") == "default" else given


class Portable(nn.Module):
    """Before the architecture's own class: low-rank layers in the places that config.json lists."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        as_transformers_4_reads_it(config)
        super().__init__(config, *arguments, **options)
        found = config.quantization_config
        if not isinstance(found, dict) or "spectrim" in AUTO_QUANTIZER_MAPPING:
            return  # spectrim is there, and puts its own layers in place
        if found["format_version"] != 1:
            raise ValueError(f"format_version {found['format_version']} of a spectrim folder; this file reads 1")
        for path, entry in found["modules"].items():
            old = self.get_submodule(path)
            weight: Any = old.weight
            outputs, inputs = weight.shape if isinstance(old, nn.Linear) else weight.shape[::-1]
            options = {"device": weight.device, "dtype": weight.dtype}
            new = CODECS[entry["codec"]](inputs, outputs, entry["rank"], entry["bias"], **options)
            self.set_submodule(path, new)
