"""Queries and keys turned by their positions, in one kernel there and one back, beside the single steps of torch.

    y = x cos + (-x1, x0) sin        x (B, H, S, D), x0 and x1 its halves along D; cos, sin (B or 1, S, D)

Source: RoFormer (arXiv 2104.09864), with the halves of a head as pairs, as Llama has them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUMBERS = 2048
"""Numbers of one half that a program of the kernel takes at most: 32 heads of 128."""


def rotated_in_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What `rotated` computes, step by step: its oracle."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos[:, None] + turned * sin[:, None]


def suits(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel has a form for these: one precision, one device, all of D turned, no gradient by angles."""
    if x.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape or x.numel() == 0:
        return False
    if cos.shape[0] not in (1, x.shape[0]) or cos.shape[1:] != x.shape[2:] or x.shape[-1] % 2:
        return False
    if any(t.dtype != x.dtype or t.device != x.device or t.requires_grad for t in (cos, sin)):
        return False
    return x.dtype in DTYPES and all(t.stride(-1) == 1 for t in (x, cos, sin))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y (B, H, S, D); `suits` says of what. Needs Triton."""
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-any-return]  torch types apply as Any


class _Rotation(torch.autograd.Function):
    """The way back is the rotation by the opposite angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """y (B, H, S, D)."""
        ctx.save_for_backward(cos, sin)
        return _launch(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]  names what torch gives as Any
        """By x, from that by y."""
        cos, sin = ctx.saved_tensors
        return _launch(gradient if gradient.stride(-1) == 1 else gradient.contiguous(), cos, sin, back=True), None, None


def _launch(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """One launch; what it gives lies in memory as x does."""
    from spectrim.nn.kernels import rotation

    kernel: Any = rotation.rotate
    batch, heads, length, size = x.shape
    y = torch.empty_like(x)
    half = size // 2
    columns = _power_of_two(half)
    at_once = min(_power_of_two(heads), max(1, NUMBERS // columns))
    shared = cos.shape[0] == 1  # by all of the batch
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[batch * length, -(-heads // at_once)](
            x, cos, sin, y, length, heads, half, *x.stride()[:3], *y.stride()[:3],
            0 if shared else cos.stride(0), cos.stride(1), 0 if shared else sin.stride(0), sin.stride(1),
            BACK=back, HEADS=at_once, HALF=columns, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _power_of_two(number: int) -> int:
    """The least that is not below it."""
    return 1 << (number - 1).bit_length()
