"""Faster: kernels for products with few rows, and for outputs of pivot layers, where a clock on the device says so."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from spectrim.errors import UsageError
from spectrim.models.walk import Layer, device_of, shared_inputs
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.choice import Choice, choose
from spectrim.nn.kernels.launch import MOST_LINES, has_pdl, missing
from spectrim.nn.kernels.many import choose_many

LEAST_PREFILL = 64
"""Tokens: half of it, from which the choice is used, is more than the kernels for few rows take."""


def speed_up(model: PreTrainedModel, rows: Sequence[int] = (1,), prefill: int | None = None) -> list[Choice]:
    """Time the kernels against torch's products for batches of `rows` and use them where they win; what was measured.

    Where even the best form of a kind of layer takes longer than dense weights would, its choice says so
    (`slower_than_dense`). CUDA graphs of models that were sped up must not be replayed on two streams of a device at
    once. `prefill`, a number of tokens, also times ways to put the outputs of pivot layers in their places for so many
    rows; what wins is used from half as many rows on. Nothing else changes: other numbers of rows, training, saving and
    exporting are as before. The timing is of these layers on this device; it takes seconds, and kernels that were built
    before come from Triton's cache. UsageError where no kernel can run, for more than 16 rows, for a prefill of fewer
    than 64, and for a model that is spread over several devices.

    Examples:
        >>> import spectrim
        >>> spectrim.speed_up(spectrim.load("small"))  # doctest: +SKIP
    """
    reason = missing()
    device = device_of(model)
    if reason is None and device.type != "cuda":
        reason = f"the model is on {device}"
    if reason is not None:
        raise UsageError(f"kernels for decoding need Triton and a CUDA device: {reason}")
    if not rows or not all(1 <= count <= MOST_LINES for count in rows):
        raise UsageError(f"rows {list(rows)}; kernels are for 1 to {MOST_LINES} rows: the batch size of decoding")
    if prefill is not None and prefill < LEAST_PREFILL:
        raise UsageError(f"prefill {prefill}; at least {LEAST_PREFILL} tokens, for fewer nothing is won")
    refuse_spread(model)
    groups = groups_of(model)
    with torch.cuda.device_of(next(model.parameters())):  # streams, graphs and clocks are of the current one
        chosen = choose(groups, rows, pdl=has_pdl(device))
        if prefill is None:
            return chosen
        return chosen + choose_many((layer for group in groups for layer in group), prefill)


def refuse_spread(model: PreTrainedModel) -> None:
    """UsageError where stored layers lie on several devices: those of the same shapes are timed together."""
    stored = [module for module in model.modules() if isinstance(module, StoredLinear)]
    devices = {str(parameter.device) for module in stored for parameter in module.parameters()}
    if len(devices) > 1:
        raise UsageError(
            f"the model's layers are on {', '.join(sorted(devices))}; kernels are timed on one device: load it with "
            "device_map=0, or leave speed_up out"
        )


def groups_of(model: PreTrainedModel) -> list[list[StoredLinear]]:
    """The stored layers of a model, those that read one input together, in the order in which they run."""
    stored = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    layers = tuple(
        Layer(name=name, block=0, outputs=m.out_features, inputs=m.in_features, has_bias=m.has_bias)
        for name, m in stored.items()
    )
    return [[stored[name] for name in names] for names in shared_inputs(model, layers)] if layers else []
