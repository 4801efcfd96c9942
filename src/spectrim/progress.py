"""What a long run says while it works: stage, count, layer, time left, memory.

Live on a terminal (rich), one line a stage and every quarter of it when piped, nothing with --json.
"""

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

Report = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage may be a `spectrim.stage.Stage`, which names a layer too."""

STATM = Path("/proc/self/statm")
_live: "list[Live]" = []
"""What is drawing on the terminal now; `end_progress` stops it before anything else is printed."""


class Moment(NamedTuple):
    """What there is to say at one call."""

    stage: str
    done: int
    total: int
    where: str
    elapsed_s: float
    left_s: float | None

    @property
    def count(self) -> str:
        """Done of total, where there is more than one."""
        return f"{self.done}/{self.total}" if self.total > 1 else ""


class Clock:
    """When each stage was first heard of, and how far it was then: how long the rest will take."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.began: dict[str, tuple[float, int]] = {}
        self.last: dict[str, int] = {}

    def read(self, stage: str, done: int, total: int) -> Moment:
        """The moment of a call."""
        now = time.monotonic()
        first, before = self.began.setdefault(str(stage), (now, done))
        if done < self.last.get(str(stage), done):  # the same stage again, as in a second round of statistics
            first, before = self.began[str(stage)] = now, done
        self.last[str(stage)] = done
        left = (now - first) / (done - before) * (total - done) if before < done < total else None
        return Moment(str(stage), done, total, getattr(stage, "where", ""), now - self.started, left)


class Lines:
    """One line a stage, and every quarter of it."""

    def __init__(self, console: Console) -> None:
        self.console, self.clock = console, Clock()
        self.last: tuple[str, int] | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        moment = self.clock.read(stage, done, total)
        quarter = 4 * done // max(total, 1)
        if self.last != (moment.stage, quarter):
            self.last = (moment.stage, quarter)
            self.console.print(line_of(moment))


class Live:
    """A bar for the present stage below the lines of those that are over."""

    def __init__(self, console: Console) -> None:
        self.console, self.clock = console, Clock()
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[told]}"),
            console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self.task: TaskID | None = None
        self.now: Moment | None = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        moment = self.clock.read(stage, done, total)
        if self not in _live:
            _live.append(self)
            self.bars.start()
        if self.now is not None and self.now.stage != moment.stage:
            self.over()
        told = told_of(moment)
        if self.task is None:
            self.task = self.bars.add_task(moment.stage, total=max(total, 1), told=told)
        self.bars.update(self.task, completed=done, total=max(total, 1), told=told)
        self.now = moment

    def over(self) -> None:
        """The present stage becomes a line that stays."""
        if self.now is not None and self.task is not None:
            self.bars.remove_task(self.task)
            self.bars.console.print(line_of(self.now._replace(left_s=None, where="")))
        self.task = self.now = None

    def stop(self) -> None:
        """No more drawing; the cursor is back."""
        with suppress(OSError):  # the terminal may be gone
            self.over()
            self.bars.stop()


def progress_on(console: Console) -> Report:
    """How to show progress there."""
    return Live(console) if console.is_terminal else Lines(console)


def end_progress() -> None:
    """Before a result or an error is printed."""
    while _live:
        _live.pop().stop()


def line_of(moment: Moment) -> str:
    """`[  12.3 s] calibrate 64/256, about 30 s left, 0.61 GiB`"""
    told = told_of(moment)
    line = f"[{moment.elapsed_s:6.1f} s] {moment.stage}"
    return f"{line} {told}" if moment.count else f"{line}, {told}" if told else line


def told_of(moment: Moment) -> str:
    """Count, layer, time left and memory, as far as there are any."""
    parts = [moment.count, moment.where, "" if moment.left_s is None else f"about {moment.left_s:.0f} s left", memory()]
    return ", ".join(part for part in parts if part)


def memory() -> str:
    """Resident memory of this process now, and what tensors take on the GPU where one is used."""
    told = f"{resident_bytes() / 2**30:.2f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        told += f", GPU {torch.cuda.memory_allocated() / 2**30:.2f} GiB"
    return told


def resident_bytes() -> int:
    """Now where the system says so, else the most so far."""
    try:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
