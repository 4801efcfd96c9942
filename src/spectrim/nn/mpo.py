"""Linear layers stored as a matrix product operator, and the form in which their cores are trained."""

import math
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.mpo import Sites, cheapest_order, contract, core_shapes, from_mpo, full_bond
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.unit import ZERO_BIAS, Unit

MOST_SITES = 8


class MPOLinear(StoredLinear):
    """`y = W x + bias`, W a chain of cores. Stored: `cores.0`, `cores.1`, .. (b, o, i, b'), `bias` (O,) if any.

    `rank` is the bond dimension chi. W is worked out on the way only where that takes fewer multiplications than the
    contraction (many tokens), and is not kept.
    """

    codec = "mpo"

    def __init__(self, sites: Sites, chi: int, *, bias: bool, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.sites, self.rank = sites, chi
        self.out_features, self.in_features = math.prod(sites.outputs), math.prod(sites.inputs)
        shapes = core_shapes(sites, chi)
        self.cores = nn.ParameterList(torch.zeros(shape, device=device, dtype=dtype) for shape in shapes)
        self.bias = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        self.add_guard(device, dtype)

    @classmethod
    def from_cores(cls, cores: list[Tensor], chi: int, bias: Tensor | None, like: Tensor) -> Self:
        """A layer that holds `cores` in the dtype and on the device of `like`."""
        sites = Sites(tuple(core.shape[1] for core in cores), tuple(core.shape[2] for core in cores))
        made = cls(sites, chi, bias=bias is not None, device=like.device, dtype=like.dtype)
        with torch.no_grad():
            for own, core in zip(made.cores, cores, strict=True):
                own.copy_(core)
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
        return made

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        sites = _sites_in(entry, outputs, inputs)
        if entry["rank"] > full_bond(sites):
            raise ValueError(
                f"rank {entry['rank']}; sites {list(sites.outputs)} x {list(sites.inputs)} have bonds of at most "
                f"{full_bond(sites)}"
            )
        return cls(sites, entry["rank"], bias=entry["bias"], device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "outputs": list(self.sites.outputs), "inputs": list(self.sites.inputs)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        cores = {f"cores.{site}": shape for site, shape in enumerate(core_shapes(self.sites, self.rank))}
        return {**cores, **({"bias": (self.out_features,)} if self.has_bias else {})}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        flat = x.reshape(-1, self.in_features)
        y = contract(flat, list(self.cores), cheapest_order(self.sites, self.rank, len(flat)))
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        return from_mpo([core.detach().to(torch.promote_types(core.dtype, torch.float32)) for core in self.cores])


def _sites_in(entry: Mapping[str, Any], outputs: int, inputs: int) -> Sites:
    """The sites that an entry of config.json gives, which is not trusted."""
    found = []
    for name, size in (("outputs", outputs), ("inputs", inputs)):
        factors = entry.get(name)
        fits = isinstance(factors, list) and 1 <= len(factors) <= MOST_SITES
        fits = fits and all(type(f) is int and 1 <= f <= size for f in cast(list[Any], factors))
        if not fits or math.prod(cast(list[int], factors)) != size:
            raise ValueError(
                f"{name} {str(factors)[:80]}; expected up to {MOST_SITES} factors of {size}, one for each core"
            )
        found.append(tuple(cast(list[int], factors)))
    if len(found[0]) != len(found[1]):
        raise ValueError(f"{len(found[0])} factors of the outputs and {len(found[1])} of the inputs; cores have both")
    return Sites(*found)


class ChainLinear(nn.Module):
    """An MPO layer while it trains: every core in units of its own size. The weight is formed once a forward pass."""

    def __init__(self, before: MPOLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = before.in_features, before.out_features
        self.cores = nn.ModuleList(Unit(core) for core in before.cores)
        self.bias_unit = None if before.bias is None else Unit(before.bias, of_zero=ZERO_BIAS)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        with torch.autocast(x.device.type, enabled=False):
            weight = from_mpo([core() for core in self.cores])
        return F.linear(x, weight, None if self.bias_unit is None else self.bias_unit())

    def stored(self, like: MPOLinear) -> MPOLinear:
        """The layer in the storage and dtype that it had."""
        cores = [cast(Unit, core).value() for core in self.cores]
        bias = None if self.bias_unit is None else self.bias_unit.value()
        return MPOLinear.from_cores(cores, like.rank, bias, like.cores[0])
