"""Nested state as flat tensors and a JSON-ready outline, and back: what a checkpoint needs of an optimizer.

An outline has one of these forms a node; dict keys keep their type (optimizers count their parameters by int):

    {"tensor": name, "host": bool}   {"list": [...]}   {"tuple": [...]}   {"dict": [[key, node], ...]}   {"value": x}
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import InputError


def pack(tree: Any, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, all names starting with `prefix`, and the outline. The tensors are not copied."""
    if isinstance(tree, Tensor):
        return {prefix: tree.detach()}, {"tensor": prefix, "host": tree.device.type == "cpu"}
    if isinstance(tree, Mapping):
        parts = [(key, pack(value, f"{prefix}.{key}")) for key, value in tree.items()]
        tensors = {name: t for _, (found, _) in parts for name, t in found.items()}
        return tensors, {"dict": [[key, outline] for key, (_, outline) in parts]}
    if isinstance(tree, list | tuple):
        inner = [pack(value, f"{prefix}.{i}") for i, value in enumerate(tree)]
        tensors = {name: t for found, _ in inner for name, t in found.items()}
        return tensors, {"tuple" if isinstance(tree, tuple) else "list": [outline for _, outline in inner]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {}, {"value": tree}
    raise AssertionError(f"{prefix}: a {type(tree).__name__} cannot be kept in a checkpoint")


def unpack(tensors: Mapping[str, Tensor], outline: Mapping[str, Any], device: torch.device) -> Any:
    """The tree again, of copies; what was on the CPU comes back there (step counts), the rest on `device`."""
    if "tensor" in outline:
        kept = find(tensors, outline["tensor"])
        return kept.detach().to("cpu" if outline["host"] else device, copy=True)
    if "dict" in outline:
        return {key: unpack(tensors, node, device) for key, node in outline["dict"]}
    if "list" in outline:
        return [unpack(tensors, node, device) for node in outline["list"]]
    if "tuple" in outline:
        return tuple(unpack(tensors, node, device) for node in outline["tuple"])
    return outline["value"]


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`prefix.name` for every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors that `with_prefix` named, under their own names."""
    start = len(prefix) + 1
    return {name[start:]: tensor for name, tensor in tensors.items() if name.startswith(prefix + ".")}


@torch.no_grad()
def fill(into: Mapping[str, Tensor], saved: Mapping[str, Tensor], stage: str) -> None:
    """Copy saved tensors into living ones of the same names and shapes; nothing is changed if one does not fit."""
    for name, tensor in into.items():
        kept = find(saved, name)
        if kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            raise InputError(
                f"checkpoint of stage {stage!r}: {name} is {tuple(kept.shape)} {kept.dtype}, this run has "
                f"{tuple(tensor.shape)} {tensor.dtype}; it is of another run: remove the checkpoint"
            )
    for name, tensor in into.items():
        tensor.copy_(saved[name])


def find(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A tensor that a checkpoint must hold."""
    if name not in tensors:
        raise InputError(f"checkpoint: {name} is missing; it is damaged or of another run: remove it and start again")
    return tensors[name]


def fingerprint(tensor: Tensor) -> str:
    """Short hash of the bytes of token ids or indices: another text is another run."""
    return hashlib.sha256(tensor.contiguous().cpu().numpy().tobytes()).hexdigest()[:16]
