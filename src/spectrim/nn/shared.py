"""A linear layer whose right factor belongs to a group of layers: one of them owns the basis, the others borrow it.

    y = U (V x) + bias        V (R, I) the group's basis, U (O, R) and the bias each layer's own

The owner holds `V` as its child. A borrower refers to the owner from outside its own modules: the basis is one
parameter of the model, which is saved, moved, cast, counted and trained once, and a deep copy of the model has
borrowers of the copied owner. Borrowers call the owner's `V` (and do not read its weight), so that whatever wraps that
child (an adapter, a hook that moves tensors between devices) holds for all of the group.

In pivot storage R of the inputs pass as they are: the basis is the identity there, and only its other columns are kept.

Layers of a group that read the very same tensor, one after the other, multiply by the basis once where that is safe
(`product_of`); under torch.compile they are one expression that the compiler computes once.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from spectrim.linalg.pivot import unpack_mask
from spectrim.linalg.shared import spread_basis
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
        self.owns = basis is None  # the compiler makes new code for each name that it meets, but not for each flag
        if self.owns:
            self.V = self.new_basis(device, dtype)
        self.U = nn.Linear(rank, outputs, bias=bias, device=device, dtype=dtype)
        self.add_guard(device, dtype)
        self._owner: tuple[SharedLinear, ...] = ()  # in a tuple: nn.Module takes no notice of what is inside

    def new_basis(self, device: Any, dtype: Any) -> nn.Module:
        """What an owner holds as `V`, empty: x (..., I) to (..., R)."""
        return nn.Linear(self.in_features, self.rank, bias=False, device=device, dtype=dtype)

    def basis_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `new_basis` stores."""
        return {"V.weight": (self.rank, self.in_features)}

    def basis_weight(self) -> Tensor:
        """The basis (R, I) of the group."""
        weight = self.owner.V.weight
        assert isinstance(weight, Tensor)
        return weight

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
        basis = self.basis_shapes() if self.basis is None else {}
        return {**basis, "U.weight": (self.out_features, self.rank), **bias}

    def link(self, model: nn.Module) -> None:
        """Find the owner of the basis in `model`; ValueError when it is not there or does not fit."""
        if self.basis is not None:
            self.borrow(_owner_in(model, self.basis))

    def borrow(self, owner: nn.Module) -> None:
        """Use the basis of `owner`; ValueError unless it owns one of this layer's inputs and rank."""
        if type(owner) is not type(self):
            raise ValueError(f"its basis is said to be in {self.basis}, which is a {type(owner).__name__}")
        assert isinstance(owner, SharedLinear)
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
        if self.owns:
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
        if self.few is not None and self.few.takes(x):
            return self.few.product(self, x)
        return self.U(product_of(self, x))

    def dense_weight(self) -> Tensor:
        """The weight (O, I) that this layer stands for, multiplied in float32 or better."""
        left, right = self.U.weight.detach(), self.basis_weight().detach()
        wide = torch.promote_types(left.dtype, torch.float32)
        return left.to(wide) @ right.to(left.device, wide)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, basis={self.basis or 'its own'}"


def product_of(layer: SharedLinear, x: Tensor) -> Tensor:
    """`V x` (..., R) of the group's basis, once for all layers that ask for it with the same tensor.

    It is kept with `x`, and goes with it. Only where nothing can come between: no gradient, no training, no CUDA graph,
    no wrapper or hook at `V`, neither `x` nor the basis changed, the same precision and stream. Tensors made under
    `torch.inference_mode()` do not count their changes, so there each layer multiplies. While a graph is traced changes
    cannot be asked for: the owner multiplies at each call, and those that come after it with the same tensor take that.
    """
    owner = layer.owner
    basis = owner.V
    assert isinstance(basis, nn.Module)
    if torch.is_grad_enabled() or owner.training or type(basis) not in (nn.Linear, InputPivots):
        return basis(x)
    if basis._forward_hooks or basis._forward_pre_hooks:
        return basis(x)
    traced = torch.compiler.is_compiling()
    state = None if traced else _state_of(basis, x)
    if state is None and not traced:
        return basis(x)
    kept = getattr(x, KEPT, None) if not traced or not layer.owns else None
    if isinstance(kept, Kept) and kept.owner is owner and (traced or kept.state == state):
        return kept.product
    z = basis(x)
    setattr(x, KEPT, Kept(owner, state, z))
    return z


KEPT = "_spectrim_basis_product"


class Kept(NamedTuple):
    """What `product_of` keeps with an input. It stays behind when that is copied or written to a file."""

    owner: SharedLinear
    state: tuple[Any, ...] | None
    product: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which torch.load knows; the model is no part of one of its inputs


def _state_of(basis: nn.Module, x: Tensor) -> tuple[Any, ...] | None:
    """What changes when the input, the basis or the way of computing does; None where that cannot be asked for."""
    tensors = (x, *basis.parameters(), *basis.buffers())
    if any(t.is_inference() for t in tensors):
        return None
    kind = x.device.type
    try:
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        seen = [(t.data_ptr(), t._version) for t in tensors]
    except RuntimeError:  # tensors without memory of their own: meta, of torch.func, of several devices
        return None
    if not x.is_cuda:
        return precision, *seen
    if torch.cuda.is_current_stream_capturing():  # a replay must not read what was made outside
        return None
    return precision, torch.cuda.current_stream(x.device).cuda_stream, *seen


class InputPivots(nn.Module):
    """A basis of which R columns are those of the identity: `z = x[pivots] + rest(x[others])`.

    Stored: `rest.weight` (R, I - R) and `mask` (ceil(I / 8),) uint8, which marks the R inputs.
    """

    mask: Tensor
    order: Tensor

    def __init__(self, inputs: int, rank: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.in_features, self.rank = inputs, rank
        self.rest = nn.Linear(inputs - rank, rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("mask", torch.zeros((inputs + 7) // 8, dtype=torch.uint8, device=device))
        # Pivots first, then the others, both ascending; follows from the mask, so it is not stored.
        self.register_buffer("order", torch.zeros(inputs, dtype=torch.int32, device=device), persistent=False)
        self.register_load_state_dict_post_hook(_after_loading)

    def refresh_order(self) -> None:
        """Recompute `order` after the mask has changed; ValueError unless it marks R inputs."""
        if self.mask.is_meta:
            return
        mask = unpack_mask(self.mask, self.in_features)
        if int(mask.sum()) != self.rank:
            raise ValueError(f"mask marks {int(mask.sum())} inputs, the basis has {self.rank} vectors: damaged file")
        self.order = torch.cat([mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]]).int()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., R)."""
        pivots, others = x.index_select(-1, self.order).split([self.rank, self.in_features - self.rank], -1)
        return pivots + self.rest(others)

    def dense_weight(self) -> Tensor:
        """(R, I)."""
        return spread_basis(self.rest.weight, unpack_mask(self.mask, self.in_features))


def _after_loading(layer: InputPivots, _keys: object) -> None:
    """Not a lambda: layers can be pickled. A mask that does not fit is told when the folder is checked."""
    if int(unpack_mask(layer.mask, layer.in_features).sum()) == layer.rank or layer.mask.is_meta:
        layer.refresh_order()


class SharedPivotLinear(SharedLinear):
    """The same with R of the inputs passed as they are. Stored by the owner: `V.rest.weight` (R, I - R), `V.mask`."""

    codec: ClassVar[str] = "shared-pivot"

    def new_basis(self, device: Any, dtype: Any) -> nn.Module:
        """x (..., I) to (..., R)."""
        return InputPivots(self.in_features, self.rank, device=device, dtype=dtype)

    def basis_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of what `new_basis` stores."""
        return {"V.rest.weight": (self.rank, self.in_features - self.rank), "V.mask": ((self.in_features + 7) // 8,)}

    def basis_weight(self) -> Tensor:
        """The basis (R, I) of the group."""
        basis = self.owner.V
        assert isinstance(basis, InputPivots)
        return basis.dense_weight()

    def after_load(self) -> None:
        if self.basis is not None:
            return
        assert isinstance(self.V, InputPivots)
        if self.V.mask.is_meta:  # the order of the inputs follows from it
            raise ValueError("its pivot mask was offloaded before it could be read; load without offload_buffers=True")
        self.V.refresh_order()


def _owner_in(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`; a headless model has no `model.` level in its paths, a wrapped one may have an extra."""
    prefix = getattr(model, "base_model_prefix", "")
    modules = dict(model.named_modules())
    found = next((n for n in (path, path.removeprefix(prefix + "."), f"{prefix}.{path}") if n in modules), None)
    if found is None:
        raise ValueError(f"its basis is said to be in {path}, which this model does not have")
    return modules[found]
