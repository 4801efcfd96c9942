"""Layers that read one input, computed together when it has few rows: what `StoredLinear.few` refers to.

The first layer of a group that is called with some tensor computes all of them; the others find their results. A group
holds no tensors of its own and is no part of what is saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.launch import Tile, coded_product, coded_products, products, shared_group, words_fit
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.shared import InputPivots, SharedLinear, SharedPivotLinear
from spectrim.nn.stores import Store
from spectrim.nn.stores_uniform import UniformStore

Tiles = tuple[Tile, Tile]
PLAIN = (LowRankLinear, PivotLinear, SharedLinear)
CODED = (QuantisedFactorLinear, QuantisedPivotLinear)
WHOLE = (PackedLinear,)
"""One weight in codes: one product, for which the first tile counts."""


@dataclass(eq=False)
class FewRows:
    """A group of layers and, for numbers of rows for which the kernels won, the tiles that won.

    `dtype` and `device` are those of the layers when the clock ran: after `model.to(...)` the torch products are back.
    """

    layers: tuple[StoredLinear, ...]
    tiles: dict[int, Tiles]
    dtype: torch.dtype
    device: torch.device
    places: list[Tensor] = field(default_factory=list)
    shared: bool = False  # all have one right factor, whose product is made once
    kept: tuple[Tensor, int | None, list[Tensor]] | None = None
    """The input seen last, its version when the results were made, and these; one field, since threads may run this."""

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels won for this many rows, no gradient is asked for, and results can be shared safely.

        The kernels read weights and call no module, so what is put around one (an adapter) has the torch products back.
        Tensors made under `torch.inference_mode()` do not count their changes, so no two layers share one.
        """
        as_timed = x.dtype == self.dtype and x.device == self.device
        if not as_timed or x.numel() // x.shape[-1] not in self.tiles or torch.is_grad_enabled():
            return False
        if not all(is_bare(layer) for layer in self.layers):
            return False
        return len(self.layers) == 1 or torch.compiler.is_compiling() or not x.is_inference()

    def product(self, layer: StoredLinear, x: Tensor) -> Tensor:
        """y (..., O) of one layer of the group for x (..., I)."""
        index = next(i for i, member in enumerate(self.layers) if member is layer)
        kept, version = self.kept, version_of(x)
        if kept is None or kept[0] is not x or kept[1] != version:
            kept = self.kept = x, version, self.all_of(x)
        y = kept[2][index]
        if index == len(self.layers) - 1:
            self.kept = None  # or results would live until the next token
        return y.view(*x.shape[:-1], y.shape[-1])

    def all_of(self, x: Tensor, tiles: Tiles | None = None) -> list[Tensor]:
        """y_g (M, O_g) of all layers."""
        lines = x.reshape(-1, x.shape[-1]).contiguous()
        first, second = self.tiles[len(lines)] if tiles is None else tiles
        biases: list[Any] = [layer.bias for layer in self.layers if layer.has_bias]
        if isinstance(self.layers[0], WHOLE):
            return self._whole(lines, first, biases)
        if isinstance(self.layers[0], CODED):
            stores = [store for layer in self.layers for store in coded_parts(layer)]
            right, left = stores[::2], stores[1::2]
            return coded_products(
                lines, *_tensors(right), *_tensors(left), self.places, biases, [right[0].bits, left[0].bits],
                [_group(right), _group(left)], list(first), list(second),
            )  # fmt: skip
        pairs: list[Any] = [plain_parts(layer) for layer in self.layers]
        rights, lefts = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if self.shared:
            rights = rights[:1]
        order = order_of_inputs(self.layers[0])
        return products(lines, rights, lefts, self.places, biases, list(first), list(second), order)

    def _whole(self, lines: Tensor, tile: Tile, biases: list[Any]) -> list[Tensor]:
        stores = [store for layer in self.layers for store in coded_parts(layer)]
        made = coded_product(lines, *_tensors(stores), biases, stores[0].bits, _group(stores), list(tile))
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, PackedLinear)
            if layer.U is not None and layer.V is not None:
                made[index] = made[index] + layer.U(layer.V(lines))
        return made


def is_bare(layer: StoredLinear) -> bool:
    """Whether the linear layers inside compute what their weights say: nothing is wrapped around them or hooked in."""
    if not isinstance(layer, PLAIN):
        return True
    parts = [*layer._modules.values(), *([layer.owner.V] if isinstance(layer, SharedLinear) else [])]
    return all(
        type(part) in (nn.Linear, InputPivots) and not part._forward_hooks and not part._forward_pre_hooks
        for part in parts
    )


def version_of(x: Tensor) -> int | None:
    """How often a tensor was changed in place.

    None while a graph is traced, which would break at the question: there, a tensor that is changed in place between
    two layers that read it is read as it was before.
    """
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def plain_parts(layer: StoredLinear) -> tuple[Tensor, Tensor]:
    """V and U of a factor layer, also of one that borrows V; pivot rows and coefficients of a pivot layer."""
    if isinstance(layer, PivotLinear):
        return layer.pivot.weight, layer.rest.weight
    if isinstance(layer, SharedLinear):
        basis = layer.owner.V
        weight = basis.rest.weight if isinstance(basis, InputPivots) else layer.basis_weight()
        return weight, layer.U.weight
    assert isinstance(layer, LowRankLinear)
    return layer.V.weight, layer.U.weight


def order_of_inputs(layer: StoredLinear) -> Tensor | None:
    """Of a layer whose right factor is in pivot storage: the inputs that pass as they are, then the others."""
    if not isinstance(layer, SharedLinear):
        return None
    basis = layer.owner.V
    return basis.order if isinstance(basis, InputPivots) else None


def coded_parts(layer: StoredLinear) -> tuple[UniformStore, ...]:
    """The stores of a layer in codes: two of a low-rank layer, one of a packed one."""
    stores = stores_of(layer)
    uniform = tuple(store for store in stores if isinstance(store, UniformStore))
    assert len(uniform) == len(stores)
    return uniform


def stores_of(layer: StoredLinear) -> tuple[Store, ...]:
    """The parts that `coded_parts` takes if they are uniform codes."""
    if isinstance(layer, PackedLinear):
        return (layer.base,)
    assert isinstance(layer, CODED)
    return tuple(layer.stores.values())


def _tensors(stores: Sequence[UniformStore]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    zeros = [store.zeros for store in stores if store.zeros is not None]
    return [store.codes for store in stores], [store.scales for store in stores], zeros


def _group(stores: Sequence[UniformStore]) -> int:
    found = shared_group([store.group_size or store.inputs for store in stores])
    assert found is not None
    return found


def unsuited(layers: Sequence[StoredLinear]) -> str | None:
    """Why the kernels have no form for these layers together, None where they have."""
    kind = type(layers[0])
    if any(type(layer) is not kind for layer in layers) or not isinstance(layers[0], PLAIN + CODED + WHOLE):
        return f"no kernel for {', '.join(sorted({layer.codec for layer in layers}))}"
    if not all(is_bare(layer) for layer in layers):
        return "a factor that something is wrapped around or hooked to"
    if kind is SharedPivotLinear and len({id(layer.owner) for layer in layers if isinstance(layer, SharedLinear)}) > 1:
        return "shared factors of several groups"
    if len({layer.has_bias for layer in layers}) > 1:
        return "some have a bias, others not"
    if len({parameter.dtype for layer in layers for parameter in layer.parameters()}) > 1:
        return "several dtypes"
    if isinstance(layers[0], CODED + WHOLE):
        return _unsuited_codes(layers)
    weights = [part for layer in layers for part in plain_parts(layer)]
    return None if all(weight.is_contiguous() for weight in weights) else "weights that are not contiguous"


def _unsuited_codes(layers: Sequence[StoredLinear]) -> str | None:
    for stores in zip(*(stores_of(layer) for layer in layers), strict=True):
        uniform = [store for store in stores if isinstance(store, UniformStore)]
        if len(uniform) < len(stores):
            return f"no kernel for these stores: {', '.join(sorted({store.kind for store in stores}))}"
        if len({(store.bits, store.symmetric) for store in uniform}) > 1:
            return "several widths of codes"
        if shared_group([store.group_size or store.inputs for store in uniform]) is None:
            return "groups of inputs that 32 does not divide"
        if not all(words_fit(store.codes) for store in uniform):
            return "codes that do not start at words of 32 bits"
    return None


def group_of(layers: Sequence[StoredLinear], tiles: dict[int, Tiles]) -> FewRows:
    """A group ready to run, not yet attached."""
    placed = [layer for layer in layers if isinstance(layer, PivotLinear | QuantisedPivotLinear)]
    like = next(parameter for parameter in layers[0].parameters())
    # `order` says where each output comes from, `places` where each result goes.
    places = [layer.order.argsort().int() for layer in placed]
    owners = {id(layer.owner) if isinstance(layer, SharedLinear) else id(layer) for layer in layers}
    return FewRows(tuple(layers), tiles, like.dtype, like.device, places, shared=len(owners) == 1 and len(layers) > 1)


def attach(group: FewRows) -> None:
    """Let the layers of a group use it."""
    for layer in group.layers:
        layer.few = group
