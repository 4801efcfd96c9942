"""DSFormer: dense times semi-sparse factors (arXiv 2312.13211).

    W ~ S D       D (k, I) dense;  S (O, k) with s nonzeros in every row, density s / k

1. M = W R, R R^T = E[x x^T] of the layer's inputs, shrunk a little: rows of W are coded by what they do to inputs
2. S by alternating least squares with hard thresholding, from the truncated SVD                linalg/semi_sparse.py
   (`solver=straight-through`: by the paper's factoriser on the same error)
3. D = S^+ W, the least-squares answer, which is the same in every metric of the inputs
4. `steps` of the straight-through factoriser on the task: S is cut from a dense latent whose gradient is that of S, and
   its support is chosen anew every `reselect_every` steps                     nn/semi_sparse.py, engines/distil.py

One dictionary a weight: with two or four for blocks of rows the error is higher at equal numbers (docs/dsformer.md).
The task is here the dense model's own distribution. Every layer keeps the same share; the support's words are counted.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from spectrim.engines.distil import train_in_place
from spectrim.engines.learned import skeleton
from spectrim.engines.loop import Buffers
from spectrim.engines.shares import weight_numbers_left
from spectrim.errors import NumericalError
from spectrim.linalg.metric import Root, root_of, shrink
from spectrim.linalg.semi_sparse import (
    SemiSparse,
    Size,
    alternate,
    best_atoms,
    numbers_of,
    size_within,
    straight_through,
)
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, TrainedModelMethod
from spectrim.models.walk import Layer, linear_at, weight_of
from spectrim.nn.semi_sparse import LatentLinear, SemiSparseLinear
from spectrim.stats import Stat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHRINKAGE = 0.01
"""Of the inputs' Gram matrix, as in the other methods."""


@dataclass(frozen=True, kw_only=True)
class DSFormer(TrainedModelMethod):
    """A union of subspaces in the place of one: lower error than truncated SVD at equal numbers."""

    info: ClassVar = MethodInfo(
        name="dsformer",
        family="weights",
        paper="arXiv 2312.13211",
        promise="dense times semi-sparse factors; lower error than SVD at equal bytes, support counted",
    )
    needs: ClassVar = frozenset({Stat.GRAM})
    codecs: ClassVar = ("semi-sparse",)
    presets: ClassVar = {"cut": {"steps": 0}, "trained": {"steps": 300}}
    default_preset: ClassVar = "cut"

    density: float = 0.4
    solver: Literal["alternate", "straight-through"] = "alternate"
    rounds: int = 30
    """Of the alternating solver; the other one takes ten steps a round."""
    reselect_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self.info.name, "density", self.density, 0.01, 1.0)
        require_choice(self.info.name, "solver", self.solver, ("alternate", "straight-through"))
        require_range(self.info.name, "rounds", self.rounds, 1, 10_000)
        require_range(self.info.name, "reselect_every", self.reselect_every, 1, 1_000_000)

    def compress(self, job: Job) -> "PreTrainedModel":
        model = skeleton(job.dense)
        sizes = {} if job.keep == 1 else self.sizes(job)
        with job.timed("decompose"):
            roots: dict[int, Root] = {}
            for done, layer in enumerate(job.walk.layers):
                if layer.name in sizes:
                    model.set_submodule(layer.name, self.factorise(job, layer, sizes[layer.name], roots))
                if job.progress is not None:
                    job.progress("factorise", done + 1, len(job.walk.layers))
        if self.steps and sizes:
            with job.timed("distil"):
                self.train(model, job, roots)
        return model

    def sizes(self, job: Job) -> dict[str, Size]:
        """Atoms and nonzeros of every layer: equal shares, what one cannot use goes on to the next."""

        def least(layer: Layer) -> int:
            return numbers_of(layer.outputs, layer.inputs, Size(1, 1))

        left = weight_numbers_left(job.walk, job.budget, self.info.name, least)
        waiting, sizes = sum(layer.weight_numbers for layer in job.walk.layers), {}
        for layer in job.walk.layers:
            own = min(int(left * layer.weight_numbers / waiting), layer.weight_numbers)
            own = max(own, min(least(layer), layer.weight_numbers))
            waiting -= layer.weight_numbers
            size = size_within(layer.outputs, layer.inputs, own, self.density) if own < layer.weight_numbers else None
            if size is not None:
                sizes[layer.name] = size
            left -= layer.weight_numbers if size is None else numbers_of(layer.outputs, layer.inputs, size)
        return sizes

    def factorise(self, job: Job, layer: Layer, size: Size, roots: dict[int, Root]) -> SemiSparseLinear:
        """The layer in semi-sparse form, found in float32 in the metric of its inputs; D in float64."""
        module = linear_at(job.dense, layer.name)
        weight = weight_of(module).detach()
        measured = (weight.double() @ self.root(job, layer.name, roots).root).float()
        found = self.found(measured, size, job.seed)
        sparse = found.sparse.double()
        atoms = best_atoms(weight.double(), sparse)
        if not bool(torch.isfinite(atoms).all()):
            raise NumericalError(f"{layer.name}: dsformer found factors that are not finite; use more calibration text")
        return SemiSparseLinear.from_factors(SemiSparse(sparse, atoms), size, module.bias, weight)

    def found(self, measured: Tensor, size: Size, seed: int) -> SemiSparse:
        """The factors of M (O, I)."""
        if self.solver == "alternate":
            return alternate(measured, size, rounds=self.rounds, seed=seed)
        return straight_through(measured, size, steps=10 * self.rounds, seed=seed)

    def root(self, job: Job, name: str, known: dict[int, Root]) -> Root:
        """Root of the metric of a layer's inputs; layers that share them share it."""
        gram = job.stats[name].get(Stat.GRAM)
        if gram.data_ptr() not in known:
            known[gram.data_ptr()] = root_of(shrink(gram, SHRINKAGE))
        return known[gram.data_ptr()]

    def train(self, model: "PreTrainedModel", job: Job, roots: dict[int, Root]) -> list[float]:
        """The straight-through factoriser on the model's outputs, in place."""
        layers = {n: m for n, m in model.named_modules() if isinstance(m, SemiSparseLinear)}
        latent = {name: LatentLinear(layer, self.root(job, name, roots)) for name, layer in layers.items()}

        def before_step(step: int) -> None:
            if step and step % self.reselect_every == 0:
                for layer in latent.values():
                    layer.reselect()

        def restore(saved: Buffers) -> None:
            for name, support in saved.tensors.items():
                latent[name].support.copy_(support)

        return train_in_place(
            model, job.dense, layers, latent, lambda name: latent[name].stored(layers[name]), job.training,
            advice=f"Lower the learning rate (--set learning_rate={self.learning_rate / 3:.2g})", steps=self.steps,
            batch_size=self.batch_size, learning_rate=self.learning_rate, seed=job.seed, stage="straight through",
            progress=job.progress, checkpoint=job.checkpoint, before_step=before_step, restore=restore,
            state=lambda: Buffers({name: layer.support for name, layer in latent.items()}, {}),
        )  # fmt: skip
