"""LPAF: low-rank prune-and-factorise (Ren and Zhu, arXiv 2306.14152).

    1. fine-tune while pruning single entries by movement: scores -sum W dL/dW, sparsity rising along a cubic.
       What such pruning leaves stands in few rows and columns, and so close to a matrix of low rank; what pruning by
       size leaves does not                                                             engines/prune.py
    2. sparsity-aware SVD: columns weigh by the number of entries they kept            linalg/movement.py
    3. equal shares of the budget; the factors take the place of the pruned weights
    4. mixed-rank fine-tuning: layers use now the factors, now the pruned weight, the factors ever more often; two
       passes agree with each other                                                    engines/mixed.py

The pruned weights are gone at the end. The paper fine-tunes a classifier on its task; here the loss is the one that
distillation to the dense model has (`label_share` of it next-token loss; 1: only that, no teacher). Steps, rates and
the weight of the consistency term are ours: the paper's regime is thousands of steps.
"""

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from spectrim.engines.layerwise import solver_errors_of, swap
from spectrim.engines.learned import skeleton
from spectrim.engines.mixed import train_mixed
from spectrim.engines.prune import prune
from spectrim.engines.ranks import uniform_plan
from spectrim.linalg.factor import Spectrum, truncate
from spectrim.linalg.movement import sparse_spectrum
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, ModelMethod
from spectrim.nn.pruned import PrunedLinear, Scores
from spectrim.replacement import Replacement, Storage, Target, dense_replacement, encode


@dataclass(frozen=True, kw_only=True)
class LPAF(ModelMethod):
    """Prune by movement, factorise what is left, fine-tune between the two."""

    info: ClassVar = MethodInfo(
        name="lpaf",
        family="weights",
        paper="arXiv 2306.14152",
        promise="prunes first, so that what is factorised is nearly of low rank; trains",
    )
    codecs: ClassVar = ("factor", "pivot")
    trains_factors: ClassVar = True

    storage: Storage = "factor"
    sparsity: float = 0.7
    scores: Scores = "movement"
    weigh: bool = True
    prune_steps: int = 300
    mixed_steps: int = 300
    batch_size: int = 32
    learning_rate: float = 0.01
    """Of both trainings; relative to the size of what is trained."""
    label_share: float = 0.1
    consistency: float = 0.1

    def __post_init__(self) -> None:
        require_choice("lpaf", "storage", self.storage, ("factor", "pivot"))
        require_range("lpaf", "sparsity", self.sparsity, 0.0, 0.99)
        require_choice("lpaf", "scores", self.scores, ("movement", "size"))
        require_range("lpaf", "prune_steps", self.prune_steps, 1, 1_000_000)
        require_range("lpaf", "mixed_steps", self.mixed_steps, 0, 1_000_000)
        require_range("lpaf", "batch_size", self.batch_size, 1, 65_536)
        require_range("lpaf", "learning_rate", self.learning_rate, 1e-9, 10.0)
        require_range("lpaf", "label_share", self.label_share, 0.0, 1.0)
        require_range("lpaf", "consistency", self.consistency, 0.0, 100.0)

    @property
    def windows_trained(self) -> int:
        return (self.prune_steps + self.mixed_steps) * self.batch_size

    def compress(self, job: Job) -> PreTrainedModel:
        """Steps 1 to 4; at keep 1 there is nothing to prune for."""
        if job.keep >= 1:
            return skeleton(job.dense)
        told = {
            "batch_size": self.batch_size, "learning_rate": self.learning_rate, "label_share": self.label_share,
            "seed": job.seed, "progress": job.progress, "checkpoint": job.checkpoint,
        }  # fmt: skip
        given = (job.dense, job.walk)
        with job.timed("prune"):
            layers = prune(
                skeleton(job.dense), *given, job.training, sparsity=self.sparsity, steps=self.prune_steps,
                scores=self.scores, **told,
            )  # fmt: skip
        with job.timed("decompose"):
            spectra = {name: self.spectrum(name, layer) for name, layer in layers.items()}
            plan = uniform_plan(job.walk, self.storage, {name: s.energy for name, s in spectra.items()}, job.keep)
            student = skeleton(job.dense)
            for name, layer in layers.items():
                swap(student, name, stored(layer, spectra[name], plan.targets[name]))
        with job.timed("mixed"):
            pruned = {name: layer.pruned() for name, layer in layers.items()}
            train_mixed(
                student, *given, pruned, job.training, steps=self.mixed_steps, consistency=self.consistency, **told
            )
        return student

    def spectrum(self, name: str, layer: PrunedLinear) -> Spectrum:
        """All components of one pruned weight."""
        with solver_errors_of(name, "its pruned weight (lpaf)"):
            return sparse_spectrum(layer.weight.detach().double(), layer.mask, weigh=self.weigh)


def stored(layer: PrunedLinear, spectrum: Spectrum, target: Target) -> Replacement:
    """A pruned layer in its target codec; past the break-even it stays what it is after pruning."""
    bias = None if layer.bias is None else layer.bias.detach()
    if target.codec == "dense":
        return dense_replacement(layer.pruned(), bias)
    return encode(truncate(spectrum, target.rank), target.codec, like=layer.weight.detach(), bias=bias)
