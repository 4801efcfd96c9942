"""Fewest bytes: every layer in the form that earns its bytes, under one budget; trellis codes are most of them.

    1. the menu of layer l: codes of 1 to 6 and 8 bits, alone or with a low-rank correction or a few entries beside
       them, factors and pivots in 2 to 16 bits, or as it is; what each takes and, to second order, loses
       (engines/forms.py, linalg/predicted.py)
    2. the least sum of losses under the budget (linalg/knapsack.py), perhaps corrected by probes (engines/probe.py)
    3. in running order: the weight makes up for the drift of its inputs (linalg/factor.drift_target), and is put in its
       form; codes column by column, later columns making up for the error of earlier ones (linalg/trellis_columns.py)

`keep` is the share of the bytes that decoder linears take in 16 bits, all of which is used. Losses are known before
anything is coded, so that no layer has to be coded more than once.

Sources: trellis and block feedback of QTIP (arXiv 2406.11235); GPTAQ (arXiv 2504.02692) for targets behind drifted
inputs; the choice of forms by predicted loss is ours. Not taken from QTIP: rotations of inputs and outputs (weights
that are normal already gain nothing by them, and they cost a transform at every layer), fine-tuning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from spectrim.engines.coded import code_pieces, put_in_form
from spectrim.engines.forms import DENSE, Form, Menu, code_menu, codes_of, full_menu, mixed_codes
from spectrim.engines.frontier import predicted_frontier
from spectrim.engines.learned import skeleton
from spectrim.engines.paired import Moments, in_order
from spectrim.engines.probe import WINDOWS as PROBE_WINDOWS
from spectrim.engines.probe import Noise, Probed, corrected, corrections, evolve_forms
from spectrim.engines.quantise_factors import require_finite
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.bits import VALUE_BYTES, Unit, bias_account, budget_in
from spectrim.linalg.columns import DAMPING, inverse_root
from spectrim.linalg.factor import drift_target, token_share
from spectrim.linalg.knapsack import TIME_LIMIT_S, Settled, has_solver, settle
from spectrim.linalg.metric import shrink
from spectrim.linalg.predicted import Measured, in_codes
from spectrim.linalg.solver import LinAlgError, SolverError
from spectrim.linalg.trellis import WINDOW, WINDOWS
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, ModelMethod, Piece
from spectrim.models.walk import Layer, Walk, weight_of
from spectrim.stats import Stat, Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MOST_GAP = 1e-3
"""Of the predicted loss above the optimum; more is told."""


@dataclass(frozen=True, kw_only=True)
class Trellis(ModelMethod):
    """Each layer in the form that is worth most, nearly always trellis codes."""

    info: ClassVar = MethodInfo(
        name="trellis",
        family="weights",
        paper="arXiv 2406.11235",
        promise="fewest bytes for the same loss: trellis codes, bits and forms where they are worth most",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    codecs: ClassVar[tuple[str, ...]] = ("packed", "quantised-factor", "quantised-pivot", "factor", "pivot")
    budget_unit: ClassVar[Unit] = "bytes"
    drifts: ClassVar[bool] = True

    damping: float = DAMPING
    window: int = WINDOW
    """Bits that decide a weight: more are better and slower, 2^window states for every weight."""
    propagate: float = 0.5
    """How much of the drift of its inputs a weight makes up for, where there is text enough to know it."""
    output_shrinkage: float = 0.2
    forms: Literal["all", "codes"] = "all"
    """The menu: everything of engines/forms.py, or codes alone."""
    allocation: Literal["predicted", "probed", "evopress"] = "predicted"
    generations: int = 40
    offspring: int = 16
    """Of allocation="evopress"."""

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise UsageError(f"method trellis: window must be one of {', '.join(map(str, WINDOWS))}, got {self.window}")
        require_range("trellis", "damping", self.damping, 1e-8, 100.0)
        require_range("trellis", "propagate", self.propagate, 0.0, 1.0)
        require_range("trellis", "output_shrinkage", self.output_shrinkage, 0.0, 1.0)
        require_choice("trellis", "forms", self.forms, ("all", "codes"))
        require_choice("trellis", "allocation", self.allocation, ("predicted", "probed", "evopress"))
        require_range("trellis", "generations", self.generations, 1, 100_000)
        require_range("trellis", "offspring", self.offspring, 1, 100_000)

    def check_model(self, config: "PretrainedConfig", walk: Walk, keep: float) -> None:
        """Refuse a budget below 1 bit everywhere."""
        budget_for_weights(walk, budget_in("bytes", walk.numbers, keep), keep)

    def least(self, walk: Walk) -> int:
        """1 bit everywhere, and biases."""
        return least_bytes(walk)

    def compress(self, job: Job) -> "PreTrainedModel":
        """Steps 1 to 3."""
        forms = dict(zip((layer.name for layer in job.walk.layers), self.chosen(job), strict=True))
        layers = {layer.name: layer for layer in job.walk.layers}
        model = skeleton(job.dense)

        def treat(names: list[str], moments: Moments | None) -> None:
            for name in names:
                module, tokens = job.dense.get_submodule(name), job.calibration.numel()
                placed = self.placed(module, layers[name], job.stats[name], moments, forms[name], tokens)
                if placed is not None:
                    model.set_submodule(name, placed)

        in_order(job.dense, model, job.walk, job.calibration, treat, progress=job.progress)
        return model

    def chosen(self, job: Job) -> list[Form]:
        """Steps 1 and 2: the form of every layer."""
        budget = budget_for_weights(job.walk, job.budget, job.keep)
        with job.timed("predict"):
            menus = [self.menu(job, layer) for layer in job.walk.layers]
        with job.timed("allocate"):
            job.frontier.extend(predicted_frontier(job.walk, [menu.options for menu in menus]))
            found = settle([menu.options for menu in menus], budget, gap=MOST_GAP)
            choice, gap = found.choice, found.gap
            if self.allocation != "predicted":
                choice, gap = self.probed(job, menus, found, budget)
        if gap > MOST_GAP:
            job.warnings.append(
                f"the choice of forms may be {gap:.2%} above the least predicted loss; "
                + (f"HiGHS was stopped after {TIME_LIMIT_S:g} s" if has_solver() else "spectrim[ilp] finds it")
            )
        return [menu.forms[k] for menu, k in zip(menus, choice, strict=True)]

    def probed(self, job: Job, menus: Sequence[Menu], found: Settled, budget: int) -> tuple[list[int], float]:
        """Step 2 by what the model makes of it, from the choice that was `found`; and how far from the optimum of the
        losses it was last chosen by it may be. EvoPress leaves predicted losses on purpose: the gap is of its start.
        """
        names = [layer.name for layer in job.walk.layers]
        noises = {name: Noise(self.measured(job, name), job.seed + i) for i, name in enumerate(names)}
        probed = Probed(job.dense, skeleton(job.dense), names, noises, menus)
        ids = job.training
        if self.allocation == "evopress":
            evolved = evolve_forms(
                probed, found.choice, budget, ids, generations=self.generations, offspring=self.offspring,
                seed=job.seed, progress=job.progress,
            )  # fmt: skip
            return evolved, found.gap
        by_kind = corrections(probed, job.walk, found.choice, ids[-PROBE_WINDOWS:])
        again = settle(corrected(menus, job.walk, by_kind), budget, gap=MOST_GAP)
        return again.choice, again.gap

    def menu(self, job: Job, layer: Layer) -> Menu:
        """Step 1."""
        return self.menu_for(layer, self.measured(job, layer.name))

    def menu_for(self, layer: Layer, measured: Measured) -> Menu:
        """All forms of a measured layer, or its codes."""
        if self.forms == "codes":
            return code_menu(layer, in_codes(measured, self.window), self.window)
        return full_menu(layer, measured, self.window)

    def measured(self, job: Job, name: str) -> Measured:
        """The dense weight in its metric; NumericalError names the layer."""
        return self.in_metric(weight_of(job.dense.get_submodule(name)).detach().double(), job.stats[name], name)

    def in_metric(self, weight: Tensor, stats: Stats, name: str, gram: Tensor | None = None) -> Measured:
        """A weight (O, I), float64, for inputs of the second moment `gram` (default: as measured)."""
        if not stats.is_finite():
            raise NumericalError(f"{name}: its statistics hold NaN or Inf; measure again on other text")
        moment = stats.get(Stat.GRAM) if gram is None else gram
        try:
            upper = inverse_root(moment, damping=self.damping)
        except SolverError as error:
            raise NumericalError(f"{name}: {error}; use more calibration text") from error
        return Measured(weight, moment, upper, shrink(stats.get(Stat.OUTPUT_GRAD), self.output_shrinkage))

    def rehearsal(self, layer: Layer, weight: Tensor, stats: Stats, keep: float) -> Sequence[Piece]:
        """Predicting, making up for drift, codes of the two rates that the budget lies between, and decoding."""

        def prepare() -> None:
            gram = stats.get(Stat.GRAM)
            self.in_metric(drift_target(weight, gram, gram, mix=self.propagate), stats, layer.name)

        measured = self.in_metric(weight, stats, layer.name)
        pieces = [
            Piece("predict", lambda: self.menu_for(layer, self.in_metric(weight, stats, layer.name))),
            Piece("compress", prepare),
        ]
        for code, share in mixed_codes(self.window, 8 * VALUE_BYTES * keep):
            pieces += code_pieces(code, share, measured, self.damping)
        return pieces

    def placed(
        self, module: nn.Module, layer: Layer, stats: Stats, moments: Moments | None, form: Form, tokens: int
    ) -> nn.Module | None:
        """Step 3 for one layer; None where it stays as it is."""
        if form == DENSE:
            return None
        weight = weight_of(module).detach()
        target, gram = weight.double(), stats.get(Stat.GRAM)
        if moments is not None:
            cross, here = moments
            share = token_share(tokens, layer.inputs)
            target = drift_target(target, cross, here, mix=share * self.propagate)
            gram = torch.lerp(gram, here, share)
        measured = self.in_metric(target, stats, layer.name, gram)
        try:
            made = put_in_form(form, measured, cast("Tensor | None", module.bias), weight.dtype, self.damping)
        except (SolverError, LinAlgError) as error:
            raise NumericalError(f"{layer.name}: {error}; use more calibration text") from error
        require_finite(layer.name, made)
        return made


def least_bytes(walk: Walk) -> int:
    """All weights in their smallest codes, and biases. Of few outputs that is not 1 bit, since strips are filled up."""
    smallest = [*(Form("codes", code) for code in codes_of(WINDOW)), DENSE]
    weights = sum(min(form.account(la).total for form in smallest) for la in walk.layers)
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
