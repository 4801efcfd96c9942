"""Sequential refit: each left factor by least squares on the inputs that the compressed model really produces.

Going through the blocks in order, and inside a block through the groups of layers that share an input:

    x  the group's input in the dense model, x' in the compressed one (everything before it already refitted)
    B = argmin E|| W x - B A x' ||^2 with the right factor A fixed           linalg/factor.refit_left

Source: the closed-form update of SVD-LLM (arXiv 2403.07378). Both models advance block by block, so that the cost is a
few forward passes however deep the model is.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.layerwise import build_linear
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import Stream, start
from spectrim.linalg.curvature import add_gram
from spectrim.linalg.factor import Factors, refit_left
from spectrim.method import Replacement, encode
from spectrim.models.walk import Walk, device_of, shared_inputs, weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """Refit every low-rank layer of `student` in place; the teacher is the dense model."""
    device = device_of(teacher)
    block_of = {layer.name: layer.block for layer in walk.layers}
    with frozen(student), frozen(teacher), autocast(device):
        groups = shared_inputs(teacher, walk.layers)  # in running order, so that what feeds a group is refitted first
        dense = start(teacher, walk, ids, batch_size)
        small = start(student, walk, ids, batch_size)
        for block in range(len(walk.block_names)):
            for group in (g for g in groups if block_of[g[0]] == block):
                low_rank = [n for n in group if isinstance(student.get_submodule(n), LowRankLinear | PivotLinear)]
                if low_rank:
                    cross, gram = _moments(dense, small, block, group[0])
                    for name in low_rank:
                        _refit_layer(student, teacher, name, cross, gram)
            for stream in (dense, small):
                stream.advance(block)
            if progress is not None:
                progress("refit", block + 1, len(walk.block_names))


def _moments(dense: Stream, small: Stream, block: int, name: str) -> tuple[Tensor, Tensor]:
    """E[x x'^T] and E[x' x'^T] at the input of layer `name`, from both models' present hidden states."""
    seen: dict[str, Tensor] = {}
    handles = [
        stream.model.get_submodule(name).register_forward_pre_hook(_store(seen, key))
        for key, stream in (("dense", dense), ("small", small))
    ]
    cross = gram = None
    tokens = 0
    try:
        for batch in range(len(dense.hidden)):
            dense.run(block, batch)
            small.run(block, batch)
            x, y = (seen[key].reshape(-1, seen[key].shape[-1]) for key in ("dense", "small"))
            if cross is None or gram is None:
                cross = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
                gram = torch.zeros_like(cross)
            add_gram(cross, x, y)
            add_gram(gram, y)
            tokens += len(x)
    finally:
        for handle in handles:
            handle.remove()
    assert cross is not None, "no calibration window"
    assert gram is not None
    return cross / tokens, gram / tokens


def _store(seen: dict[str, Tensor], key: str) -> Callable[..., None]:
    """A hook that puts a layer's input into `seen[key]`."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[key] = inputs[0]

    return hook


def _refit_layer(student: PreTrainedModel, teacher: PreTrainedModel, name: str, cross: Tensor, gram: Tensor) -> None:
    """Least-squares left factor for one layer, put back in the codec it had."""
    module = student.get_submodule(name)
    assert isinstance(module, LowRankLinear | PivotLinear)
    right = module.V.weight if isinstance(module, LowRankLinear) else module.pivot.weight
    weight = weight_of(teacher.get_submodule(name)).double()
    left = refit_left(weight, right.double(), cross, gram)
    bias = module.bias
    replacement: Replacement = encode(
        Factors(left, right.double()), module.codec, like=right, bias=None if bias is None else bias.detach()
    )
    student.set_submodule(name, build_linear(replacement).train(module.training))
