"""A checkpoint in memory that treats states as a disk would: copies of tensors, facts through JSON."""

import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from spectrim.engines.checkpoint import Saved
from spectrim.engines.closed_form import LEADS_TO_IT


@dataclass
class MemoryCheckpoint:
    """Saves every `every` steps (0: only where the engines must); the closed form step by step only if `closed`."""

    every: int = 0
    closed: bool = False
    stage: str = ""
    asked: int = 0
    states: dict[str, tuple[int, dict[str, Tensor], str]] = field(default_factory=dict)
    log: list[tuple[str, int]] = field(default_factory=list)
    forgotten: list[tuple[str, str | None]] = field(default_factory=list)

    def load(self, stage: str, *, optional: bool = False) -> Saved | None:
        self.stage = stage
        if stage not in self.states:
            return None
        step, tensors, facts = self.states[stage]
        return Saved(step, {name: t.clone() for name, t in tensors.items()}, json.loads(facts))

    def due(self) -> bool:
        if self.stage.startswith(LEADS_TO_IT) and not self.closed:
            return False
        self.asked += 1
        return self.every > 0 and self.asked % self.every == 0

    def worth(self, nbytes: int) -> bool:
        return self.closed

    def forget(self, *stages: str, why: str | None = None) -> None:
        gone = [s for s in self.states if any(s == stage or s.startswith(f"{stage} ") for stage in stages)]
        for stage in gone:
            del self.states[stage]
        self.forgotten += [(stage, why) for stage in gone]

    def save(self, stage: str, saved: Saved, *, needed: bool = False) -> bool:
        facts = json.dumps(saved.facts, allow_nan=False)
        self.states[stage] = (saved.step, {name: t.detach().clone() for name, t in saved.tensors.items()}, facts)
        self.log.append((stage, saved.step))
        return True


class Killed(BaseException):
    """What a test raises in the place of a SIGKILL."""


def kill_at(stage: str, step: int) -> Any:
    """A progress callback that kills the run after a step of a stage."""

    def progress(label: str, done: int, _total: int) -> None:
        if label == stage and done == step:
            raise Killed

    return progress
