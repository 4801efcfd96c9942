"""Factors by least squares on the inputs that the compressed model really produces, layer after layer.

Going through the blocks in order, and inside a block through the groups of layers that share an input:

    x  the group's input in the dense model, x' in the compressed one (everything before it already refitted)
    refit        B = argmin E|| W x - B A x' ||^2 with the right factor A fixed           linalg/factor.refit_left
    reconstruct  B = argmin E|| W (m x + (1 - m) x') - B A x' ||^2, then A for that B       linalg/factor.refit_right

Sources: the closed-form update of SVD-LLM (arXiv 2403.07378); the reconstruction of MPIFA (Zhao et al., ICML 2025),
which asks for m = 0.25 of the dense model's output only, since the whole of it overfits the calibration text. Both
models advance block by block, so that the cost is a few forward passes however deep the model is.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.layerwise import build_linear, solver_errors_of
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import input_moments, low_rank_layers, start
from spectrim.errors import InputError
from spectrim.linalg.factor import Factors, refit_left, refit_right
from spectrim.models.walk import Walk, device_of, shared_inputs, weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.replacement import Replacement, encode

RECONSTRUCTION_MIX = 0.25
"""Share of the target that is the dense model's output (MPIFA's lambda)."""

Update = Callable[[Tensor, Tensor, Tensor, Tensor], Factors]
"""New factors from W (O, I), the right factor (R, I), E[x x'^T] and E[x' x'^T]."""


def left_alone(weight: Tensor, right: Tensor, cross: Tensor, gram: Tensor) -> Factors:
    """What `refit` does to one layer."""
    return Factors(refit_left(weight, right, cross, gram), right)


def both_sides(weight: Tensor, right: Tensor, cross: Tensor, gram: Tensor) -> Factors:
    """What `reconstruct` does to one layer."""
    cross = RECONSTRUCTION_MIX * cross + (1 - RECONSTRUCTION_MIX) * gram
    left = refit_left(weight, right, cross, gram)
    return Factors(left, refit_right(weight, left, right, cross, gram))


def reconstruct(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> None:
    """Both factors of every low-rank layer of `student`, in place; the teacher is the dense model."""
    refit(student, teacher, walk, ids, batch_size=batch_size, progress=progress, update=both_sides)


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
    update: Update = left_alone,
) -> None:
    """Refit every low-rank layer of `student` in place; the teacher is the dense model.

    When it fails, the student has the layers that it had before.
    """
    before = low_rank_layers(student, walk)
    try:
        _refit_all(student, teacher, walk, ids, batch_size, progress, update)
    except BaseException:
        for name, layer in before.items():
            student.set_submodule(name, layer)
        raise


def _refit_all(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    batch_size: int,
    progress: Progress | None,
    update: Update,
) -> None:
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
                    moments = input_moments(dense, small, block, group[0])
                    if moments is None:
                        raise InputError(
                            f"{group[0]}: refit needs the same tokens at a layer in both models; those of an expert "
                            "are routed by each model in its own way. Leave refit out for this model"
                        )
                    for name in low_rank:
                        _refit_layer(student, teacher, name, update, *moments)
            for stream in (dense, small):
                stream.advance(block)
            if progress is not None:
                progress("refit", block + 1, len(walk.block_names))


def _refit_layer(
    student: PreTrainedModel, teacher: PreTrainedModel, name: str, update: Update, cross: Tensor, gram: Tensor
) -> None:
    """New factors for one layer, put back in the codec it had."""
    module = student.get_submodule(name)
    assert isinstance(module, LowRankLinear | PivotLinear)
    right = module.V.weight if isinstance(module, LowRankLinear) else module.pivot.weight
    weight = weight_of(teacher.get_submodule(name)).double()
    bias = None if module.bias is None else module.bias.detach()
    with solver_errors_of(name, "the moments of its inputs in the compressed model"):
        factors = update(weight, right.double(), cross, gram)
        replacement: Replacement = encode(factors, module.codec, like=right, bias=bias)
    student.set_submodule(name, build_linear(replacement).train(module.training))
