"""The checkpoint of several processes: the first of them reads, writes and decides, all others do as it does.

States are of what all ranks have alike: spectra when the closed form is done, scores, optimizers.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.processes import present

T = TypeVar("T")


def shared(own: Checkpoint | None) -> Checkpoint | None:
    """The first rank's checkpoint as every rank's; with one process, its own. None where the first has none."""
    group = present()
    if group.alone:
        return own
    return SharedCheckpoint(own) if group.from_first(lambda: own is not None) else None


class SharedCheckpoint:
    """See the head of the file; `inner` is None on all ranks but the first."""

    def __init__(self, inner: Checkpoint | None) -> None:
        self.inner = inner

    def load(self, stage: str, *, optional: bool = False) -> Saved | None:
        """What the first rank has, on the CPU of each."""
        group = present()
        saved = None if self.inner is None else self.inner.load(stage, optional=optional)
        head = group.from_first(lambda: None if saved is None else (saved.step, saved.facts))
        if head is None:
            return None
        cpu = torch.device("cpu")
        given = None if saved is None else {name: tensor.to(cpu) for name, tensor in saved.tensors.items()}
        return Saved(head[0], group.share(given, 0, cpu), head[1])

    def due(self) -> bool:
        """By the first rank's clock."""
        return self._first(lambda inner: inner.due())

    def worth(self, nbytes: int) -> bool:
        """By the first rank's clock."""
        return self._first(lambda inner: inner.worth(nbytes))

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        """On the first rank."""
        return self._first(lambda inner: inner.save(stage, saved, needed=needed))

    def forget(self, *stages: str, why: str | None = None) -> None:
        """On the first rank."""
        if self.inner is not None:
            self.inner.forget(*stages, why=why)

    def _first(self, ask: Callable[[Checkpoint], T]) -> T:
        def answer() -> T:
            assert self.inner is not None
            return ask(self.inner)

        return present().from_first(answer)
