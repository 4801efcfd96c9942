"""How strongly an adapter that was trained at the smallest size counts at each larger one: by the loss on text.

Such an adapter makes up for components that are not there at the smallest size. At a larger size they are, and the
whole adapter then does harm: on the reference model a slice of 0.9 was three times as far from the dense model as one
of 0.35. One number for each anchor is all that the format has room for, and it is chosen here: of a few strengths, the
one of least loss. At the smallest anchor that is 1, for which it was trained.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.order import Order
from spectrim.memory import Batch
from spectrim.method import MaskedMethod
from spectrim.models.walk import device_of

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WINDOWS = 32
"""Windows of training text that strengths are judged on."""


@torch.no_grad()
def text_loss(method: MaskedMethod, model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> float:
    """The method's own loss, in nats a token, on the first `WINDOWS` of `ids` (windows, length)."""
    ids = ids[:WINDOWS]

    def mean(size: int) -> float:
        total = 0.0
        for batch in ids.to(device_of(model)).split(size):
            own = model(input_ids=batch, use_cache=False).logits
            given = teacher(input_ids=batch, use_cache=False).logits if method.compares_with_dense else None
            total += float(method.loss(own, batch, given)) * len(batch)
        return total / len(ids)

    with frozen(model), frozen(teacher), autocast(device_of(model)):
        return Batch(16).run("fade", mean)


def with_strengths(order: Order, strengths: tuple[float, ...]) -> Order:
    """The order with so strong an adapter at each anchor, size 1 first."""
    scores = {name: score.clone() for name, score in order.scores.items()}
    for score in scores.values():
        for row, strength in enumerate(strengths):
            score[row, : order.adapter_rank] = strength
    return dataclasses.replace(order, scores=scores)


def fade(order: Order, loss: Callable[[Order, float], float], *, progress: Progress | None = None) -> Order:
    """Each anchor between size 1 (strength 0) and the smallest (1) by itself; `loss` of an order at a size.

    Of equal losses the weaker adapter is taken.
    """
    between = order.anchors[1:-1]
    chosen = []
    for number, size in enumerate(between, 1):
        alike = [with_strengths(order, (0.0, *[strength] * len(between), 1.0)) for strength in STRENGTHS]
        losses = [loss(candidate, size) for candidate in alike]
        chosen.append(STRENGTHS[losses.index(min(losses))])
        if progress is not None:
            progress("fade", number, len(between))
    faded = with_strengths(order, (0.0, *chosen, 1.0))
    strengths = {f"{size:g}": strength for size, strength in zip(order.anchors, (0.0, *chosen, 1.0), strict=True)}
    return dataclasses.replace(faded, details={**order.details, "adapter_strengths": strengths})
