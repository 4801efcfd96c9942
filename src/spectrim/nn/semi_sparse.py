"""Linear layers stored as dense atoms and a semi-sparse matrix, and the form in which both are trained."""

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.factor import wide_product
from spectrim.linalg.metric import Root
from spectrim.linalg.semi_sparse import SemiSparse, Size, largest, pack_bits, unpack_bits, words_of
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.unit import ZERO_BIAS, Unit


def _after_loading(layer: "SemiSparseLinear", _keys: object) -> None:
    """Not a lambda: layers can be pickled."""
    layer.refresh_mask()


class SemiSparseLinear(StoredLinear):
    """`y = S (D x) + bias`, S (O, k) with s nonzeros in every row. `rank` is k, the number of atoms.

    Stored: `atoms.weight` D (k, I), `values` (O, s) by ascending position, `support` int16 (ceil(O k / 16),), a bit for
    each entry of S (linalg/semi_sparse.py), `bias` (O,) if any. S is scattered from them in each forward pass.
    """

    codec = "semi-sparse"
    support: Tensor
    mask: Tensor

    def __init__(
        self, inputs: int, outputs: int, size: Size, *, bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.rank, self.nonzeros = size
        self.atoms = nn.Linear(inputs, self.rank, bias=False, device=device, dtype=dtype)
        self.values = nn.Parameter(torch.zeros(outputs, self.nonzeros, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=device, dtype=dtype)) if bias else None
        words = torch.zeros(words_of(outputs * self.rank), dtype=torch.int16, device=device)
        self.register_buffer("support", words)
        self.add_guard(device, dtype)
        # Where the values go in S, a byte an entry; follows from the support, so it is not stored.
        mask = torch.zeros(outputs, self.rank, dtype=torch.bool, device=device)
        self.register_buffer("mask", mask, persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    @classmethod
    def from_factors(cls, found: SemiSparse, size: Size, bias: Tensor | None, like: Tensor) -> Self:
        """A layer that holds `found`, every row of whose S has at most s nonzeros, as `like` in dtype and device."""
        outputs, inputs = len(found.sparse), found.atoms.shape[1]
        made = cls(inputs, outputs, size, bias=bias is not None, device=like.device, dtype=like.dtype)
        support = largest(found.sparse, size.nonzeros)
        with torch.no_grad():
            made.atoms.weight.copy_(found.atoms)
            made.support.copy_(pack_bits(support))
            made.refresh_mask()
            made.values.copy_(found.sparse[support].view(outputs, size.nonzeros))
            if made.bias is not None and bias is not None:
                made.bias.copy_(bias)
        return made

    @classmethod
    def from_entry(
        cls, inputs: int, outputs: int, entry: Mapping[str, Any], *, device: Any = None, dtype: Any = None
    ) -> Self:
        atoms, nonzeros = entry["rank"], entry.get("nonzeros")
        if atoms > outputs:
            raise ValueError(f"rank {atoms}; the layer has {outputs} outputs, and no use for more atoms")
        if type(nonzeros) is not int or not 1 <= nonzeros <= atoms:
            raise ValueError(f"nonzeros {str(nonzeros)[:80]}; expected a whole number from 1 to the {atoms} atoms")
        return cls(inputs, outputs, Size(atoms, nonzeros), bias=entry["bias"], device=device, dtype=dtype)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "nonzeros": self.nonzeros}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        bias = {"bias": (self.out_features,)} if self.has_bias else {}
        return {
            "atoms.weight": (self.rank, self.in_features),
            "values": (self.out_features, self.nonzeros),
            "support": (words_of(self.out_features * self.rank),),
            **bias,
        }

    def after_load(self) -> None:
        if self.support.is_meta:  # the mask follows from it and would be left as found in memory
            raise ValueError("its support was offloaded before it could be read; load without offload_buffers=True")
        self.refresh_mask()

    def refresh_mask(self) -> None:
        """Recompute `mask` after the support has changed (loading does this)."""
        if self.support.is_meta:
            return
        mask = unpack_bits(self.support, self.out_features, self.rank)
        counts = mask.sum(1)
        wrong = (counts != self.nonzeros).nonzero().flatten()
        if len(wrong):
            raise ValueError(
                f"the support marks {int(counts[wrong[0]])} entries in row {int(wrong[0])}, every row has "
                f"{self.nonzeros}: damaged file"
            )
        self.mask = mask

    def sparse(self) -> Tensor:
        """S (O, k) as a dense tensor."""
        empty = torch.zeros(self.out_features, self.rank, dtype=self.values.dtype, device=self.values.device)
        return empty.masked_scatter(self.mask, self.values)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        return F.linear(self.atoms(x), self.sparse(), self.bias)

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return self.sparse().detach().to(wide) @ self.atoms.weight.detach().to(wide)


class LatentLinear(nn.Module):
    """A semi-sparse layer while it trains straight through: S is cut from a dense latent C (O, k).

        W = cut(C) D R^-1        R R^T: the metric of the inputs; C and D in units of their own size

    Going back, the gradient of the cut passes to all of C. Which entries count is chosen anew by `reselect` only, so
    that the support does not change from step to step.
    """

    support: Tensor
    from_right: Tensor

    def __init__(self, before: SemiSparseLinear, right: Root) -> None:
        super().__init__()
        self.in_features, self.out_features = before.in_features, before.out_features
        sparse, atoms = before.sparse().detach().double(), before.atoms.weight.detach().double()
        self.latent, self.atoms = Unit(sparse), Unit(atoms @ right.root)
        self.bias_unit = None if before.bias is None else Unit(before.bias, of_zero=ZERO_BIAS)
        self.nonzeros = before.nonzeros
        self.register_buffer("support", largest(sparse, self.nonzeros), persistent=False)
        self.register_buffer("from_right", right.dual.mT.float().contiguous(), persistent=False)

    def cut(self) -> Tensor:
        """S (O, k), with the gradient of C."""
        latent = self.latent()
        return torch.where(self.support, latent, latent - latent.detach())

    @torch.no_grad()
    def reselect(self) -> int:
        """Choose the largest of every row anew; how many entries of S changed."""
        now = largest(self.latent.unit, self.nonzeros)
        changed = int((now & ~self.support).sum())
        self.support.copy_(now)
        return changed

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        weight = wide_product(wide_product(self.cut(), self.atoms()), self.from_right)
        return F.linear(x, weight, None if self.bias_unit is None else self.bias_unit())

    @torch.no_grad()
    def stored(self, like: SemiSparseLinear) -> SemiSparseLinear:
        """The layer in the storage and dtype that it had."""
        sparse = self.latent.value() * self.support
        atoms = self.atoms.value() @ self.from_right.double()
        bias = None if self.bias_unit is None else self.bias_unit.value()
        size = Size(like.rank, like.nonzeros)
        return SemiSparseLinear.from_factors(SemiSparse(sparse, atoms), size, bias, like.values)
