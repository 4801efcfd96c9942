"""Tensors in a model's files that the model has no place for."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from spectrim.models.walk import find_layers
from spectrim.store import Checkpoint, TensorInfo
from spectrim.store.files import shown


def give_extra(
    checkpoint: Checkpoint, model: PreTrainedModel, info: Mapping[str, Any], extra: dict[str, TensorInfo] | None
) -> list[str]:
    """Fills `extra`; what there is to say. Tensors inside layers that are replaced say something of the old weight."""
    unexpected = sorted(info["unexpected_keys"])
    layers = tuple(f"{layer.name}." for layer in find_layers(model).layers)
    prefix = f"{model.base_model_prefix}."  # a headless model's files lack it
    found = {name: checkpoint.tensors.get(name) for name in unexpected}
    found = {name: own or checkpoint.tensors.get(name.removeprefix(prefix)) for name, own in found.items()}
    copied = {own.name: own for name, own in found.items() if own is not None and not name.startswith(layers)}
    left = [name for name, own in found.items() if own is None or own.name not in copied]
    if extra is not None:
        extra |= copied
    told = [
        (sorted(copied), "belong to no part of the model and are copied into the result as they are"),
        (left, "belong to layers that are compressed and are not in the result"),
    ]
    return [
        f"{len(names)} tensors in the files {what}: {', '.join(map(shown, names[:3]))}" for names, what in told if names
    ]
