"""How many of the calibration windows give gradients."""

import torch

GRADIENT_TOKENS = 131_072
"""Tokens whose gradients are enough: those of 256 windows of 512."""


def default_gradient_windows(windows: int, device: torch.device, length: int) -> int:
    """How many of the windows (of `length` tokens) give gradients when nothing is said.

    On a GPU all up to GRADIENT_TOKENS, and a quarter where that is more. On a CPU a quarter: gradients are most of the
    time there, and the rest of them gains little.
    """
    quarter = max(1, windows // 4)
    return quarter if device.type == "cpu" else min(windows, max(quarter, -(-GRADIENT_TOKENS // length)))
