"""A budget for the whole model in bytes, as the share of the decoder's linear layers that it leaves.

What is counted is what the files hold as tensors: embeddings, norms, biases and all else that stays, and the linear
layers in whatever form they get. A header of some kilobytes and the small JSON files come on top.
"""

import dataclasses

from spectrim.errors import UsageError
from spectrim.linalg.bits import VALUE_BYTES
from spectrim.method import Method
from spectrim.model_method import ModelMethod
from spectrim.models.load import Source, meta_model, pick_dtype
from spectrim.models.walk import find_layers
from spectrim.request import Request


def settled(request: Request, method: Method, source: Source) -> Request:
    """The request with the `keep` that its budget in bytes leaves; as it is where it has none."""
    if request.model_bytes is None and request.keep_bytes is None:
        return request
    if not isinstance(method, ModelMethod) or method.budget_unit != "bytes":
        raise UsageError(
            f"method {method.info.name} is held to a share of numbers, not of bytes: take --keep, or a method of few "
            "bits (trellis, which is the default for a budget in bytes, gptq, eora, ...)"
        )
    dtype = pick_dtype(request.dtype, source.dtype)
    if dtype.itemsize != VALUE_BYTES:
        raise UsageError(
            f"a budget in bytes is kept for results of 16 bits, and this one is to be stored in {dtype}; pass --dtype "
            "bfloat16"
        )
    walk = find_layers(meta_model(source.config))
    stay = (source.checkpoint.numel - walk.numbers) * VALUE_BYTES
    dense = walk.numbers * VALUE_BYTES
    asked = request.model_bytes
    if asked is None:
        assert request.keep_bytes is not None
        asked = int(request.keep_bytes * (stay + dense) + 1e-6)
    least = stay + (method.least(walk) or 0)
    if asked < least:
        raise UsageError(
            f"{asked:,} bytes for the whole model: embeddings and all else that stays take {stay:,} in {dtype}, and "
            f"the linear layers at least {least - stay:,} by method {method.info.name}. The smallest reachable is "
            f"{least:,} bytes (keep_bytes {int(least / (stay + dense) * 10_000 + 1) / 10_000:g})"
        )
    return dataclasses.replace(request, keep=min(1.0, (asked - stay) / dense))
