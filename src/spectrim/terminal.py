"""What all commands share: exit codes, signals, progress, and results for people or for programs."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from spectrim.errors import Interrupted, ResourceError, SpectrimError
from spectrim.progress import end_progress, progress_on
from spectrim.store.writer import COMPLETE

# Text is shown as it is: `[x]` in a path is no markup and `:b:` in generated code no emoji.
stderr = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
stdout = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)


def is_one_of_several() -> bool:
    """Whether a launcher has started this program more than once."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def speaker() -> str:
    """`rank 1: ` where several processes write to one terminal, of all but the first; else nothing."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if is_one_of_several() and rank != "0" else ""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors for people become a message and their exit code; anything else is a bug of ours and exits with 6."""
    try:
        yield
    except Exception as error:
        end_progress()
        if os.environ.get("SPECTRIM_DEBUG"):
            raise
        if not isinstance(error, SpectrimError) and _is_out_of_memory(error):
            error = ResourceError(f"out of memory ({error}); take fewer or shorter windows, or --device cpu")
        with suppress(OSError):  # the terminal may be gone (SIGHUP); the exit code is then all there is to say
            if isinstance(error, SpectrimError):
                stderr.print(f"{speaker()}error: ", style="bold red", end="")
                stderr.print(str(error))
            else:
                stderr.print(f"{speaker()}internal error: {type(error).__name__}: {error}")
                stderr.print("this is a bug of spectrim; run again with SPECTRIM_DEBUG=1 and report the traceback")
        sys.exit(error.exit_code if isinstance(error, SpectrimError) else SpectrimError.exit_code)
    finally:
        end_progress()


def _is_out_of_memory(error: Exception) -> bool:
    from spectrim.memory import is_out_of_memory  # torch: a usage error need not wait for it

    return is_out_of_memory(error)


class _Stop(BaseException):
    """A signal on its way up. Not an `Exception`: libraries that catch everything must let it through."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP become `Interrupted`: what is being written is removed, the target is untouched.

    A signal that was ignored when the program started (nohup, a shell's background job) stays ignored.
    """
    told: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends at once
        told.append(number)
        raise _Stop(number)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    except _Stop as caught:
        name = signal.Signals(caught.signal_number).name
        notes = getattr(caught, "__notes__", [])  # what was kept, or that all was done
        kept = "; ".join(notes) if notes else "nothing was published"
        if not any(note.endswith(COMPLETE) for note in notes):
            kept += f". To {'go on' if notes else 'start again'}: {_again()}"
        raise Interrupted(f"stopped by {name}; {kept}", caught.signal_number) from None
    except Interrupted as caught:  # with its state saved
        raise Interrupted(f"{caught}. To go on: {_again()}", caught.signal_number) from None
    except Exception as error:
        if told:  # inside the import of a library, which makes an error of its own out of whatever ends it
            name = signal.Signals(told[0]).name
            raise Interrupted(f"stopped by {name}; nothing was published", told[0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _again() -> str:
    """The command that was given, for a shell; without --restart, which would throw away what it goes on from."""
    words = command_line(word for word in sys.argv[1:] if word != "--restart")
    return words if not is_one_of_several() else f"the same launcher (torchrun) with -m {words}"


def command_line(words: Iterable[str]) -> str:
    """`spectrim WORDS`, for a shell."""
    return shlex.join(["spectrim", *words])


def progress_printer(quiet: bool) -> Callable[[str, int, int], None] | None:
    """Stage, count, layer, time left and memory on stderr (progress.py); None where nothing is to be said."""
    return None if quiet else progress_on(stderr)


def emit(data: Any, as_json: bool, show: Callable[[], None]) -> None:
    """JSON on stdout, or the human view."""
    end_progress()
    try:
        if as_json:
            sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")
        else:
            show()
        sys.stdout.flush()
    except OSError as error:  # `> file` on a full disk, or a closed pipe; what was written before is complete
        with suppress(OSError):
            sys.stdout.close()  # what is left in its buffer would fail again at exit
        raise ResourceError(f"stdout: {error.strerror} (errno {error.errno}); only this text was lost") from error


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table of text cells, the first column left-aligned and never shortened."""
    names = max((len(row[0]) for row in rows), default=0)
    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True, min_width=0 if i else names)
    for row in rows:
        table.add_row(*row)
    stdout.print(table)
