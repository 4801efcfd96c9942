"""CompactifAI: weights as matrix product operators, healed by training (arXiv 2401.14109).

1. every weight W becomes a chain of `sites` cores by sequential truncated SVDs               linalg/mpo.py
2. profile: attention or feed-forward layers of one block at a time are put in that form at a few bond dimensions, the
   rest stays dense, and what the model loses is measured                                      engines/shares.py
3. the bond dimensions with the least sum of losses under the budget; parts that lose most stay dense
4. healing: `steps` of training of the cores against the dense model                           engines/distil.py

Needs no statistics: the cuts are made in the weight's own norm, as in the paper. The paper heals by training on text;
here the loss is the one that all methods are recovered with. It quantises afterwards, which is left out.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from spectrim.engines.distil import train_in_place
from spectrim.engines.learned import skeleton
from spectrim.engines.shares import levels_around, profile, shares_by, weight_numbers_left
from spectrim.linalg.allocate import fill_uniform
from spectrim.linalg.mpo import full_bond, largest_bond, mpo_numbers, sites_of, to_mpo
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, TrainedModelMethod
from spectrim.models.walk import Layer, linear_at, weight_of
from spectrim.nn.mpo import ChainLinear, MPOLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class CompactifAI(TrainedModelMethod):
    """Tensor networks; of use only with healing, see docs/compactifai.md."""

    info: ClassVar = MethodInfo(
        name="compactifai",
        family="weights",
        paper="arXiv 2401.14109",
        promise="matrix product operators, bonds by a profile of the model; to be healed by training",
    )
    codecs: ClassVar = ("mpo",)
    presets: ClassVar = {"cut": {"steps": 0}, "healed": {"steps": 300}}
    default_preset: ClassVar = "cut"

    sites: int = 2
    allocation: Literal["profile", "uniform"] = "profile"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "sites", self.sites, 2, 8)
        require_choice(self.info.name, "allocation", self.allocation, ("profile", "uniform"))

    def compress(self, job: Job) -> "PreTrainedModel":
        model = skeleton(job.dense)
        if job.keep == 1:
            return model
        with job.timed("allocate"):
            bonds = self.bonds(job)
        with job.timed("decompose"):
            for layer in job.walk.layers:
                chi = bonds[layer.name]
                if chi is not None:
                    model.set_submodule(layer.name, self.cut(job.dense, layer, chi))
        if self.steps:
            with job.timed("distil"):
                self.heal(model, job)
        return model

    def bonds(self, job: Job) -> dict[str, int | None]:
        """The bond dimension of every layer; None: it stays dense."""
        budget = weight_numbers_left(job.walk, job.budget, self.info.name, lambda la: self.costs(la)[0])
        share = budget / sum(layer.weight_numbers for layer in job.walk.layers)
        shares = dict.fromkeys((layer.name for layer in job.walk.layers), share)
        if self.allocation == "profile":
            levels = levels_around(share)

            def small(layer: Layer, share: float) -> MPOLinear:
                return self.cut(job.dense, layer, self.bond_within(layer, share))

            found = profile(job.dense, job.walk, small, levels, job.calibration, seed=job.seed, progress=job.progress)
            shares = shares_by(found, levels, job.walk, budget)
        menus = [torch.tensor(self.costs(layer)) for layer in job.walk.layers]
        start = [
            max(0, int((menu <= shares[layer.name] * layer.weight_numbers).sum()) - 1)
            for menu, layer in zip(menus, job.walk.layers, strict=True)
        ]
        chosen = fill_uniform(menus, start, budget)  # what whole bonds leave over
        return {
            layer.name: None if index == len(menu) - 1 else index + 1
            for layer, menu, index in zip(job.walk.layers, menus, chosen, strict=True)
        }

    def costs(self, layer: Layer) -> list[int]:
        """Numbers of a layer at bond 1, 2, .. while that is less than dense, then dense."""
        sites = sites_of(layer.outputs, layer.inputs, self.sites)
        bonds = (mpo_numbers(sites, chi) for chi in range(1, full_bond(sites) + 1))
        return [*(cost for cost in bonds if cost < layer.weight_numbers), layer.weight_numbers]

    def bond_within(self, layer: Layer, share: float) -> int:
        """The largest bond dimension within a share of the weight's numbers, at least 1."""
        return max(
            1, largest_bond(sites_of(layer.outputs, layer.inputs, self.sites), int(share * layer.weight_numbers))
        )

    def cut(self, dense: "PreTrainedModel", layer: Layer, chi: int) -> MPOLinear:
        """The layer as a chain with bond dimension `chi`."""
        module = linear_at(dense, layer.name)
        weight = weight_of(module).detach()
        cores = to_mpo(weight.double(), sites_of(layer.outputs, layer.inputs, self.sites), chi)
        return MPOLinear.from_cores(cores, chi, module.bias, weight)

    def heal(self, model: "PreTrainedModel", job: Job) -> list[float]:
        """Train all cores in place against the dense model."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, MPOLinear)}
        chains = {name: ChainLinear(layer) for name, layer in layers.items()}
        return train_in_place(
            model, job.dense, layers, chains, lambda name: chains[name].stored(layers[name]), job.training,
            advice=f"Lower the learning rate (--set learning_rate={self.learning_rate / 3:.2g})", steps=self.steps,
            batch_size=self.batch_size, learning_rate=self.learning_rate, seed=job.seed, stage="healing",
            progress=job.progress, checkpoint=job.checkpoint,
        )  # fmt: skip
