"""The command line of one of several processes: which commands there are, and how it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from spectrim.errors import UsageError
from spectrim.terminal import exit_codes, is_one_of_several, stoppable

SPREAD = ("compress", "eval")
"""Commands that several processes run together."""


@contextmanager
def started() -> Iterator[None]:
    """Around the whole program: exit codes, signals, and what is different under a launcher."""
    try:
        with exit_codes(), stoppable():
            _refuse_alone_command()
            yield
    except SystemExit as end:
        if is_one_of_several() and end.code not in (None, 0):
            _tell_others(end)
            sys.stdout.flush()
            sys.stderr.flush()
            # After an error, communicators of a GPU that wait for a dead rank would keep the process from ending.
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _refuse_alone_command() -> None:
    """UsageError for a command that every process would run for itself."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if is_one_of_several() and command and command not in SPREAD:
        raise UsageError(
            f"spectrim {command} is done by one process, and the launcher has started {os.environ['WORLD_SIZE']}; run "
            f"it without torchrun (several processes run: {', '.join(SPREAD)})"
        )


def _tell_others(end: SystemExit) -> None:
    """Of an end before the processes have met, of which nobody else would hear; after it they know (processes.py).

    Not of a mistake in the command, which is every rank's own, nor out of the import of torch: that cannot be repeated.
    """
    if "spectrim.processes" not in sys.modules:
        return
    from spectrim import meeting, processes

    with suppress(UsageError):  # what the launcher says makes no sense: that was the error
        if not meeting.has_come():
            what = "it ended before the processes had met; look at what it said"
            meeting.tell_early(processes.launcher(processes.launched()), what, int(end.code or 1))
