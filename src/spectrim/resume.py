"""A run that trains goes on where a killed one stopped, when the same command is given again.

What is measured before training is measured again (it gives the same bytes); the steps are not. The state lies in
OUT.resume (store/work.py), is saved every minute and on SIGINT and SIGTERM, and is only taken up by a run that would
have come to the same state by itself: source, text, method, versions and device are compared first.
"""

import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from spectrim import version
from spectrim.engines.loop import Saved, train
from spectrim.engines.measure import Progress
from spectrim.errors import InputError, Interrupted, NumericalError, ResourceError, SpectrimError, UsageError
from spectrim.method import LayerMethod
from spectrim.models.load import Source, pick_device
from spectrim.request import Request, WindowsInUse, has_steps
from spectrim.store import disk
from spectrim.store.manifest import measure_file
from spectrim.store.state import read_state, write_state
from spectrim.store.work import WorkFolder, locked

SAVE_EVERY_S = 60.0
OVERHEAD = 30
"""A state that takes s seconds to write is written every 30 s at most: 3 % of the time, however large it is."""

_NOT_COMPARED = {
    *("model", "tokenizer"),  # compared by content: files, tokens
    *("method", "preset", "options"),  # compared as the configured method
    *("eval", "eval_windows", "quality_gate"),  # no step sees them
    "device",  # compared by what it is
}
_log = logging.getLogger(__name__)


class Resume:
    """The `Checkpoint` of one run: loads and saves the state of its stages, and tells what it did."""

    def __init__(self, folder: WorkFolder, *, save_every_s: float = SAVE_EVERY_S, progress: Progress | None = None):
        self.folder = folder
        self.resumed: list[dict[str, Any]] = []  # {"stage", "step"} of every state that was taken up
        self.warnings: list[str] = []
        self._save_every_s = save_every_s
        self._progress = progress
        self._last = time.monotonic()
        self._write_s = 0.0
        self._kept: tuple[str, int] | None = None  # the newest state that is on disk
        self._good: set[Path] = set()  # states that this run has taken up or written
        self._stage = ""  # the one that was begun last
        self._owed: tuple[str, Saved] | None = None  # a state of an earlier stage that could not be written yet
        self._stop: int | None = None  # the signal that waits for the step to end

    def load(self, stage: str) -> Saved | None:
        """The state of a stage; None if there is none, or none that is what was saved (told, and begun anew)."""
        self._last, self._stage = time.monotonic(), stage
        path = self.folder.state_path(stage)
        if not os.path.lexists(path):
            self._discard_later_stages(f"there is no state of {stage}")
            return None
        try:
            saved = Saved(*read_state(path))
        except InputError as error:
            disk.remove(path)
            self._warn(f"{error}; {stage} starts anew, which costs time and changes no number")
            self._discard_later_stages(f"that of {stage} is lost")
            return None
        self._good.add(path)
        self.resumed.append({"stage": stage, "step": saved.step})
        self._kept = (stage, saved.step)
        if self._progress is not None:
            self._progress(f"resumed at step {saved.step} of {stage}", 0, 1)
        return saved

    def due(self) -> bool:
        """Whether a state should be saved now: a signal waits, or the last one is old enough."""
        wait_s = max(self._save_every_s, OVERHEAD * self._write_s) if self._save_every_s else 0.0
        return self._stop is not None or time.monotonic() - self._last >= wait_s

    def save(self, stage: str, saved: Saved) -> None:
        """Put a state on disk. A disk that fails is told and costs no more: the older state is untouched and the run
        goes on. `Interrupted` when a signal waits for it.
        """
        began = time.monotonic()
        is_training = stage == self._stage
        owed, self._owed = self._owed, None
        try:
            if owed is not None:
                self._write(*owed)
                owed = None
            self._write(stage, saved)
            self._kept = (stage, saved.step)
        except ResourceError as error:
            self._warn(f"step {saved.step} of {stage} could not be saved for resuming: {error}")
            # What later stages rest on is given once; without it their states would be worth nothing.
            self._owed = owed or (None if is_training else (stage, saved))
        self._last = time.monotonic()
        self._write_s = self._last - began
        if is_training:
            self._leave_if_stopped()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While this is open, SIGINT and SIGTERM in training wait for the step to end and its state to be saved.

        The loop asks `due` between steps and nowhere else, so a signal waits only while the loop is being run.
        """
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's affair
            yield
            return
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

        def stop(number: int, frame: FrameType | None) -> None:
            if is_running(train, frame):
                self._stop = number
                signal.signal(number, signal.SIG_DFL)  # a second signal ends at once
            else:
                signal.signal(number, before[signal.Signals(number)])
                signal.raise_signal(number)

        for number in before:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        self._leave_if_stopped()

    def where(self) -> str:
        """Which state is kept, in words."""
        if self._kept is None:
            return f"nothing was saved yet in {self.folder.path}"
        stage, step = self._kept
        return f"the state after step {step} of {stage} is kept in {self.folder.path}"

    def _leave_if_stopped(self) -> None:
        if self._stop is not None:
            raise Interrupted(f"stopped by {signal.Signals(self._stop).name}; {self.where()}", self._stop)

    def _write(self, stage: str, saved: Saved) -> None:
        path = self.folder.state_path(stage)
        write_state(path, *saved)
        self._good.add(path)

    def _warn(self, message: str) -> None:
        _log.warning("warning: %s", message)
        self.warnings.append(message)

    def _discard_later_stages(self, why: str) -> None:
        """Stages load in the order they run: what is there beyond this run's own was built on what is not there."""
        for path in self.folder.states():
            if path not in self._good:
                self._warn(f"{path}: discarded, since {why}, on which it was built")
                disk.remove(path)


def is_running(function: Callable[..., Any], frame: FrameType | None) -> bool:
    """Whether `frame` is a call of `function`, or was called by one at any depth."""
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def resumable(
    request: Request,
    method: LayerMethod,
    source: Source,
    out: Path,
    *,
    restart: bool = False,
    save_every_s: float = SAVE_EVERY_S,
    progress: Progress | None = None,
) -> Iterator[Resume | None]:
    """The run's work folder, gone when the block ends well; None (and no folder) for a run that trains nothing."""
    if not has_steps(request, method) or request.keep == 1:
        if restart:
            raise UsageError(f"--restart: {method.info.name} trains nothing here, so nothing is resumed; leave it out")
        yield None
        return
    if not save_every_s >= 0:
        raise UsageError(f"--save-every must be at least 0 seconds, got {save_every_s:g}")
    facts = fingerprint(request, method, source)
    with locked(out, restart=restart) as folder:
        folder.claim(facts)
        resume = Resume(folder, save_every_s=save_every_s, progress=progress)
        try:
            yield resume
        except BaseException as error:
            if not folder.states():
                folder.remove()
            elif isinstance(error, SpectrimError) and not isinstance(error, Interrupted):
                error.args = (f"{error}. {_way_on(error, resume)}",)
            raise
        if not folder.remove():
            _log.warning("%s: the result is published, this is left over and could not be removed", folder.path)


def _way_on(error: SpectrimError, resume: Resume) -> str:
    """What can be done with the state that is kept after an error."""
    where = resume.where()
    where = where[0].upper() + where[1:]
    if isinstance(error, NumericalError):
        return f"{where}: the same command ends at the same place; with other options start anew with --restart"
    return f"{where}: the same command goes on from there, --restart discards it"


def fingerprint(request: Request, method: LayerMethod, source: Source) -> dict[str, Any]:
    """All that decides the trained numbers, as far as it is known before text is read; see also `text_fields`."""
    asked = {name: value for name, value in dataclasses.asdict(request).items() if name not in _NOT_COMPARED}
    files = [*source.checkpoint.shards, source.folder / "config.json"]
    return {
        "request": asked,
        "method": method.to_config(),
        "source": {path.name: measure_file(path, source.folder) for path in files},
        "spectrim": version.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(pick_device(request.device)),
    }


def text_fields(texts: WindowsInUse) -> dict[str, Any]:
    """The part of the fingerprint that pins the tokens."""
    assert texts.training is not None, "a run that trains has training windows"
    return {"tokens": {"calibration": texts.calibration.sha256, "training": texts.training.sha256}}


def device_name(device: torch.device) -> str:
    """What numbers depend on: the GPU's name; on a CPU its instruction set and the threads, which order sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
