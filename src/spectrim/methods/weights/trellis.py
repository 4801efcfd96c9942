"""Trellis-coded weights: 1 to 4 bits each, every layer with as many as it earns, under one budget of bytes.

    1. loss of layer l at d bits, to second order:   1/2 D(d) sum_i B_ii s_i^2 sum_j 1 / U_jj^2
       A = E[x x^T] = (U^T U)^-1, B = E[g g^T], s_i the rows' root mean squares, D(d) the error of the code at d bits
    2. bits of all layers: least sum of losses under the budget (1 to 4 in halves, 8, or as they are)
    3. in running order: the weight makes up for the drift of its inputs (linalg/factor.drift_target), and is written
       in codes column by column, later columns making up for the error of earlier ones (linalg/trellis_columns.py)

`keep` is the share of the bytes that decoder linears take in 16 bits, all of which is used. D(d) is known beforehand,
so that no layer has to be quantised more than once.

Sources: trellis and block feedback of QTIP (arXiv 2406.11235); GPTAQ (arXiv 2504.02692) for targets behind drifted
inputs; the choice of bits by predicted loss is ours. Not taken from QTIP: rotations of inputs and outputs (weights that
are normal already gain nothing by them, and they cost a transform at every layer), fine-tuning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from spectrim.engines.learned import skeleton
from spectrim.engines.paired import Moments, in_order
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.allocate import Options, allocate
from spectrim.linalg.bits import VALUE_BYTES, Account, Unit, bias_account, budget_in, uniform_account
from spectrim.linalg.columns import DAMPING, gptq, inverse_root
from spectrim.linalg.factor import drift_target, token_share
from spectrim.linalg.solver import SolverError
from spectrim.linalg.trellis import RATES, WINDOW, WINDOWS, Rate, distortion
from spectrim.linalg.trellis_columns import trellis_account, trellis_columns
from spectrim.method import MethodInfo, require_range
from spectrim.model_method import Job, ModelMethod
from spectrim.models.walk import Layer, Walk, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores import Store
from spectrim.nn.stores_trellis import TrellisStore
from spectrim.nn.stores_uniform import UniformStore
from spectrim.stats import Stat, Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BYTE_DISTORTION = 8e-5
"""Of 8-bit codes with one grid a row of normal weights: a range of +-4.5 deviations in 255 steps, (9 / 255)^2 / 12."""


class Form(NamedTuple):
    """What a layer may be: trellis codes at a rate; 8-bit codes, a grid a row (None); or as it is ("dense")."""

    rate: Rate | None = None
    dense: bool = False

    def account(self, layer: Layer) -> Account:
        """Its bytes."""
        if self.dense:
            return Account(values=layer.weight_numbers * VALUE_BYTES)
        if self.rate is None:
            return uniform_account(layer.outputs, layer.inputs, 8, 0, symmetric=True)
        return trellis_account(layer.outputs, layer.inputs, self.rate)

    @property
    def error(self) -> float:
        """Mean squared error of normal weights of variance 1."""
        if self.dense:
            return 0.0
        return BYTE_DISTORTION if self.rate is None else distortion(self.rate)


def forms_of(window: int) -> tuple[Form, ...]:
    """By what they lose, most first."""
    return (*(Form(rate._replace(window=window)) for rate in RATES), Form(), Form(dense=True))


@dataclass(frozen=True, kw_only=True)
class Trellis(ModelMethod):
    """Codes of 1 to 4 bits a weight, bits where they are worth most."""

    info: ClassVar = MethodInfo(
        name="trellis",
        family="weights",
        paper="arXiv 2406.11235",
        promise="fewest bytes for the same loss: trellis codes, bits where they are worth most",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    codecs: ClassVar[tuple[str, ...]] = ("packed",)
    budget_unit: ClassVar[Unit] = "bytes"

    damping: float = DAMPING
    window: int = WINDOW
    """Bits that decide a weight: more are better and slower, 2^window states for every weight."""
    propagate: float = 0.5
    """How much of the drift of its inputs a weight makes up for, where there is text enough to know it."""
    output_shrinkage: float = 0.2

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise UsageError(f"method trellis: window must be one of {', '.join(map(str, WINDOWS))}, got {self.window}")
        require_range("trellis", "damping", self.damping, 1e-8, 100.0)
        require_range("trellis", "propagate", self.propagate, 0.0, 1.0)
        require_range("trellis", "output_shrinkage", self.output_shrinkage, 0.0, 1.0)

    def check_model(self, config: "PretrainedConfig", walk: Walk, keep: float) -> None:
        """Refuse a budget below 1 bit everywhere."""
        budget_for_weights(walk, budget_in("bytes", walk.numbers, keep), keep)

    def least(self, walk: Walk) -> int:
        """1 bit everywhere, and biases."""
        return least_bytes(walk)

    def compress(self, job: Job) -> "PreTrainedModel":
        """Steps 1 to 3."""
        layers = {layer.name: layer for layer in job.walk.layers}
        with job.timed("allocate"):
            worth = {n: self.loss_scale(weight_of(job.dense.get_submodule(n)), job.stats[n], n) for n in layers}
            budget = budget_for_weights(job.walk, job.budget, job.keep)
            forms = dict(zip(layers, choose(job.walk.layers, worth, budget, forms_of(self.window)), strict=True))
        model = skeleton(job.dense)

        def treat(names: list[str], moments: Moments | None) -> None:
            for name in names:
                module = job.dense.get_submodule(name)
                placed = self.coded(
                    module, layers[name], job.stats[name], moments, forms[name], job.calibration.numel()
                )
                if placed is not None:
                    model.set_submodule(name, placed)

        in_order(job.dense, model, job.walk, job.calibration, treat, progress=job.progress)
        return model

    def loss_scale(self, weight: Tensor, stats: Stats, name: str) -> float:
        """What step 1 has beside D(d)."""
        if not stats.is_finite():
            raise NumericalError(f"{name}: its statistics hold NaN or Inf; measure again on other text")
        rows = (weight.detach().double().square().mean(1) * self.row_importance(stats)).sum()
        columns = self.inverse_root(stats.get(Stat.GRAM), name).diagonal().square().reciprocal().sum()
        return float(rows * columns) / 2

    def row_importance(self, stats: Stats) -> Tensor:
        """(O,): the gradients' mean squares, drawn to their mean."""
        own = stats.get(Stat.OUTPUT_GRAD).diagonal()
        return torch.lerp(own, own.mean(), self.output_shrinkage)

    def inverse_root(self, gram: Tensor, name: str) -> Tensor:
        """U; NumericalError that names the layer."""
        try:
            return inverse_root(gram, damping=self.damping)
        except SolverError as error:
            raise NumericalError(f"{name}: {error}; use more calibration text") from error

    def coded(
        self, module: nn.Module, layer: Layer, stats: Stats, moments: Moments | None, form: Form, tokens: int
    ) -> PackedLinear | None:
        """Step 3 for one layer; None where it stays as it is."""
        if form.dense:
            return None
        weight = weight_of(module).detach()
        target, gram = weight.double(), stats.get(Stat.GRAM)
        if moments is not None:
            cross, here = moments
            share = token_share(tokens, layer.inputs)
            target = drift_target(target, cross, here, mix=share * self.propagate)
            gram = torch.lerp(gram, here, share)
        base: Store
        if form.rate is None:
            base = UniformStore.holding(
                gptq(target, gram, 8, 0, symmetric=True, damping=self.damping), bits=8, group_size=0, dtype=weight.dtype
            )
        else:
            upper = self.inverse_root(gram, layer.name)
            coded = trellis_columns(target, upper, form.rate, importance=self.row_importance(stats))
            base = TrellisStore.holding(coded, layer.inputs, form.rate, dtype=weight.dtype)
        return PackedLinear.holding(base, None, cast("Tensor | None", module.bias), dtype=weight.dtype)


def least_bytes(walk: Walk) -> int:
    """All weights in their smallest forms, and biases. Of few outputs that is not 1 bit, since strips are filled up."""
    weights = sum(min(form.account(la).total for form in forms_of(WINDOW)) for la in walk.layers)
    return weights + sum(bias_account(la.outputs, bias=la.has_bias).total for la in walk.layers)


def budget_for_weights(walk: Walk, budget: int, keep: float) -> int:
    """Bytes for all weights, biases paid; UsageError below 1 bit everywhere, with the smallest keep that is enough."""
    least = least_bytes(walk)
    if least > budget:
        smallest = int(least / (walk.numbers * VALUE_BYTES) * 10_000 + 1) / 10_000
        raise UsageError(
            f"method trellis stores at least 1 bit a weight: {least:,} bytes with scales and biases in the decoder's "
            f"linear layers; keep {keep:g} allows {budget:,}. The smallest reachable keep is {smallest:g}"
        )
    return budget - sum(bias_account(la.outputs, bias=la.has_bias).total for la in walk.layers)


def choose(layers: Sequence[Layer], worth: Mapping[str, float], budget: int, forms: Sequence[Form]) -> list[Form]:
    """Step 2."""
    errors = torch.tensor([form.error for form in forms], dtype=torch.float64)
    options = [
        Options(worth[layer.name] * errors, torch.tensor([form.account(layer).total for form in forms]))
        for layer in layers
    ]
    return [forms[k] for k in allocate(options, budget)]
