"""Running sums that are the same bits every time where that is asked for (`--deterministic`)."""

import torch
from torch import Tensor


def running_sum(values: Tensor, dim: int = 0) -> Tensor:
    """`values.cumsum(dim)`; of numbers on a GPU on the CPU where torch must be deterministic.

    torch has no deterministic running sum of floating-point numbers on a GPU and stops there. What is summed here is
    as long as a layer is wide at most, so that the way to the CPU costs little.
    """
    if values.is_cuda and values.is_floating_point() and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(dim).to(values.device)
    return values.cumsum(dim)
