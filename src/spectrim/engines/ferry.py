"""Carries tensors between a GPU and ordinary host memory while the GPU computes.

Pinned memory is copied at 55 GB/s, but more than half a second a GB goes into allocating it, for which the GPU waits.
Ordinary memory is copied at 6 to 12 GB/s (both: benchmarks/results/scale-h200.json). So tensors lie in ordinary memory
and go through two small pinned slots, one filled while the other is emptied, in threads and CUDA streams of their own:

    away    device -> slot -> host memory      the caller goes on at once; `wait` before the host's copy is looked at
    ahead   host memory -> slot -> device      begun before the tensor is needed
    take    what `ahead` began, once it is there

Copies are exact. On a CPU there is nothing to carry, and the same steps are plain copies.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SLOT = 64 * 2**20
"""Bytes of a slot; there are two in each direction."""
ON_THE_WAY = 2 * 2**30
"""Bytes on their way to the host that a device holds at most: more than that, and the caller waits."""


class Coming(NamedTuple):
    """A tensor on its way to the device: complete once `done` is, and after the event that it gives."""

    tensor: Tensor
    done: "Future[torch.cuda.Event | None]"


class _Lane:
    """One direction: a thread, a stream, two slots; on a CPU a thread and two slots."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="ferry")
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(2)]

    def mark(self) -> "torch.cuda.Event | None":
        """An event at this point of the caller's stream."""
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(blocking=True)  # whoever waits sleeps: Python runs on
        event.record(torch.cuda.current_stream(self.device))
        return event

    def inside(self) -> AbstractContextManager[object]:
        """The lane's own stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def begin_after(self, event: "torch.cuda.Event | None") -> None:
        """What the lane does from now on waits for an event of another stream."""
        if event is not None and self.stream is not None:
            self.stream.wait_event(event)

    def parts(self, nbytes: int) -> Iterator[tuple[slice, Tensor]]:
        """Bytes of a tensor, and the slot that they go through."""
        size = len(self.slots[0])
        for number, start in enumerate(range(0, nbytes, size)):
            stop = min(start + size, nbytes)
            yield slice(start, stop), self.slots[number % 2][: stop - start]


class Ferry:
    """Between one device and the host."""

    def __init__(self, device: torch.device, slot_bytes: int = SLOT) -> None:
        self.device = device
        self.outward, self.inward = _Lane(device, slot_bytes), _Lane(device, slot_bytes)
        self.under_way: deque[tuple[Future[None], int]] = deque()

    def away(self, tensor: Tensor, host: Tensor) -> "Future[None]":
        """Begin to copy a tensor of the device into one of its shape and dtype on the host; both contiguous.

        The tensor must not be written to until the future is done.
        """
        self._make_room(tensor.nbytes)
        done = self.outward.worker.submit(self._carry_out, tensor.detach(), host, self.outward.mark())
        self.under_way.append((done, tensor.nbytes))
        return done

    def ahead(self, host: Tensor) -> Coming:
        """Begin to copy a contiguous tensor of the host to the device; `take` gives it."""
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        # Its memory may belong to work of the caller's stream that is not finished: the copy waits for that.
        return Coming(tensor, self.inward.worker.submit(self._carry_in, host, tensor, self.inward.mark()))

    def take(self, coming: Coming) -> Tensor:
        """The tensor, to be used on the caller's stream."""
        event = coming.done.result()
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return coming.tensor

    def _make_room(self, nbytes: int) -> None:
        """Wait for the oldest on their way, until this one may go too; an error of theirs is raised here."""
        while self.under_way and (
            self.under_way[0][0].done() or nbytes + sum(size for _, size in self.under_way) > ON_THE_WAY
        ):
            self.under_way.popleft()[0].result()

    @torch.no_grad()
    def _carry_out(self, tensor: Tensor, host: Tensor, ready: "torch.cuda.Event | None") -> None:
        lane, source, target = self.outward, as_bytes(tensor), as_bytes(host)
        before: tuple[slice, Tensor, torch.cuda.Event | None] | None = None
        with lane.inside():
            lane.begin_after(ready)
            for span, slot in lane.parts(tensor.nbytes):
                slot.copy_(source[span], non_blocking=True)
                this = span, slot, lane.mark()
                if before is not None:
                    _land(target, *before)
                before = this
            if before is not None:
                _land(target, *before)

    @torch.no_grad()
    def _carry_in(self, host: Tensor, tensor: Tensor, ready: "torch.cuda.Event | None") -> "torch.cuda.Event | None":
        lane, source, target = self.inward, as_bytes(host), as_bytes(tensor)
        left: list[torch.cuda.Event | None] = []
        with lane.inside():
            lane.begin_after(ready)
            for number, (span, slot) in enumerate(lane.parts(tensor.nbytes)):
                # This slot's bytes before these have to be off it; those of the tensor before, at the first two.
                if number >= 2:
                    _until(left[number - 2])
                slot.copy_(source[span])
                target[span].copy_(slot, non_blocking=True)
                left.append(lane.mark())
            for event in left[-2:]:
                _until(event)
        return left[-1] if left else None


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor as a row of bytes, the same memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def _land(target: Tensor, span: slice, slot: Tensor, there: "torch.cuda.Event | None") -> None:
    _until(there)
    target[span].copy_(slot)


def _until(event: "torch.cuda.Event | None") -> None:
    if event is not None:
        event.synchronize()


@cache
def ferry_of(device: torch.device) -> Ferry:
    """The one of a device: slots are pinned once."""
    return Ferry(device)
