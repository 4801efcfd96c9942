"""Root-mean-square norms as one kernel each, where that is what a model's own modules compute.

Models write a norm in single steps (to float32, squares, mean, product, back, weight), each of which reads and writes
all hidden states: on a GPU ten times the time of `torch.nn.functional.rms_norm`, on the way back too
(benchmarks/scale_profile.py). A module is only replaced where both give the same on probe rows but for rounding: one
that adds 1 to its weight, or has its epsilon elsewhere, keeps its own steps.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.curvature import full_precision

ROUNDINGS = 4
"""Units in the last place by which the two may differ: single steps round to the states' precision twice."""


@contextmanager
def fused_norms(model: nn.Module, *, on: str = "cuda") -> Iterator[list[str]]:
    """Norms of `model` that lie `on` such a device run as one kernel meanwhile; their names.

    Copies of the model that are made meanwhile have them too, and keep them.
    """
    named = {name: module for name, module in model.named_modules() if _is_candidate(module, on)}
    replaced = {name: module for name, module in named.items() if _agrees(module)}
    try:
        for module in replaced.values():
            module.forward = _fused(module)  # type: ignore[method-assign]  an attribute that hides the method
        yield [*replaced]
    finally:
        for module in replaced.values():
            del module.forward


def _is_candidate(module: nn.Module, on: str) -> bool:
    """A norm by its name, with a weight (E,) and an epsilon, that is called with hidden states alone."""
    weight = getattr(module, "weight", None)
    if "RMSNorm" not in type(module).__name__ or not isinstance(weight, Tensor) or "forward" in vars(module):
        return False
    asked = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    return weight.ndim == 1 and weight.device.type == on and _epsilon(module) is not None and len(asked) == 1


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


@torch.no_grad()
def _agrees(module: nn.Module) -> bool:
    """Whether both give the same of rows of very different sizes; of the smallest, epsilon is half."""
    weight, epsilon = module.weight, _epsilon(module)
    assert isinstance(weight, Tensor)
    assert epsilon is not None
    rows = torch.randn(16, len(weight), generator=torch.Generator().manual_seed(0))
    probe = (rows * torch.logspace(0, 6, 16)[:, None] * epsilon**0.5).to(weight)
    own, fused = module(probe), _fused(module)(probe)
    if own.dtype != fused.dtype:
        return False
    allowed = ROUNDINGS * torch.finfo(own.dtype).eps * own.double().abs()
    return bool(((own.double() - fused.double()).abs() <= allowed).all())


def _fused(module: nn.Module) -> Callable[..., Any]:
    """Its forward pass in one kernel; the module's own for anything but states in the precision of its weight."""
    own, weight, epsilon = module.forward, module.weight, _epsilon(module)
    assert isinstance(weight, Tensor)

    def forward(hidden: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or hidden.dtype != weight.dtype:
            return own(hidden, *rest, **named)
        # A GPU's autocast gives norms in float32, and with them all that reads them; the module's own steps do not.
        with full_precision(hidden.device):
            return F.rms_norm(hidden, weight.shape, weight, epsilon)

    return forward
