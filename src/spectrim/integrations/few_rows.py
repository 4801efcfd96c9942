"""Decode faster: kernels for products with few rows in a loaded model, where a clock on its device says so."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from spectrim.errors import UsageError
from spectrim.models.walk import Layer, device_of, shared_inputs
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.choice import Choice, choose
from spectrim.nn.kernels.launch import MOST_LINES, has_pdl, missing


def speed_up(model: PreTrainedModel, rows: Sequence[int] = (1,)) -> list[Choice]:
    """Time the kernels against torch's products for batches of `rows` and use them where they win; what was measured.

    Nothing else changes: other numbers of rows, training, saving and exporting are as before. The timing is of these
    layers on this device; it takes seconds, and kernels that were built before come from Triton's cache.
    UsageError where no kernel can run, and for more than 16 rows.

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
    return choose(groups_of(model), rows, pdl=has_pdl(device))


def groups_of(model: PreTrainedModel) -> list[list[StoredLinear]]:
    """The stored layers of a model, those that read one input together, in the order in which they run."""
    stored = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    layers = tuple(
        Layer(name=name, block=0, outputs=m.out_features, inputs=m.in_features, has_bias=m.has_bias)
        for name, m in stored.items()
    )
    return [[stored[name] for name in names] for names in shared_inputs(model, layers)] if layers else []


def facts_of(choice: Choice) -> dict[str, Any]:
    """A choice, JSON-ready."""
    codec, outputs, inputs, rank = choice.shapes[0][:4]
    return {
        "layers": f"{choice.groups} x {len(choice.shapes)} {codec} {outputs}x{inputs}, rank {rank}",
        "rows": choice.lines,
        "torch_us": choice.torch_us,
        "kernel_us": choice.kernel_us,
        "kernel": choice.kernel,
        "note": choice.note,
    }
