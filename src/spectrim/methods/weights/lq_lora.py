"""LQ-LoRA: NormalFloat codes plus a low-rank part, bits by integer programming (Guo et al., arXiv 2311.12023).

    1. F = E[(dL/dW)^2]                                             the diagonal Fisher information, as in `fwsvd`
    2. every layer's menu: codes of 2, 3, 4, 8 bits, scales of 2, 3, 4, 8 bits, blocks of 16, 32, 64 weights and of 16,
       64, 256 scales; the error of each, weighed by F                             linalg/quantised_low_rank.py
    3. one entry of the menu for each layer, with the least sum of errors under the budget         linalg/knapsack.py
    4. W ~ Q + L: codes and low-rank part in turn, up to `iterations` rounds
    5. `steps` of training of the low-rank parts against the dense model, codes frozen

L takes at most `rank_bits` bits a weight, in 16-bit numbers that count: at 0.5 it is the paper's rank, 64, for 4096 x
4096 weights, and less for smaller ones. What `keep` leaves is for step 3. The paper tunes on its task or on text; here
step 5 has the loss that all methods are recovered with, and is left out unless asked for. Its errors of step 2 are as
here those of the first round. `weigh=none` takes F = 1, `allocation=uniform` one entry of the menu for all layers.

`solver=columns` (ours) measures errors in the inputs' second moment and outputs' Fisher means, and makes codes by the
column solver that `gptq` has: what one column misses, later ones make up for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from spectrim.engines.frontier import predicted_frontier
from spectrim.engines.learned import skeleton
from spectrim.errors import UsageError
from spectrim.linalg.allocate import Options
from spectrim.linalg.bits import Account, bias_account, correction_account, normal_account
from spectrim.linalg.knapsack import TIME_LIMIT_S, has_solver, knapsack
from spectrim.linalg.normal_float import Form
from spectrim.linalg.quantise import BITS
from spectrim.linalg.quantised_low_rank import (
    Importance,
    calibrated_importance,
    codes_and_factors,
    errors_of_forms,
    importance_of,
)
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.methods.weights.corrections import train_corrections
from spectrim.methods.weights.packed import BytesMethod, Parts, packed_layer
from spectrim.model_method import Job, TrainedModelMethod
from spectrim.models.walk import Layer, Walk, linear_at, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores_normal import NormalStore
from spectrim.stats import Stat, Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MENU = tuple(Form(*entry) for entry in product(BITS, (16, 32, 64), BITS, (16, 64, 256)))
LEAST = Form(bits=2, block=64, scale_bits=2, scale_block=256)


@dataclass(frozen=True, kw_only=True)
class LQLoRA(TrainedModelMethod, BytesMethod):
    """Bits where the loss feels them, and a low-rank part that takes up what rounding misses."""

    info: ClassVar = MethodInfo(
        name="lq-lora",
        family="weights",
        paper="arXiv 2311.12023",
        promise="NormalFloat codes and a low-rank part, bits of each layer by integer programming",
    )
    needs: ClassVar = frozenset({Stat.FISHER, Stat.GRAM})
    presets: ClassVar = {"cut": {"steps": 0}, "trained": {"steps": 300}}
    default_preset: ClassVar = "cut"

    rank_bits: float = 0.5
    weigh: Literal["fisher", "none"] = "fisher"
    allocation: Literal["ilp", "uniform"] = "ilp"
    solver: Literal["nearest", "columns"] = "nearest"
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "rank_bits", self.rank_bits, 0.0, 16.0)
        require_choice(self.info.name, "weigh", self.weigh, ("fisher", "none"))
        require_choice(self.info.name, "allocation", self.allocation, ("ilp", "uniform"))
        require_choice(self.info.name, "solver", self.solver, ("nearest", "columns"))
        require_range(self.info.name, "iterations", self.iterations, 1, 10_000)

    @property
    def sizes(self) -> Mapping[str, Any]:
        """What decides the least size."""
        return {"2 bits": "everywhere", "rank_bits": self.rank_bits}

    def check_model(self, config: "PretrainedConfig", walk: Walk, keep: float) -> None:
        """What all methods of few bits refuse; that SciPy is missing; ranks of 0 that are to be trained."""
        self.check_options(walk)
        super().check_model(config, walk, keep)

    def check_options(self, walk: Walk) -> None:
        """Refuse what no budget makes possible."""
        if self.allocation == "ilp" and not has_solver():
            raise UsageError(
                "method lq-lora with allocation=ilp needs the package SciPy, which is not installed; install "
                "spectrim[ilp], or pass --set allocation=uniform"
            )
        if self.steps and not any(self.rank_of(layer) for layer in walk.layers):
            raise UsageError(
                f"method lq-lora: rank_bits={self.rank_bits:g} leaves every layer a low-rank part of rank 0, so there "
                f"is nothing that {self.steps} steps could train; pass a larger rank_bits, or steps=0"
            )

    def rank_of(self, layer: Layer) -> int:
        """The largest rank within `rank_bits` bits a weight."""
        one = correction_account(layer.outputs, layer.inputs, 1).total
        return min(int(self.rank_bits * layer.weight_numbers / 8 / one), layer.outputs, layer.inputs)

    def costs(self, layer: Layer) -> list[int]:
        """Bytes of codes and scales by entry of the menu."""
        return [normal_account(layer.outputs, layer.inputs, form).total for form in menu_of(layer)]

    def low_rank(self, layer: Layer) -> Account:
        """What L takes."""
        return correction_account(layer.outputs, layer.inputs, self.rank_of(layer))

    def account(self, layer: Layer) -> Account:
        """The cheapest entry of the menu, and L."""
        return normal_account(layer.outputs, layer.inputs, within(LEAST, layer)) + self.low_rank(layer)

    def stored(self, walk: Walk, budget: int) -> int:
        """As good as all of it, up to 8 bits everywhere."""
        fixed = (self.low_rank(la) + bias_account(la.outputs, bias=la.has_bias) for la in walk.layers)
        return min(budget, sum(max(self.costs(la)) for la in walk.layers) + sum(part.total for part in fixed))

    def compress(self, job: Job) -> "PreTrainedModel":
        """Steps 2 to 5."""
        self.check_options(job.walk)
        model = skeleton(job.dense)
        with job.timed("allocate"):
            forms = self.forms(job)
        with job.timed("decompose"):
            for done, layer in enumerate(job.walk.layers):
                model.set_submodule(layer.name, self.packed(job, layer, forms[layer.name]))
                if job.progress is not None:
                    job.progress("decompose", done + 1, len(job.walk.layers))
        if self.steps:
            train_corrections(self, model, job)
        return model

    def forms(self, job: Job) -> dict[str, Form]:
        """Steps 2 and 3."""
        layers = job.walk.layers
        cheapest = sum(min(self.costs(layer)) for layer in layers)
        left = self.bytes_left(job.walk, job.budget, job.keep) + cheapest
        menus = []
        for done, layer in enumerate(layers):
            weight = weight_of(linear_at(job.dense, layer.name)).detach().double()
            importance = self.importance(job.stats[layer.name], weight)
            errors = errors_of_forms(weight, menu_of(layer), self.rank_of(layer), importance)
            menus.append(Options(errors, torch.tensor(self.costs(layer))))
            if job.progress is not None:
                job.progress("measure menus", done + 1, len(layers))
        job.frontier.extend(predicted_frontier(job.walk, menus, fixed=sum(self.low_rank(la).total for la in layers)))
        chosen = self.settled(job, menus, left) if self.allocation == "ilp" else one_for_all(menus, left)
        return {layer.name: menu_of(layer)[index] for layer, index in zip(layers, chosen, strict=True)}

    def settled(self, job: Job, menus: list[Options], left: int) -> list[int]:
        """Step 3; a choice that is not proven best is told."""
        choice, gap = knapsack(menus, left)
        if gap > 0:
            job.warnings.append(
                f"lq-lora: HiGHS was stopped after {TIME_LIMIT_S:g} s; the errors of the choice may be {gap:.2%} above "
                "the least (--set allocation=uniform needs no search)"
            )
        return choice

    def importance(self, stats: Stats, weight: Tensor) -> Importance:
        """Step 1."""
        fisher = stats.get(Stat.FISHER) if self.weigh == "fisher" else torch.ones_like(weight)
        return (
            importance_of(fisher) if self.solver == "nearest" else calibrated_importance(fisher, stats.get(Stat.GRAM))
        )

    def packed(self, job: Job, layer: Layer, form: Form) -> PackedLinear:
        """Step 4."""
        measured = job.stats[layer.name]

        def parts(weight: Tensor, dtype: torch.dtype) -> Parts:
            importance = self.importance(measured, weight)
            found = codes_and_factors(weight, form, self.rank_of(layer), importance, iterations=self.iterations)
            return NormalStore.holding(found.rounded, form, dtype=dtype), found.factors

        return packed_layer(layer.name, linear_at(job.dense, layer.name), measured, parts)


def menu_of(layer: Layer) -> list[Form]:
    """The menu with blocks no larger than the layer: the same number of entries for all layers."""
    return [within(form, layer) for form in MENU]


def within(form: Form, layer: Layer) -> Form:
    """The form with blocks no larger than the layer."""
    block = min(form.block, layer.inputs)
    return form._replace(block=block, scale_block=min(form.scale_block, layer.outputs * -(-layer.inputs // block)))


def one_for_all(menus: list[Options], budget: int) -> list[int]:
    """The entry that fits when every layer takes it, with the least sum of errors; menus have the same entries."""
    costs = torch.stack([menu.cost for menu in menus]).sum(0)
    errors = torch.stack([menu.error for menu in menus]).sum(0)
    return [int(torch.where(costs <= budget, errors, torch.inf).argmin())] * len(menus)
