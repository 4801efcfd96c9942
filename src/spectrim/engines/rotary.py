"""Positions of queries and keys put in by one kernel each, where that is what a model's own function computes.

Models turn both in single steps (two products, halves put beside each other, a sum), each of which reads and writes all
of them, on the way back too (`benchmarks/scale.py --what rotary`). transformers has a function for it in the file of
each architecture, `apply_rotary_pos_emb`. It is only replaced where both give the same numbers on a probe, bit for
bit, there and back: pairs of neighbours (Cohere), another precision inside, or another order of the arguments, keep
their own steps. A call of another kind than the probe was (part of each head, other dimensions) goes the model's way.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.kernels.launch import missing
from spectrim.nn.rotary import DTYPES, rotated, suits

NAME = "apply_rotary_pos_emb"

Rotary = Callable[..., Any]


@contextmanager
def fused_rotary(model: nn.Module, *, on: str = "cuda") -> Iterator[list[str]]:
    """Rotations of `model`, if it lies `on` such a device, run as one kernel meanwhile; their Python modules by name.

    So do those of its copies, and of every model of that architecture in this process: the function is the module's.
    """
    places = {place.__name__: place for place in _written_in(model)}
    own = {name: getattr(place, NAME) for name, place in places.items()}
    like = next((p for p in model.parameters() if p.device.type == on and p.dtype in DTYPES), None)
    if like is None or missing() is not None:
        own = {}
    fused = {name: _fused(f, like.dtype) for name, f in own.items() if like is not None and _agrees(f, like)}
    try:
        for name, function in fused.items():
            setattr(places[name], NAME, function)
        yield [*fused]
    finally:
        for name in fused:
            setattr(places[name], NAME, own[name])


def _written_in(model: nn.Module) -> Iterator[ModuleType]:
    """The Python modules with a rotation that classes of `model` come from."""
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        place = sys.modules.get(name)
        if place is not None and inspect.isfunction(getattr(place, NAME, None)):
            yield place


def _agrees(own: Rotary, like: Tensor) -> bool:
    """Whether both give the same of random heads and angles, whose halves have nothing to do with each other."""
    if [*inspect.signature(own).parameters][:4] != ["q", "k", "cos", "sin"]:
        return False
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    cos, sin = drawn(1, 5, 32), drawn(1, 5, 32)
    given = [drawn(2, heads, 5, 32) for heads in (4, 3)]
    upstream = [drawn(2, heads, 5, 32) for heads in (4, 3)]
    found = []
    with torch.enable_grad():
        for function in (own, _fused(own, like.dtype)):
            q, k = (x.clone().requires_grad_(True) for x in given)
            try:
                results = function(q, k, cos, sin)
                back = torch.autograd.grad(results, (q, k), upstream)
            except (RuntimeError, TypeError, ValueError, IndexError):  # its own kind of arguments
                return False
            found.append([part.detach() for part in (*results, *back)])
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


def _fused(own: Rotary, dtype: torch.dtype) -> Rotary:
    """One kernel for queries and one for keys of the `dtype` that was probed; the model's own for any other call."""

    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or q.dtype != dtype or not (suits(q, cos, sin) and suits(k, cos, sin)):
            return own(q, k, cos, sin, *rest, **named)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    return forward
