"""Safetensors files whose tensors are written one by one, in any order, once their shapes are known.

The bytes are those that safetensors writes: the header first, then tensors by falling width of their numbers and by
name. Nothing but the tensor that is written is in memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from spectrim.store.pieces import Pieces
from spectrim.store.tensors import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor goes."""

    file: Path
    start: int
    like: Tensor  # on the meta device


@dataclass
class Shards:
    """The files of one model: `files` maps a path to its tensors by name, which may lie on the meta device."""

    files: Mapping[Path, Mapping[str, Tensor]]
    pieces: Pieces = field(default_factory=lambda: Pieces(torch.device("cpu")))

    def __post_init__(self) -> None:
        """Headers are written, and each file is as long as it will be."""
        self._places: dict[str, Place] = {}
        for path, tensors in self.files.items():
            entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
            places: dict[str, tuple[int, Tensor]] = {}
            end = 0
            for name in sorted(tensors, key=lambda name, own=tensors: (-own[name].dtype.itemsize, name)):
                like = tensors[name]
                entries[name] = {
                    "dtype": NAMES[like.dtype],
                    "shape": list(like.shape),
                    "data_offsets": [end, end + like.nbytes],
                }
                places[name] = (end, like)
                end += like.nbytes
            header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
            header += b" " * (-len(header) % 8)
            with open(path, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                file.truncate(8 + len(header) + end)
            for name, (start, like) in places.items():
                self._places[name] = Place(file=path, start=8 + len(header) + start, like=like)
        self._missing = set(self._places)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor in its place. AssertionError where it is not the one that was announced."""
        place = self._places[name]
        assert name in self._missing, f"{name} is written twice"
        assert (tensor.shape, tensor.dtype) == (place.like.shape, place.like.dtype), (
            f"{name}: {tuple(tensor.shape)} {tensor.dtype}, announced {tuple(place.like.shape)} {place.like.dtype}"
        )
        with open(place.file, "r+b") as file:
            file.seek(place.start)
            self.pieces.write(file, tensor)
        self._missing.discard(name)

    def finish(self) -> None:
        """AssertionError unless every tensor is there."""
        assert not self._missing, f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}"
