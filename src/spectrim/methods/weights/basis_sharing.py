"""Basis Sharing: neighbouring layers keep one basis between them (Wang, Chen, Lin, Li, Zhang, arXiv 2410.03765).

    1. group `group_size` consecutive blocks; of each kind of projection (all q, all k, ...) take the group's weights
       W_1 ... W_L, each (O, I), and the mean G of the Gram matrices of their inputs
    2. whitened SVD of the weights, one below the other; its first R right factors are the basis B (R, I)
    3. W_l' = C_l B with the coefficients C_l (O, R) of each layer:     R (I + L O) numbers, where two factors of every
       weight take R L (I + O)
    4. the same share of every group's numbers gives R

Shared are the projections that read the residual stream (q, k, v, gate, up of a Llama); those that write to it (o,
down) lose more by sharing than they save, says the paper, and keep two factors of their own.

The paper takes C from the same SVD (`fit="pooled"`: best for inputs drawn from all layers of the group alike), and from
40 % of cut on solves for C again on inputs from the compressed model. Given the basis, each layer's own inputs have a
closed form too, which can only lower the layer's error (`fit="own"`); `fit="drifted"` takes each layer's own inputs in
the compressed model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.layerwise import solver_errors_of, swap
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.errors import UsageError
from spectrim.linalg.allocate import equal_shares
from spectrim.linalg.factor import Factors
from spectrim.linalg.shared import fitted, group_cost, shared_factors
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, ModelMethod
from spectrim.models.walk import Layer, linear_at, stream_readers, weight_of
from spectrim.nn.linears import LowRankLinear
from spectrim.nn.shared import SharedLinear
from spectrim.replacement import encode
from spectrim.stats import Stat

Group = tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class BasisSharing(ModelMethod):
    """Whitened SVD in which neighbouring layers share the right factor."""

    info: ClassVar = MethodInfo(
        name="basis-sharing",
        family="weights",
        paper="arXiv 2410.03765",
        promise="more rank at the same size: neighbouring layers share one basis",
    )
    needs: ClassVar = frozenset({Stat.GRAM})
    codecs: ClassVar = ("factor", "shared")

    group_size: int = 2
    share: Literal["readers", "all"] = "readers"
    fit: Literal["pooled", "own", "drifted"] = "own"

    def __post_init__(self) -> None:
        require_range("basis-sharing", "group_size", self.group_size, 1, 1024)
        require_choice("basis-sharing", "share", self.share, ("readers", "all"))
        require_choice("basis-sharing", "fit", self.fit, ("pooled", "own", "drifted"))

    def compress(self, job: Job) -> PreTrainedModel:
        """Steps 1 to 4."""
        groups = self.groups(job)
        student = skeleton(job.dense)
        for group, rank in zip(groups, ranks_of(groups, job), strict=True):
            if rank is not None:
                with solver_errors_of(group[0].name, f"the stacked weights of {len(group)} layers (basis-sharing)"):
                    place(student, group, self.factors(group, rank, job))
        if self.fit == "drifted":
            refit(student, job)
        return student

    def groups(self, job: Job) -> list[Group]:
        """The layers that share, in order; a layer that does not is a group of its own."""
        shared = self.shared_kinds(job)
        found: dict[tuple[object, ...], list[Layer]] = {}
        for layer in job.walk.layers:
            kind = kind_of(layer, job)
            # Blocks of one kind of layer may differ (every other one has experts): equal shapes only, and no gaps.
            place = layer.block // self.group_size if kind in shared else layer.name
            found.setdefault((kind, layer.outputs, layer.inputs, place), []).append(layer)
        return [tuple(group) for group in found.values()]

    def shared_kinds(self, job: Job) -> frozenset[str]:
        """Which projections share, by their place in a block."""
        if self.share == "all":
            return frozenset(kind_of(layer, job) for layer in job.walk.layers)
        readers = stream_readers(job.dense, job.walk.layers)
        if not readers:
            raise UsageError(
                f"method basis-sharing: in {type(job.dense).__name__} no linear layer reads what a norm puts out, "
                "which is where layers share a basis; take --set share=all, or method svd-llm"
            )
        return frozenset(kind_of(layer, job) for layer in job.walk.layers if layer.name in readers)

    def factors(self, group: Group, rank: int, job: Job) -> list[Factors]:
        """(C_l, B) of every layer, float64; B is the same tensor."""
        weights = [weight_of(linear_at(job.dense, la.name)).detach().double() for la in group]
        grams = [job.stats[la.name].get(Stat.GRAM) for la in group]
        found = shared_factors(weights, torch.stack(grams).mean(0), rank)
        coefficients: Sequence[Tensor] = found.coefficients
        if self.fit != "pooled":
            coefficients = [fitted(w, found.basis, g) for w, g in zip(weights, grams, strict=True)]
        return [Factors(own, found.basis) for own in coefficients]


def kind_of(layer: Layer, job: Job) -> str:
    """The layer's place in its block, e.g. self_attn.q_proj."""
    return layer.name.removeprefix(job.walk.block_names[layer.block] + ".")


def ranks_of(groups: Sequence[Group], job: Job) -> list[int | None]:
    """The rank of every group under the budget, the same share of numbers for all; None: it stays dense."""
    costs, sizes = [], []
    for group in groups:
        size = sum(layer.weight_numbers for layer in group)
        rank = torch.arange(1, min(group[0].inputs, sum(la.outputs for la in group)) + 1)
        cost = group_cost([la.outputs for la in group], group[0].inputs, rank)
        costs.append(torch.cat([cost[cost < size], torch.tensor([size])]))
        sizes.append(size)
    biases = sum(layer.numbers - layer.weight_numbers for layer in job.walk.layers)
    least = sum(int(cost[0]) for cost in costs)
    if job.budget - biases < least:
        raise UsageError(
            f"keep {job.keep:g} leaves {max(job.budget - biases, 0):,} numbers for {len(groups)} groups of weights; "
            f"rank 1 everywhere takes {least:,}. The smallest reachable keep is "
            f"{(least + biases) / job.walk.numbers + 5e-5:.4f}"
        )
    choice = equal_shares(costs, sizes, job.budget - biases)
    return [None if k == len(cost) - 1 else k + 1 for k, cost in zip(choice, costs, strict=True)]


def place(student: PreTrainedModel, group: Group, factors: Sequence[Factors]) -> None:
    """Put the group's layers in the place of the dense ones; the first owns the basis. One layer alone: two factors."""
    if len(group) == 1:
        module = linear_at(student, group[0].name)
        bias = None if module.bias is None else module.bias.detach()
        swap(student, group[0].name, encode(factors[0], "factor", like=weight_of(module).detach(), bias=bias))
        return
    owner: SharedLinear | None = None
    for layer, own in zip(group, factors, strict=True):
        old = linear_at(student, layer.name)
        new = SharedLinear(
            layer.inputs, layer.outputs, len(own.right), bias=layer.has_bias,
            basis=None if owner is None else group[0].name, device=old.weight.device, dtype=old.weight.dtype,
        ).train(old.training)  # fmt: skip
        with torch.no_grad():
            new.U.weight.copy_(own.left)
            if new.U.bias is not None:
                new.U.bias.copy_(old.bias)
            if owner is None:
                owner = new
                new.basis_weight().copy_(own.right)
            else:
                new.borrow(owner)
        student.set_submodule(layer.name, new)


def refit(student: PreTrainedModel, job: Job) -> None:
    """Coefficients for what each layer reads in the compressed model, all measured before any is changed."""
    with job.timed("refit"):
        drifted = measure(student, job.walk, job.calibration, frozenset({Stat.GRAM}), progress=job.progress)
        for layer in job.walk.layers:
            module = student.get_submodule(layer.name)
            basis = basis_of(module)
            if basis is None:
                continue
            weight = weight_of(linear_at(job.dense, layer.name)).detach().double()
            with solver_errors_of(layer.name, "the Gram matrix of its inputs in the compressed model"), torch.no_grad():
                left = fitted(weight, basis.detach().double(), drifted[layer.name].get(Stat.GRAM))
                module.get_parameter("U.weight").copy_(left)


def basis_of(module: nn.Module) -> Tensor | None:
    """The right factor (R, I) that a layer uses; None of one that stayed dense."""
    if isinstance(module, SharedLinear):
        return module.basis_weight()
    return module.V.weight if isinstance(module, LowRankLinear) else None
