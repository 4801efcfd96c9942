"""Two models side by side, block by block: what propagation, refitting and block refinement walk over.

A stream holds the hidden states of all windows before the present block only: windows x length x width numbers. What a
block is called with beside them (positions, masks) is kept too, once where it is the same for all batches.
"""

from collections.abc import Callable, MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.loop import Buffers
from spectrim.engines.pack import fill
from spectrim.linalg.curvature import add_gram, mirror
from spectrim.models.walk import Walk, device_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block beside its hidden states."""


@dataclass
class Stream:
    """One model's hidden states before the present block, and how to call each block."""

    model: PreTrainedModel
    blocks: list[nn.Module]
    hidden: MutableSequence[Tensor]
    arguments: list[list[Call]]  # [batch][block]
    passed: list[int]  # blocks that each batch is through

    def run(self, block: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output on the stored hidden states of a batch, or on `hidden`."""
        rest, kwargs = self.arguments[batch][block]
        output = self.blocks[block](self.hidden[batch] if hidden is None else hidden, *rest, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, block: int) -> None:
        """Put the block's outputs in the place of its inputs, batch by batch; of those that are not there yet."""
        for batch in range(len(self.hidden)):
            if self.passed[batch] == block:
                self.hidden[batch] = self.run(block, batch)
                self.passed[batch] = block + 1

    def put(self, block: int, outputs: list[Tensor]) -> None:
        """Outputs of the block that are known, in the place of its inputs."""
        self.hidden, self.passed = list(outputs), [block + 1] * len(outputs)

    def split(self, size: int, arguments: list[list[Call]]) -> None:
        """Go on with each batch in parts of `size` windows, which are called with `arguments`; the same numbers."""
        self.arguments = arguments
        parts = [hidden.split(size) for hidden in self.hidden]
        self.passed = [passed for passed, split in zip(self.passed, parts, strict=True) for _ in split]
        self.hidden = [part for split in parts for part in split]


@torch.no_grad()
def start(model: PreTrainedModel, walk: Walk, ids: Tensor, batch_size: int | list[int]) -> Stream:
    """Run the model once over `ids` (windows, length) to see what every block is called with.

    `batch_size` may be the size of each batch.
    """
    blocks = [model.get_submodule(name) for name in walk.block_names]
    stream = Stream(model=model, blocks=blocks, hidden=[], arguments=[], passed=[])
    calls: list[Call] = []

    def note(block: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            calls.append((args[1:], kwargs))
            if block == 0:
                stream.hidden.append(hidden)
                stream.passed.append(0)

        return hook

    handles = [b.register_forward_pre_hook(note(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for batch in ids.split(batch_size):
            calls.clear()
            model(input_ids=batch.to(device_of(model)), use_cache=False)
            first = stream.arguments[0] if stream.arguments else calls
            stream.arguments.append([shared(call, known) for call, known in zip(calls, first, strict=True)])
    finally:
        for handle in handles:
            handle.remove()
    return stream


def shared(new: Any, known: Any) -> Any:
    """`known` in the place of `new` wherever they are equal: masks of all batches would be larger than the states."""
    if isinstance(new, Tensor):
        same = isinstance(known, Tensor) and new.shape == known.shape and new.dtype == known.dtype
        return known if new is known or (same and torch.equal(new, known)) else new
    if type(new) is tuple and type(known) is tuple and len(new) == len(known):
        return tuple(shared(a, b) for a, b in zip(new, known, strict=True))
    if type(new) is dict and type(known) is dict and new.keys() == known.keys():
        return {key: shared(value, known[key]) for key, value in new.items()}
    return new


def inputs_of(stream: Stream, block: int, names: list[str]) -> dict[str, list[Tensor]]:
    """Inputs of the layers `names` by batch, from one pass through their block, which the stream then has behind it.

    Of a layer that does not read once in a pass there is no full list.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].append(inputs[0])

        return hook

    handles = [stream.model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        stream.advance(block)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def input_moments(
    dense: Stream, small: Stream, block: int, name: str, known: list[Tensor] | None = None
) -> tuple[Tensor, Tensor] | None:
    """E[x x'^T] and E[x' x'^T] at the input of layer `name`, x in `dense` and x' in `small`, at their present block.

    `known` is x by batch, from `inputs_of`; without it `dense` runs up to the layer too.
    None where tokens cannot be paired: those of an expert, which each model chooses in its own way.
    """
    if known is not None and len(known) != len(dense.hidden):
        return None
    seen: dict[str, Tensor] = {}
    running = [("small", small)] if known is not None else [("dense", dense), ("small", small)]
    handles = [stream.model.get_submodule(name).register_forward_pre_hook(_store(seen, key)) for key, stream in running]
    cross = gram = None
    tokens = 0
    try:
        for batch, hidden in enumerate(dense.hidden):
            seen.clear()
            if known is not None:
                seen["dense"] = known[batch]
            for _, stream in running:
                with suppress(_Seen):
                    stream.run(block, batch)
            rows = {key: x.reshape(-1, x.shape[-1]) for key, x in seen.items()}
            if any(key not in rows or len(rows[key]) != hidden.shape[:-1].numel() for key in ("dense", "small")):
                return None
            x, y = rows["dense"], rows["small"]
            if cross is None or gram is None:
                cross = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
                gram = torch.zeros_like(cross)
            add_gram(cross, x, y)
            add_gram(gram, y, upper=True)
            tokens += len(x)
    finally:
        for handle in handles:
            handle.remove()
    assert cross is not None, "no calibration window"
    assert gram is not None
    mirror(gram)
    return cross / tokens, gram / tokens


class _Seen(Exception):
    """No error: the way out of a block once the input is known."""


def _store(seen: dict[str, Tensor], key: str) -> Callable[..., None]:
    """A hook that puts a layer's input into `seen[key]` and leaves the block: the rest of it is not needed."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[key] = inputs[0]
        raise _Seen

    return hook


def low_rank_layers(model: PreTrainedModel, walk: Walk) -> dict[str, LowRankLinear | PivotLinear]:
    """The target layers that are stored in low rank, by name."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in walk.layers}
    return {name: m for name, m in modules.items() if isinstance(m, LowRankLinear | PivotLinear)}


def packed_layers(model: PreTrainedModel, walk: Walk) -> dict[str, PackedLinear]:
    """The target layers that are stored in few bits, by name."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in walk.layers}
    return {name: m for name, m in modules.items() if isinstance(m, PackedLinear)}


def pivot_buffers(layers: dict[str, LowRankLinear | PivotLinear]) -> Buffers:
    """Which rows are pivots: rounding on another device may choose others, and coefficients mean nothing without."""
    return Buffers({name: m.mask for name, m in layers.items() if isinstance(m, PivotLinear)}, {})


def restore_pivots(layers: dict[str, LowRankLinear | PivotLinear], saved: Buffers, stage: str) -> None:
    """Take the pivots of a checkpoint."""
    fill(pivot_buffers(layers).tensors, saved.tensors, stage)
    for layer in layers.values():
        if isinstance(layer, PivotLinear):
            layer.refresh_order()
