"""Any size from one set of factors: which rank each layer has at a size, and the slice that it then is.

Used where a run measures its anchors and where a folder is loaded, so that both give the same tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from spectrim.engines.ranks import Plan, smallest_keep, weight_budget
from spectrim.errors import UsageError
from spectrim.linalg.factor import Factors, Spectrum
from spectrim.linalg.ladder import cut, interpolate, ladder_costs
from spectrim.models.walk import Layer, Walk
from spectrim.replacement import Replacement, Storage, Target, dense_replacement, encode


@dataclass(frozen=True, kw_only=True)
class Nested:
    """All components of one layer in the order in which they are kept, in the dtype in which they are stored.

    Beside an adapter, K counts its components too: they come first.
    """

    left: Tensor  # (K, O)
    right: Tensor  # (K, I)
    scores: Tensor  # (A, K) float32, one row an anchor
    levels: Tensor  # (S,) int32, places of this layer's steps in the order of all steps
    bias: Tensor | None


def nest(spectrum: Spectrum, scores: Tensor, levels: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Nested:
    """A spectrum in its final order, each component's two vectors brought to the same length and rounded once."""
    left, right = spectrum.left.double().mT, spectrum.right.double()
    lengths = torch.stack([left.norm(dim=1), right.norm(dim=1)])
    tiny = torch.finfo(torch.float64).tiny
    ratio = (lengths[1] / lengths[0].clamp(min=tiny)).sqrt()
    ratio = ratio.where((lengths > 0).all(dim=0), 1.0)[:, None]  # a component that is nothing stays nothing
    return Nested(
        left=(left * ratio).to(dtype).contiguous(),
        right=(right / ratio).to(dtype).contiguous(),
        scores=scores.to(left.device, torch.float32).contiguous(),
        levels=levels.int().contiguous(),
        bias=None if bias is None else bias.detach().to(dtype),
    )


def first_rank(adapter_rank: int) -> int:
    """Where every ladder begins: with the adapter alone, or with one component."""
    return max(1, adapter_rank)


def plan_at(walk: Walk, levels: Mapping[str, Tensor], storage: Storage, size: float, *, adapter_rank: int = 0) -> Plan:
    """What every layer is at `size`, a share of the dense numbers: the first steps of the one order that fit."""
    first = first_rank(adapter_rank)
    costs = [ladder_costs(layer.outputs, layer.inputs, storage, first) for layer in walk.layers]
    budget, least = weight_budget(walk, size, storage), sum(int(cost[0]) for cost in costs)
    if budget < least:
        raise UsageError(
            f"size {size:g} leaves {budget:,} numbers for {len(walk.layers)} weights; adapters of rank {adapter_rank} "
            f"alone take {least:,}. The smallest reachable size is {smallest_keep(walk, least):.4f}"
        )
    choice = cut(costs, [levels[layer.name].cpu() for layer in walk.layers], budget)
    spent = sum(int(cost[k]) for cost, k in zip(costs, choice, strict=True))
    biases = sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    targets = {
        layer.name: _target(layer, storage, first + option, whole=option == len(cost) - 1)
        for layer, cost, option in zip(walk.layers, costs, choice, strict=True)
    }
    return Plan(targets=targets, numbers_before=walk.numbers, numbers_after=spent + biases)


def _target(layer: Layer, storage: Storage, rank: int, *, whole: bool) -> Target:
    if whole:
        return Target(rank=min(layer.outputs, layer.inputs), codec="dense")
    return Target(rank=rank, codec=storage)


def slice_at(nested: Nested, target: Target, anchors: tuple[float, ...], size: float) -> Replacement:
    """One layer at a size, in the dtype in which it is stored; a dense one is the sum of all rows that `nested` has.

    Two factors are a pure slice, times the scores. Pivot rows and coefficients of one rank are no slice of those of the
    next, so they are worked out from the slice, in float64: the weight itself is never decomposed again.
    """
    rank = len(nested.left) if target.codec == "dense" else target.rank
    scores = interpolate(nested.scores.double(), anchors, size)[:rank]
    left, right = nested.left[:rank].double() * scores[:, None], nested.right[:rank].double()
    if target.codec == "dense":
        return dense_replacement((left.mT @ right).to(nested.left.dtype), nested.bias)
    if target.codec == "pivot":
        return encode(Factors(left.mT, right), "pivot", like=nested.left, bias=nested.bias)
    tensors = {"U.weight": left.mT.to(nested.left.dtype).contiguous(), "V.weight": nested.right[:rank].contiguous()}
    return Replacement(codec="factor", rank=rank, tensors=MappingProxyType(tensors), bias=nested.bias)
