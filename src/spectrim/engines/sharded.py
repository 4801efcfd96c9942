"""Frozen tensors of blocks, of which each process holds a part: whole only while their block runs.

    take        the tensors of a block, one behind the other as bytes, cut into equal parts; each rank keeps one
    run         the parts are gathered before the block runs, its tensors are views of the whole, and go behind it. What
                the way back needs of them is in the graph: of one block at a time, which recompute.py passes again
    ahead       while a block runs, the parts of the next one are on their way; which one it is, the last pass has shown
    give_back   of one model whole again, for good

Scores and their optimizer are outside: every rank has all of them. A rank must run the same blocks in the same order as
all others. torch's FSDP2 shards parameters alone, makes other objects of them that the model then keeps, and has no way
back; here the teacher is needed whole again, and components are buffers beside trainable scores (ADR 10).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.recompute import forward_instead
from spectrim.errors import UsageError
from spectrim.memory import fits_whole, release
from spectrim.method import LearnedMethod, Method
from spectrim.models.walk import Walk, device_of, weight_of
from spectrim.nn.scored import ScoredLinear
from spectrim.processes import Group, present

TRAIN_SHARE = 0.5
"""Of a GPU's memory that all weights and components may take where each process holds all; the rest is for work."""
# Newer versions of torch warn of the older name.
_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ALIGNED = 16
"""Bytes at whose multiples a tensor begins in its block."""


def training_bytes(walk: Walk, itemsize: int) -> int:
    """What learning scores holds beside its work: the dense weights, and of each a formed one and all components in 16
    bits.
    """
    components = sum(min(la.outputs, la.inputs) * (la.outputs + la.inputs) for la in walk.layers)
    weights = sum(la.weight_numbers for la in walk.layers)
    return (itemsize + 2) * weights + 2 * components


def learns_scores(method: Method) -> bool:
    """Whether there is anything to be shared out."""
    return isinstance(method, LearnedMethod) and bool(method.steps or method.newton_steps)


def check_sharding(method: Method, asked: bool | None, world: int | None = None) -> None:
    """UsageError where weights in parts are asked of one process, or of a method that learns no scores.

    `world` is how many processes there are, of a run that is only planned; None: as many as have met.
    """
    if asked and not learns_scores(method):
        raise UsageError(f"--shard-weights: method {method.info.name} learns no scores here; leave it out")
    if asked and (present().world if world is None else world) == 1:
        raise UsageError(
            "--shard-weights shares weights out among processes, and there is one; start several with torchrun "
            "(docs/several-gpus.md), or leave it out"
        )


def in_parts(walk: Walk, itemsize: int, device: torch.device, asked: bool | None) -> bool:
    """As asked of several processes, else where one GPU should not hold all; a dense number has so many bytes."""
    return not fits_whole(device, training_bytes(walk, itemsize), TRAIN_SHARE) if asked is None else asked


def is_sharded(model: PreTrainedModel, walk: Walk, method: Method, asked: bool | None) -> bool:
    """Whether processes share out what is frozen while scores are learned: as asked, else where one GPU should not hold
    all of it.

    UsageError as `check_sharding`.
    """
    check_sharding(method, asked)
    group = present()
    if not learns_scores(method) or group.alone:
        return False
    itemsize = weight_of(model.get_submodule(walk.layers[0].name)).element_size()
    sharded = in_parts(walk, itemsize, device_of(model), asked)
    group.refuse_unequal(
        "way to hold its weights", "in parts" if sharded else "whole", "pass --shard-weights or --no-shard-weights"
    )
    return sharded


class Slot(NamedTuple):
    """Where a tensor of a block stands; and the parameter that stood there, which comes back as the same one."""

    module: nn.Module
    name: str
    first: nn.Parameter | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> "Slot":
        """Of a parameter or a buffer that a module has now."""
        return cls(module, name, module._parameters.get(name))

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        found = getattr(self.module, self.name)
        assert isinstance(found, Tensor)
        return found.detach()

    def show(self, tensor: Tensor) -> None:
        """Another tensor in its place. A new one each time: the graph keeps those that it has seen."""
        setattr(self.module, self.name, tensor if self.first is None else nn.Parameter(tensor, requires_grad=False))

    def let_go(self) -> None:
        """Of what stands there. A buffer may be somebody else's tensor too; that of a parameter nobody needs now."""
        if self.first is not None:
            self.first.data = self.first.new_empty(0)

    def give_back(self, tensor: Tensor) -> None:
        """The first parameter, with these numbers."""
        if self.first is None:
            self.show(tensor)
        else:
            self.first.data = tensor
            setattr(self.module, self.name, self.first)


@dataclass
class _Block:
    """This rank's part of the tensors of a block, and how they lie in the whole."""

    module: nn.Module
    slots: list[Slot]
    outline: list[tuple[int, torch.Size, torch.dtype]]  # first byte, shape, dtype
    part: Tensor  # bytes

    def views(self, whole: Tensor) -> Iterator[tuple[Slot, Tensor]]:
        """Every tensor, as a view of all bytes."""
        for slot, (start, shape, dtype) in zip(self.slots, self.outline, strict=True):
            yield slot, whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def empty(self) -> None:
        """Let go of the whole."""
        for slot, (_, _, dtype) in zip(self.slots, self.outline, strict=True):
            slot.show(torch.empty(0, dtype=dtype, device=self.part.device))


class _Ahead(NamedTuple):
    """Parts that are on their way."""

    index: int
    whole: Tensor
    work: Any


class Sharded:
    """All blocks of a training step, of the model that learns and of its teacher."""

    def __init__(self) -> None:
        # Kept, not asked for: on a GPU the way back runs in a thread of its own, which has another context.
        self.group: Group = present()
        self.blocks: list[_Block] = []
        self._next: dict[tuple[int, int], int] = {}
        self._before = (-1, -1)
        self._ahead: _Ahead | None = None

    @property
    def nbytes(self) -> int:
        """What this rank holds while no block runs."""
        return sum(block.part.nbytes for block in self.blocks)

    @torch.no_grad()
    def take(self, module: nn.Module, slots: Sequence[Slot]) -> None:
        """Keep a part of a block's tensors, which are the same on all ranks; they are empty until the block runs."""
        outline, end = [], 0
        for slot in slots:
            tensor = slot.tensor
            outline.append((end, tensor.shape, tensor.dtype))
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        size = -(-end // (_ALIGNED * self.group.world)) * _ALIGNED
        first = self.group.rank * size
        part = torch.zeros(size, dtype=torch.uint8, device=slots[0].tensor.device)
        for slot, (start, _, _) in zip(slots, outline, strict=True):
            flat = slot.tensor.contiguous().view(-1).view(torch.uint8)
            low, high = max(start, first), min(start + len(flat), first + size)
            if low < high:
                part[low - first : high - first] = flat[low - start : high - start]
        block = _Block(module, list(slots), outline, part)
        block.empty()
        for slot in slots:
            slot.let_go()
        self.blocks.append(block)

    @torch.no_grad()
    def give_back(self, model: nn.Module) -> None:
        """What belongs to a `model` is whole again, on every rank; the rest goes."""
        modules = set(model.modules())
        for index, block in enumerate(self.blocks):
            if block.module in modules:
                for slot, view in block.views(self._arrived(index)):
                    slot.give_back(view.clone())
        self._drop()
        self.blocks = []
        release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, a block has its tensors while it runs."""
        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(forward_instead(block.module, self._around(index)))
            try:
                yield
            finally:
                self._drop()

    def _around(self, index: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(own: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                block = self.blocks[index]
                for slot, view in block.views(self._arrived(index)):
                    slot.show(view)
                self._send_ahead()
                try:
                    return own(*args, **kwargs)
                finally:
                    block.empty()

            return forward

        return around

    def _arrived(self, index: int) -> Tensor:
        """All bytes of a block."""
        if self._ahead is None or self._ahead.index != index:
            self._drop()
            self._ahead = self._sent(index)
        _, whole, work = self._ahead
        self._ahead = None
        self._wait(work)
        self._next[self._before] = index
        self._before = (self._before[1], index)
        return whole

    def _send_ahead(self) -> None:
        """The block that followed these two the last time."""
        following = self._next.get(self._before)
        self._ahead = None if following is None else self._sent(following)

    def _sent(self, index: int) -> _Ahead:
        part = self.blocks[index].part
        if self.group.alone:
            return _Ahead(index, part, None)
        whole = torch.empty(len(part) * self.group.world, dtype=torch.uint8, device=part.device)
        with self.group.exchange():
            return _Ahead(index, whole, _gather(whole, part, async_op=True))

    def _wait(self, work: Any) -> None:
        if work is not None:
            with self.group.exchange():
                work.wait()

    def _drop(self) -> None:
        """What is on its way and not needed."""
        if self._ahead is not None:
            self._wait(self._ahead.work)
            self._ahead = None


def take_weights(sharded: Sharded, model: PreTrainedModel, walk: Walk) -> None:
    """The weights of all target layers; nothing else, which a model that learns may share with this one."""
    for block, name in enumerate(walk.block_names):
        slots = [Slot.of(model.get_submodule(la.name), "weight") for la in walk.layers if la.block == block]
        if slots:
            sharded.take(model.get_submodule(name), slots)
    release()


def take_components(sharded: Sharded, model: PreTrainedModel, block: str, layers: Sequence[ScoredLinear]) -> None:
    """Components and formed weights of the layers of one block."""
    names = ("left", "right", "anchor")
    slots = [Slot.of(layer, name) for layer in layers for name in names if getattr(layer, name) is not None]
    if slots:
        sharded.take(model.get_submodule(block), slots)
