"""What every linear layer in a storage of our own has in common, and the table of these storages.

A codec is one class: it says how large a layer is (`entry`, a line of config.json), which tensors the file holds
(`shapes`), what the layer computes (`forward`) and what weight it stands for (`dense_weight`). Saving, loading by
plain `from_pretrained`, counting, checking and inspection follow. Adding one is a file here and a line in `CODECS`.

Every such layer has a zero-element buffer named `weight`: a program that loads the folder without spectrim meets a
shape mismatch and stops, where it would otherwise fill the layer with random numbers and go on.
"""

from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

CODECS = {
    "factor": "spectrim.nn.linears:LowRankLinear",
    "pivot": "spectrim.nn.linears:PivotLinear",
    "narrow": "spectrim.nn.narrow:NarrowLinear",
    "mpo": "spectrim.nn.mpo:MPOLinear",
    "semi-sparse": "spectrim.nn.semi_sparse:SemiSparseLinear",
    "shared": "spectrim.nn.shared:SharedLinear",
    "shared-pivot": "spectrim.nn.shared:SharedPivotLinear",
    "packed": "spectrim.nn.packed:PackedLinear",
    "quantised-factor": "spectrim.nn.quantised:QuantisedFactorLinear",
    "quantised-pivot": "spectrim.nn.quantised:QuantisedPivotLinear",
}
"""Name in the file to module class, imported at first use."""


class StoredLinear(nn.Module):
    """A linear layer (O outputs, I inputs) whose weight is stored in another form than O x I numbers."""

    codec: ClassVar[str]
    in_features: int
    out_features: int
    rank: int
    """A number that says how much is kept: the rank where there is one."""
    weight: Tensor
    few: Any = None
    """A quicker form of the product with few rows (nn/kernels/few.py), where one was chosen."""
    many: Any = None
    """A quicker way to put outputs of many rows in their places (nn/kernels/many.py), where one was chosen."""

    def add_guard(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """The zero-element `weight`; every constructor ends with it."""
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    def entry(self) -> dict[str, Any]:
        """The layer's line in config.json, JSON-ready; codecs that need more than a rank add to it."""
        return {"codec": self.codec, "rank": self.rank, "bias": self.has_bias}

    @classmethod
    @abstractmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        """An empty layer as `entry` says, in the place of a dense one of O x I.

        The entry is not trusted (codec, a rank of at least 1 and bias are there and of their types): ValueError, before
        anything is allocated, that says what it may be.
        """

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors by key, as they follow from the entry, without the guard."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, worked out in float32 or better."""

    @property
    def has_bias(self) -> bool:
        """Whether it adds a bias."""
        return getattr(self, "bias", None) is not None

    @property
    def numbers(self) -> int:
        """Stored numbers, everything counted: elements of all tensors, whatever their dtype."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    def after_load(self) -> None:
        """Check what was loaded and work out what follows from it; ValueError says what is wrong."""

    def link(self, model: nn.Module) -> None:
        """Called for every stored layer once the whole model is there, for those that use tensors of another."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def codec_class(name: str) -> type[StoredLinear]:
    """The class of a codec in `CODECS`."""
    module, _, attribute = CODECS[name].partition(":")
    return getattr(import_module(module), attribute)


def check_rank(entry: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """The rank of a low-rank layer; ValueError when no O x I matrix has it."""
    if entry["rank"] > min(outputs, inputs):
        raise ValueError(
            f"rank {entry['rank']}; the layer is {outputs} x {inputs}, so at most {min(outputs, inputs)} is possible"
        )
    return entry["rank"]
