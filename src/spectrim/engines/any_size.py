"""One run for all sizes: a basis that serves them all, one order of all components, scores at a few anchor sizes.

1. measure, decompose; measure again in the model compressed to middle sizes, average (as any run does, at its size)
2. closed form: order the steps of all layers by what they save a number                    engines/order.py
   learned methods: by the order in which components go while the model shrinks            engines/descent.py
   masked methods: by when the masks went out, adapters before all                         engines/masked_order.py
3. round the factors once; any size is then a slice                                        engines/nested.py
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.clock import timed
from spectrim.engines.descent import learn_order
from spectrim.engines.fade import fade, text_loss
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.layerwise import check_weights, refuse_large_sides, swap
from spectrim.engines.learned import skeleton
from spectrim.engines.masked import budget_of
from spectrim.engines.masked_order import learn_masked_order
from spectrim.engines.measure import Progress
from spectrim.engines.nested import Nested, nest, plan_at, slice_at
from spectrim.engines.order import Order, closed_order
from spectrim.engines.pipeline import closed_form
from spectrim.engines.ranks import Plan
from spectrim.engines.way import way_of
from spectrim.method import LayerMethod, LearnedMethod, MaskedMethod, TrainedMethod
from spectrim.models.walk import Walk, device_of, find_layers, linear_at
from spectrim.options import ANCHORS, ANY_SIZE_STEPS, Nonfinite, check_anchors, check_serves_all_sizes

MIDDLES = (0.7, 0.45)
"""Sizes at which statistics are measured for the second time, where the anchors allow it."""


@dataclass(kw_only=True)
class AnySize:
    """A model in all sizes from the last anchor up to 1; the dense model is not changed."""

    dense: PreTrainedModel
    method: LayerMethod
    walk: Walk
    layers: Mapping[str, Nested]
    anchors: tuple[float, ...]  # of the rows of the scores, descending from 1
    adapter_rank: int = 0
    losses: tuple[float, ...] = ()
    warnings: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    energies: Mapping[str, Tensor] = field(default_factory=dict)
    """Squared singular values (K,) of each layer in the method's metric, in the order in which components are kept;
    of masked methods, which keep no record of that order, descending."""
    seconds: dict[str, float] = field(default_factory=dict)

    def plan(self, size: float) -> Plan:
        """What each layer is at `size`."""
        levels = {name: nested.levels for name, nested in self.layers.items()}
        return plan_at(self.walk, levels, self.method.alone, size, adapter_rank=self.adapter_rank)

    def at(self, size: float) -> PreTrainedModel:
        """The model at `size`, its layers as they will be loaded, held in the dtype of the dense one."""
        plan, wide = self.plan(size), next(self.dense.parameters()).dtype
        student = skeleton(self.dense)
        for layer in self.walk.layers:
            placed = slice_at(self.layers[layer.name], plan.targets[layer.name], self.anchors, size)
            swap(student, layer.name, placed)
            student.get_submodule(layer.name).to(wide)
        return student.eval()


def compress_any_size(
    dense: PreTrainedModel,
    method: LayerMethod,
    calibration: Tensor,
    training: Tensor | None = None,
    *,
    anchors: tuple[float, ...] = ANCHORS,
    steps: int = ANY_SIZE_STEPS,
    dtype: torch.dtype = torch.float32,
    gradient_windows: int | None = None,
    nonfinite: Nonfinite = "refuse",
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    middles: tuple[float, ...] = MIDDLES,
    insists: Collection[str] = (),
) -> AnySize:
    """All sizes of `dense` (weights in float32) from the last of the `anchors` up to 1, stored in `dtype`.

    `calibration`, `training`, `checkpoint` and `insists` as in `compress_model`. `steps` are those of all anchors
    together, for methods that train; a method whose own `steps` are 0 does not. `middles` are the sizes at which
    statistics are measured again; the mean serves all.
    """
    check_anchors(anchors)
    check_serves_all_sizes(method)
    walk, warnings = check_weights(dense, find_layers(dense), nonfinite)
    refuse_large_sides(method, walk)
    way = way_of(device_of(dense), walk, method, insists)
    assert isinstance(way.method, LayerMethod)
    method = way.method
    budget_of(method, walk, anchors[-1])
    clock: dict[str, float] = {}
    if gradient_windows is None:
        gradient_windows = default_gradient_windows(len(calibration), device_of(dense), calibration.shape[1])
    reached = tuple(min(max(middle, anchors[-1]), anchors[0]) for middle in middles)
    spectra, checkpoint, told = closed_form(
        dense, method, walk, reached[0], calibration, gradient_windows=gradient_windows, seed=seed, clock=clock,
        progress=progress, checkpoint=checkpoint, again_at=reached,
    )  # fmt: skip
    if isinstance(method, TrainedMethod) and method.steps > 0:
        with timed(clock, "learn"):
            ids = calibration if training is None else training
            given: Any = {"steps": steps, "seed": seed, "progress": progress, "checkpoint": checkpoint}
            if isinstance(method, MaskedMethod):
                order = learn_masked_order(method, dense, walk, spectra, anchors, ids, **given)

                def loss(candidate: Order, size: float) -> float:
                    model = build(dense, method, walk, candidate, torch.float32).at(size)
                    return text_loss(method, model, dense, ids)

                order = fade(order, loss, progress=progress)
            else:
                assert isinstance(method, LearnedMethod)
                order = learn_order(method, dense, walk, spectra, anchors, ids, **given)
    else:
        with timed(clock, "allocate"):
            order = closed_order(method, walk, spectra, anchors)
    sizes = build(dense, method, walk, order, dtype, seconds=clock)
    sizes.warnings = (*warnings, *way.warnings, *told, *sizes.warnings)
    in_order = spectra if isinstance(method, MaskedMethod) else order.spectra
    sizes.energies = {name: spectrum.energy for name, spectrum in in_order.items()}
    return sizes


def build(
    dense: PreTrainedModel,
    method: LayerMethod,
    walk: Walk,
    order: Order,
    dtype: torch.dtype,
    *,
    seconds: dict[str, float] | None = None,
) -> AnySize:
    """Round what was found to the stored dtype, one layer after the other."""
    layers = {}
    for layer in walk.layers:
        given = (order.spectra[layer.name], order.scores[layer.name], order.levels[layer.name])
        layers[layer.name] = nest(*given, linear_at(dense, layer.name).bias, dtype)
    return AnySize(
        dense=dense,
        method=method,
        walk=walk,
        layers=layers,
        anchors=order.anchors,
        adapter_rank=order.adapter_rank,
        losses=order.losses,
        warnings=order.warnings,
        details=order.details,
        seconds={} if seconds is None else seconds,
    )
