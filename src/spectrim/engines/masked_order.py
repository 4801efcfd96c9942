"""One order from masks: a single descent past all sizes ranks the components of all layers, one adapter serves all.

The masks are pressed to the smallest anchor and the adapters trained on there (engines/masked.py, arXiv 2502.01717).
Every layer's components stand in the order of extinction behind its adapter, which is there, and counted, at every
size:

    adapter (R)   first to be kept   ...   last to be kept

A layer grows from the adapter alone by one component a step, until it costs no less than dense; then it is the dense
weight plus the adapter. At size 1 the adapter's scores are 0, so that the model is the dense one; how strong it is at
the anchors between is found later (engines/fade.py; the paper switches the adapters of dense layers off at once).
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.masked import Pressing, press_to
from spectrim.engines.measure import Progress
from spectrim.engines.order import Order
from spectrim.errors import UsageError
from spectrim.linalg.extinction import first_of_each
from spectrim.linalg.factor import Spectrum
from spectrim.linalg.ladder import ladder_costs, levels_of
from spectrim.method import MaskedMethod
from spectrim.models.walk import Walk
from spectrim.nn.masked import MaskedLinear
from spectrim.options import ANY_SIZE_STEPS


def learn_masked_order(
    method: MaskedMethod,
    teacher: PreTrainedModel,
    walk: Walk,
    spectra: Mapping[str, Spectrum],
    anchors: tuple[float, ...],
    ids: Tensor,
    *,
    steps: int = ANY_SIZE_STEPS,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Order:
    """Learn over `ids` (windows, length) in one descent to the last anchor; the teacher is not changed.

    Raises UsageError when the adapters alone take more than the last anchor.
    """
    if steps < 1:
        raise UsageError(f"{method.info.name}: {steps} steps; one descent takes at least one")
    method = dataclasses.replace(method, steps=steps)
    pressing, losses = press_to(
        method, teacher, walk, spectra, anchors[-1], ids, seed=seed, progress=progress, checkpoint=checkpoint
    )
    return order_by_extinction(pressing, (1.0, *anchors), losses)


def order_by_extinction(pressing: Pressing, anchors: tuple[float, ...], losses: tuple[float, ...]) -> Order:
    """What the masks say: each layer's components behind its adapter, and when each layer grows."""
    walk, rank, storage = pressing.walk, pressing.method.adapter_rank, pressing.method.alone
    owner, position = pressing.order()
    steps = [len(ladder_costs(layer.outputs, layer.inputs, storage, rank)) - 1 for layer in walk.layers]
    levels = levels_of(first_of_each(owner, steps), len(steps))
    spectra = {
        layer.name: behind_adapter(pressing.masked[layer.name], position[owner == index])
        for index, layer in enumerate(walk.layers)
    }
    return Order(
        spectra=spectra,
        anchors=anchors,
        scores={name: scores_of(len(spectrum.energy), rank, len(anchors)) for name, spectrum in spectra.items()},
        levels={layer.name: level for layer, level in zip(walk.layers, levels, strict=True)},
        adapter_rank=rank,
        losses=losses,
        warnings=pressing.warnings(),
        details=pressing.facts,
    )


@torch.no_grad()
def behind_adapter(layer: MaskedLinear, places: Tensor) -> Spectrum:
    """The adapter's R components, then those at `places` (K,), each as two vectors; their energy plays no part."""
    places = places.to(layer.left.device)
    left = torch.cat([layer.up * layer.scale, layer.left[:, places]], dim=1)
    right = torch.cat([layer.down, layer.right[places]])
    return Spectrum(left, right, torch.ones(len(right), device=right.device))


def scores_of(components: int, rank: int, anchors: int) -> Tensor:
    """Scores (A, R + K): 1 throughout, but for the adapter at size 1, where the model is the dense one."""
    scores = torch.ones(anchors, components)
    scores[0, :rank] = 0
    return scores
