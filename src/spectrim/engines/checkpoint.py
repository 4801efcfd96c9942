"""What engines ask of whoever keeps their states: resume.py on disk, tests in memory."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Saved(NamedTuple):
    """The state of one stage after `step` steps; `facts` is JSON-ready."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoint(Protocol):
    """Where states are kept. Tensors given to `save` go on changing: write or copy them before it returns."""

    def load(self, stage: str, *, optional: bool = False) -> Saved | None:
        """The last state of a stage, None if there is none. Tensors may be on any device; they are copied.

        States of stages that are loaded later rest on this one and are discarded where it is absent, unless it is
        `optional`: one that is saved only where that is cheap, or that stands for stages before it.
        """
        ...

    def due(self) -> bool:
        """Asked once a step; True when it is time to save."""
        ...

    def worth(self, nbytes: int) -> bool:
        """Asked at the end of a stage: True when writing so much is little beside the work that it keeps."""
        ...

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        """Keep this state in the place of the stage's earlier ones; whether it is kept.

        `needed`: the states that follow are worth nothing without it.
        """
        ...

    def forget(self, *stages: str, why: str | None = None) -> None:
        """Remove the states of all stages whose names start so; `why` is told where that is no matter of course."""
        ...
