"""Block by block: statistics of what a block reads behind blocks that are already compressed.

For each block of a model, in order: its layers, still as they were, are run on the hidden states that the blocks before
it now make; whoever asked is given the statistics and puts its layers in place; the states go on through the new block.
The errors of earlier blocks are then part of what later ones are calibrated on (the codes of GPTQ, SparseGPT, EoRA).
Two passes over the calibration windows beside the one that finds how blocks are called.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.measure import Progress, add_input, autocast, finish, frozen
from spectrim.engines.stream import start
from spectrim.engines.sums import Sums
from spectrim.models.walk import Walk, device_of, shared_inputs
from spectrim.stats import INPUT_STATS, Stat, Stats

Place = Callable[[Mapping[str, Stats]], None]
"""Given the statistics of a block's layers by name; replaces those layers in the model."""


@torch.no_grad()
def block_by_block(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    needs: frozenset[Stat],
    place: Place,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """Measure and place all blocks of `model`, in place, over `ids` (windows, length)."""
    assert needs <= INPUT_STATS, "gradients need the whole model"
    blocks = {layer.name: layer.block for layer in walk.layers}
    with frozen(model), autocast(device_of(model)):
        groups = shared_inputs(model, walk.layers)
        stream = start(model, walk, ids, batch_size)
        for block in range(len(walk.block_names)):
            here = [group for group in groups if blocks[group[0]] == block]
            sums = {group[0]: Sums() for group in here}
            handles = [
                model.get_submodule(name).register_forward_pre_hook(_add(own, needs)) for name, own in sums.items()
            ]
            try:
                for batch in range(len(stream.hidden)):
                    stream.run(block, batch)
            finally:
                for handle in handles:
                    handle.remove()
            for own in sums.values():
                own.to_means()
            place({name: finish(name, sums[group[0]], sums[group[0]], needs) for group in here for name in group})
            stream.advance(block)
            if progress is not None:
                progress("block by block", block + 1, len(walk.block_names))


def _add(sums: Sums, needs: frozenset[Stat]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add_input(sums, inputs[0].detach(), needs)

    return hook
