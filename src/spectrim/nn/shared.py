"""A linear layer whose right factor belongs to a group of layers: one of them owns the basis, the others borrow it.

    y = U (V x) + bias        V (R, I) the group's basis, U (O, R) and the bias each layer's own

The owner holds `V` as its child. A borrower refers to the owner from outside its own modules: the basis is one
parameter of the model, which is saved, moved, cast, counted and trained once, and a deep copy of the model has
borrowers of the copied owner. Borrowers call the owner's `V` (and do not read its weight), so that whatever wraps that
child (an adapter, a hook that moves tensors between devices) holds for all of the group.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from spectrim.nn.codecs import StoredLinear


class SharedLinear(StoredLinear):
    """`y = U (V x) + bias`. Stored: `U.weight` (O, R), `U.bias` (O,) if any; by the owner also `V.weight` (R, I)."""

    codec: ClassVar[str] = "shared"

    def __init__(
        self, inputs: int, outputs: int, rank: int, *, bias: bool, basis: str | None = None, device=None, dtype=None
    ) -> None:
        """`basis` is the module path of the owner; None makes an owner."""
        super().__init__()
        self.in_features, self.out_features, self.rank, self.basis = inputs, outputs, rank, basis
        if basis is None:
            self.V = nn.Linear(inputs, rank, bias=False, device=device, dtype=dtype)
        self.U = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)
        self.add_guard(device, dtype)
        self._owner: tuple[SharedLinear, ...] = ()  # in a tuple: nn.Module takes no notice of what is inside

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "basis": self.basis}

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        rank, basis = entry["rank"], entry.get("basis", "")
        if rank > inputs:  # above O it still makes sense: the basis serves several layers
            raise ValueError(f"rank {rank}; the layer has {inputs} inputs, so its basis has at most {inputs} vectors")
        if basis is not None and (not isinstance(basis, str) or not basis):
            raise ValueError(
                f"basis {entry.get('basis')!r}; expected null where the layer holds its group's basis, else the module "
                "path of the layer that does"
            )
        return cls(inputs, outputs, rank, bias=entry["bias"], basis=basis, device=device, dtype=dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        bias = {"U.bias": (self.out_features,)} if self.has_bias else {}
        basis = {"V.weight": (self.rank, self.in_features)} if self.basis is None else {}
        return {**basis, "U.weight": (self.out_features, self.rank), **bias}

    def link(self, model: nn.Module) -> None:
        """Find the owner of the basis in `model`; ValueError when it is not there or does not fit."""
        if self.basis is not None:
            self.borrow(_owner_in(model, self.basis))

    def borrow(self, owner: nn.Module) -> None:
        """Use the basis of `owner`; ValueError unless it owns one of this layer's inputs and rank."""
        if not isinstance(owner, SharedLinear):
            raise ValueError(f"its basis is said to be in {self.basis}, which is a {type(owner).__name__}")
        if owner.basis is not None:
            raise ValueError(f"its basis is said to be in {self.basis}, which has none of its own ({owner.basis})")
        if (owner.in_features, owner.rank) != (self.in_features, self.rank):
            raise ValueError(
                f"it has {self.in_features} inputs and rank {self.rank}; the basis in {self.basis} has "
                f"{owner.in_features} and {owner.rank}"
            )
        self._owner = (owner,)

    @property
    def owner(self) -> "SharedLinear":
        """The layer that holds the basis."""
        if self.basis is None:
            return self
        if not self._owner:
            raise RuntimeError(
                f"a layer that shares the basis of {self.basis} was used before it was linked; call link(model) once "
                "all layers are in place"
            )
        return self._owner[0]

    @property
    def bias(self) -> Tensor | None:
        """Where code that treats this layer as an `nn.Linear` looks for the bias."""
        return self.U.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return self.U(self.owner.V(x))

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        left, right = self.U.weight.detach(), self.owner.V.weight.detach()
        wide = torch.promote_types(left.dtype, torch.float32)
        return left.to(wide) @ right.to(left.device, wide)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, basis={self.basis or 'its own'}"


def _owner_in(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; a headless model has no `model.` level in its paths, a wrapped one may have an extra."""
    prefix = getattr(model, "base_model_prefix", "")
    modules = dict(model.named_modules())
    found = next((n for n in (path, path.removeprefix(prefix + "."), f"{prefix}.{path}") if n in modules), None)
    if found is None:
        raise ValueError(f"its basis is said to be in {path}, which this model does not have")
    return modules[found]
