"""Stages whose states are saved where that is cheap, each tied to what it was made from.

A state of the closed form is large and quickly made again, so that it may be absent although later ones are there. It
therefore carries a record of what it was made from (`run`) and is only taken up by a stage that starts from the same.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.pack import find
from spectrim.engines.shelf import energies_in
from spectrim.linalg.factor import Spectrum

Run = dict[str, Any]
"""What a stage starts from, JSON-ready."""


class SavedFirst:
    """A checkpoint that keeps one stage (what later ones stand on) just before the first state of any other.

    Stages whose names start with one of `replaces` are forgotten once it is kept: it stands for them.
    """

    def __init__(
        self, inner: Checkpoint, stage: str, make: Callable[[], Saved], *, kept: bool, replaces: tuple[str, ...] = ()
    ) -> None:
        self.inner, self.stage, self.make, self.kept, self.replaces = inner, stage, make, kept, replaces

    def load(self, stage: str, *, optional: bool = False) -> Saved | None:
        """As it is."""
        return self.inner.load(stage, optional=optional)

    def due(self) -> bool:
        """As it is."""
        return self.inner.due()

    def worth(self, nbytes: int) -> bool:
        """As it is."""
        return self.inner.worth(nbytes)

    def forget(self, *stages: str, why: str | None = None) -> None:
        """As it is."""
        self.inner.forget(*stages, why=why)

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        """What it stands on first: a state that cannot be gone on from is worth nothing."""
        self.keep()
        return self.inner.save(stage, saved, needed=needed)

    def keep(self) -> None:
        """Save what later stages stand on, if it is not."""
        if self.kept:
            return
        self.kept = True  # given once: where the disk fails, the checkpoint tries again by itself
        if self.inner.save(self.stage, self.make(), needed=True):
            self.inner.forget(*self.replaces)


class Parts:
    """The states of a stage that is done item by item (layers, blocks): every item is written once, in some part."""

    def __init__(self, checkpoint: Checkpoint | None, stage: str, run: Run) -> None:
        self.checkpoint, self.stage, self.run = checkpoint, stage, run
        self.parts = self.saved = 0  # parts, and items in them
        self._fresh: dict[str, Tensor] = {}
        self._items: list[Any] = []

    def load(self) -> Iterator[Saved]:
        """One part after the other; `facts["items"]` says of what."""
        while saved := load_own(self.checkpoint, f"{self.stage} {self.parts}", self._own_run()):
            self.parts, self.saved = self.parts + 1, saved.step
            yield saved

    def add(self, item: Any, tensors: Mapping[str, Tensor]) -> None:
        """One more item (JSON-ready) is done; its tensors must not change any more."""
        if self.checkpoint is None:
            return
        self._fresh |= tensors
        self._items.append(item)
        if self.checkpoint.due():
            self._save(self.checkpoint)

    def finish(self) -> None:
        """No more items: save the rest if it is worth it."""
        if self.checkpoint is not None and self._items and self.checkpoint.worth(size_of(self._fresh)):
            self._save(self.checkpoint)

    def _save(self, checkpoint: Checkpoint) -> None:
        run, self.saved = self._own_run(), self.saved + len(self._items)
        tensors = {name: tensor.contiguous() for name, tensor in self._fresh.items()}
        checkpoint.save(f"{self.stage} {self.parts}", Saved(self.saved, tensors, {"run": run, "items": self._items}))
        self.parts, self._fresh, self._items = self.parts + 1, {}, []

    def _own_run(self) -> Run:
        """A part also follows from those before it."""
        return self.run | {"items before": self.saved}


def load_own(checkpoint: Checkpoint | None, stage: str, run: Run) -> Saved | None:
    """The state of an optional stage, if it was made from the same."""
    saved = None if checkpoint is None else checkpoint.load(stage, optional=True)
    if saved is None or checkpoint is None or saved.facts.get("run") == run:
        return saved
    checkpoint.forget(stage, why="it does not follow from what this run has come to")
    return None


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def spectrum_tensors(name: str, spectrum: Spectrum) -> dict[str, Tensor]:
    """A spectrum in a state, on the CPU: the copy is what is saved."""
    return {f"{name}.{part}": tensor.detach().cpu() for part, tensor in spectrum._asdict().items()}


def spectrum_from(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> Spectrum:
    """The spectrum again."""
    return Spectrum(*(find(tensors, f"{name}.{part}").to(device) for part in Spectrum._fields))


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Short hash of the bytes of tensors, in their order."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def energies_of(spectra: Mapping[str, Spectrum]) -> str:
    """Short hash of all energies: another statistic, weight or solver changes their last bits."""
    return digest_of(energies_in(spectra).values())
