"""Rows that differ only in how they train share one closed form: measured once, and the same start for all of them.

Seeds then only decide the order of the training windows, which is what a comparison of training schemes asks for.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from spectrim.engines import pipeline
from spectrim.linalg.factor import Spectrum

TRAINING = {
    "steps", "batch_size", "learning_rate", "distil_steps", "explore", "refine", "hysteresis", "project_every",
    "label_share",
}  # fmt: skip
"""Fields of a method that its closed form does not depend on."""


class ClosedForms:
    """All that were made, by what decides them; they stay on the device."""

    def __init__(self) -> None:
        self.made: dict[Any, tuple[dict[str, Spectrum], Any, list[str], dict[str, float]]] = {}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, compressions take a closed form that is there, and leave theirs. Their seconds count in full."""
        make = pipeline._Run.closed_form

        def closed_form(run: pipeline._Run, ids: Tensor) -> Any:
            newton = getattr(run.method, "newton_steps", 0) > 0  # it follows the loss that is trained with
            free = TRAINING - {"label_share"} if newton else TRAINING
            config = {k: v for k, v in dataclasses.asdict(run.method).items() if k not in free}
            key = (run.method.info.name, str(config), run.keep, len(ids), int(ids.sum()), run.gradient_windows)
            if key not in self.made:
                before, clock = dict(run.clock), time.perf_counter()
                spectra, plan = make(run, ids)
                stages = {stage: s - before.get(stage, 0.0) for stage, s in run.clock.items()}
                stages["closed form"] = time.perf_counter() - clock
                self.made[key] = (spectra, plan, list(run.warnings), stages)
            else:
                stages = self.made[key][3]
                run.clock |= {**stages, "taken": stages["closed form"]}
            spectra, plan, warnings, _ = self.made[key]
            run.warnings = list(warnings)
            return dict(spectra), plan

        pipeline._Run.closed_form = closed_form  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            pipeline._Run.closed_form = make
