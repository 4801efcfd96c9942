"""What calibration can measure of the residual stream itself, beside the inputs of linear layers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.errors import NumericalError
from spectrim.linalg.curvature import add_gram
from spectrim.memory import Batch
from spectrim.models.walk import Walk, device_of

CPU_BATCH, GPU_BATCH = 4, 32
"""Windows in one batch."""


def normalised_gram(
    model: PreTrainedModel, norms: Sequence[str], ids: Tensor, *, progress: Progress | None = None
) -> Tensor:
    """E[x x^T] (D, D) float64 of the stream divided by its root mean square, before the named norms, all counted alike.

    `ids` (windows, length). NumericalError where it is not finite.
    """

    def measure(batch_size: int) -> Tensor:
        total: list[Tensor] = []

        def add(_module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            scale = rows.square().mean(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny).rsqrt()
            if not total:
                total.append(torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device))
            add_gram(total[0], rows * scale)

        _run(model, norms, add, ids, batch_size, progress)
        return total[0] / (ids.numel() * len(norms))

    gram = _batch(model).run("calibrate", measure)
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError("the residual stream is not finite on the calibration text; check the model's weights")
    return gram


def block_influence(model: PreTrainedModel, walk: Walk, ids: Tensor) -> Tensor:
    """How much each block changes the direction of the stream (L,) float64: 1 - E[cos(before, after)], in [0, 2]."""

    def measure(batch_size: int) -> Tensor:
        similar: dict[int, float] = {}
        order = {id(model.get_submodule(name)): i for i, name in enumerate(walk.block_names)}

        def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            place = order[id(module)]
            similar[place] = similar.get(place, 0.0) + float(cosine.double().sum())

        _run(model, walk.block_names, add, ids, batch_size, None)
        return 1 - torch.tensor([similar[i] for i in range(len(order))], dtype=torch.float64) / ids.numel()

    return _batch(model).run("calibrate", measure)


def _batch(model: PreTrainedModel) -> Batch:
    return Batch(CPU_BATCH if device_of(model).type == "cpu" else GPU_BATCH)


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


@torch.no_grad()
def _run(
    model: PreTrainedModel, names: Sequence[str], hook: Hook, ids: Tensor, batch_size: int, progress: Progress | None
) -> None:
    """Call `hook` with input and output of every named module, over all windows."""
    device = device_of(model)
    handles = [model.get_submodule(name).register_forward_hook(hook) for name in names]
    try:
        with frozen(model), autocast(device):
            for start in range(0, len(ids), batch_size):
                batch = ids[start : start + batch_size].to(device)
                model(input_ids=batch, use_cache=False)
                if progress is not None:
                    progress("calibrate", start + len(batch), len(ids))
    finally:
        for handle in handles:
            handle.remove()
