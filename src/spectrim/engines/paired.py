"""In running order, group by group, with what the dense model and the model so far feed to a group side by side."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import input_moments, start
from spectrim.models.walk import Walk, device_of, shared_inputs

Moments = tuple[Tensor, Tensor]
"""E[x x'^T] and E[x' x'^T], x the input in the dense model, x' in the other."""


@torch.no_grad()
def in_order(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    treat: Callable[[list[str], Moments | None], None],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """`treat(names, moments)` for every group of layers that share an input, over `ids` (windows, length).

    It puts the group's layers in place in `model`; moments are of the model as it is by then, None where tokens have no
    partner (experts, which each model chooses in its own way).
    """
    blocks = {layer.name: layer.block for layer in walk.layers}
    with frozen(dense), frozen(model), autocast(device_of(dense)):
        groups = shared_inputs(dense, walk.layers)
        full, small = start(dense, walk, ids, batch_size), start(model, walk, ids, batch_size)
        for block in range(len(walk.block_names)):
            for group in groups:
                if blocks[group[0]] == block:
                    treat(list(group), input_moments(full, small, block, group[0]))
            full.advance(block)
            small.advance(block)
            if progress is not None:
                progress("in order", block + 1, len(walk.block_names))
