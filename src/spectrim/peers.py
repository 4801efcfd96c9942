"""How the processes of one run learn that one of them has failed: a board in the store, and threads that watch.

A rank that fails writes on the board who it is and what happened, before it leaves. One that was killed cannot: the
others look whether its process lives (same host) or still counts up (other hosts), and write for it. The first entry
stands. Whoever then waits for that rank inside a collective, which on a GPU would wait for ever, is ended by its own
watching thread after a moment in which it may leave in order.

A signal reaches Python only between two of its instructions: never, while this rank waits inside a library for another
one. The watching thread hears of it through a pipe, and ends the process for it.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  documented there

from spectrim.errors import Interrupted, ResourceError, SpectrimError

T = TypeVar("T")

LOOK_EVERY_S = 0.25
SILENT_S = 60.0
"""A rank of another host that has not counted up for so long is taken for dead."""
LEAVE_WITHIN_S = 8.0
"""For a rank that hears of a failure, or that was told to stop. The launcher kills what is left after 30 s."""
STOPPERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BOARD = "failed"


class Member(NamedTuple):
    """One process of the run."""

    rank: int
    host: str
    process: int
    began: int | None  # ticks since boot, which tell it from a later process of the same number

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"


class Failure(NamedTuple):
    """Who failed, and what is known of it."""

    rank: int
    who: str
    what: str
    exit_code: int
    by_signal: bool = False


class PeerFailed(ResourceError):
    """Another process of this run failed; this one stops because of it, with the same exit code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.who} failed, so that all processes of this run stop: {failure.what}")
        self.failure = failure
        self.exit_code = failure.exit_code


def state_of_process(process: int) -> tuple[str, int] | None:
    """State letter and start of a process of this host; None if there is none, or where it cannot be told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def began(process: int) -> int | None:
    """When a process of this host began; None where it cannot be told."""
    found = state_of_process(process)
    return None if found is None else found[1]


def is_gone(member: Member) -> bool:
    """Whether a process of this host has ended, its parent's call for it or not; False where it cannot be told."""
    if member.began is None:
        return False
    found = state_of_process(member.process)
    return found is None or found[0] in "ZX" or found[1] != member.began


def own_failure(member: Member, error: BaseException) -> Failure:
    """What a rank that leaves with `error` says to the others."""
    if is_signal(error):
        number = getattr(error, "signal_number", signal.SIGINT)
        return Failure(
            member.rank, str(member), f"it was stopped by {signal.Signals(number).name}", 128 + number, by_signal=True
        )
    code = error.exit_code if isinstance(error, SpectrimError) else SpectrimError.exit_code
    what = str(error) if isinstance(error, SpectrimError) else f"{type(error).__name__}: {error}"
    return Failure(member.rank, str(member), what, code)


def is_signal(error: BaseException) -> bool:
    """Whether somebody wanted this process to end, and nothing failed."""
    return isinstance(error, Interrupted | KeyboardInterrupt) or not isinstance(error, Exception)


def died(member: Member, how: str) -> Failure:
    """Of a rank that could not say it itself."""
    return Failure(member.rank, str(member), how, ResourceError.exit_code)


def killed(member: Member) -> Failure:
    """Of a rank whose process is gone."""
    return died(member, "its process has ended without a word: it was killed, or crashed")


class Board:
    """Where the first failure of a run stands, in the store, over a connection that nobody else uses."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.asked_at: float | None = None
        """When the question was put that the store has not answered yet."""
        self._lock = threading.Lock()  # the store's connection takes one question at a time

    def ask(self, question: Callable[[Store], T]) -> T:
        """The answer of the store; RuntimeError when it has gone, or is busy with a question that it never answers."""
        if not self._lock.acquire(timeout=LEAVE_WITHIN_S):
            raise RuntimeError("the store does not answer")
        self.asked_at = time.monotonic()
        try:
            return question(self.store)
        finally:
            self.asked_at = None
            self._lock.release()

    def read(self) -> Failure | None:
        """The first failure, if there was one."""
        found = self.ask(lambda store: store.get(_BOARD) if store.check([_BOARD]) else None)
        return None if found is None else Failure(*json.loads(found.decode()))

    def put(self, failure: Failure) -> Failure:
        """Put a failure on the board, unless one is there; returns the one that stands."""
        mine = json.dumps(failure)
        try:
            told = self.ask(lambda store: store.compare_set(_BOARD, "", mine)).decode()
        except RuntimeError:  # the store has gone with the process that kept it
            told = mine
        return Failure(*json.loads(told or mine))


class Watch:
    """The threads that watch all others, the store, and whether a signal waits for a library."""

    def __init__(self, board: Board, own: Member, members: Sequence[Member], *, keeps_store: bool = False) -> None:
        self.board, self.keeps_store = board, keeps_store
        self.exchange: int | None = None
        """The number of the exchange that the main thread is in."""
        self._own, self._members = own, members
        self._others = [member for member in members if member.rank != own.rank]
        self._stopped = threading.Event()
        self._heard = threading.Event()
        self._failure: Failure | None = None
        self._beats: dict[int, tuple[int, float]] = {}
        self._signals = Signals()
        self._threads = [
            threading.Thread(target=work, name=f"spectrim-{work.__name__}", daemon=True)
            for work in (self._watch, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def failure(self, wait_s: float = 0.0) -> Failure | None:
        """The first that failed, as soon as it is known, at most after `wait_s`."""
        if wait_s:
            self._heard.wait(wait_s)
        return self._failure

    def tell(self, failure: Failure) -> Failure:
        """Put a failure on the board, unless one is there; returns the one that stands."""
        return self.board.put(failure)

    def stop(self) -> None:
        """All is done."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(LOOK_EVERY_S * 8)
        self._signals.close()

    def linger(self) -> None:
        """Where the store goes with this process: until all others have looked at the board."""
        if self.keeps_store:
            time.sleep(LOOK_EVERY_S * 3)

    def _watch(self) -> None:
        count = 0
        while not self._stopped.wait(LOOK_EVERY_S):
            count += 1
            found = self._look(count)
            if found is not None:
                self._hear(found)
                return
            self._end_if_deaf()

    def _guard(self) -> None:
        """A store whose host is gone answers nothing, not even with an error: the watching thread then waits for it."""
        while not self._stopped.wait(LOOK_EVERY_S):
            asked = self.board.asked_at
            if asked is not None and time.monotonic() - asked > SILENT_S:
                how = f"the store of this run, on its host, has not answered for {SILENT_S:.0f} s"
                self._hear(died(self._members[0], how))
                return

    def _hear(self, failure: Failure) -> None:
        self._failure = failure
        self._heard.set()
        if failure.rank != self._own.rank and not self._stopped.wait(LEAVE_WITHIN_S):
            self._end(str(PeerFailed(failure)), failure.exit_code)

    def _look(self, count: int) -> Failure | None:
        try:
            self.board.ask(lambda store: store.set(f"beat {self._own.rank}", str(count)))
            failure = self.board.read()
        except RuntimeError as error:
            gone = next((member for member in self._others if is_gone(member)), self._members[0])
            return died(gone, f"the store of this run does not answer any more ({one_line(error)})")
        if failure is not None:
            return failure
        for member in self._others:
            if member.host == self._own.host and member.began is not None:
                if is_gone(member):
                    return self.tell(killed(member))
            elif self._is_silent(member):
                return self.tell(died(member, f"nothing was heard of it for {SILENT_S:.0f} s"))
        return None

    def _is_silent(self, member: Member) -> bool:
        """Whether the count of a rank of another host stands still."""
        now, key = time.monotonic(), f"beat {member.rank}"
        try:
            count = int(self.board.ask(lambda store: store.get(key) if store.check([key]) else b"0"))
        except RuntimeError:
            return False  # the next look tells
        before, since = self._beats.get(member.rank, (-1, now))
        if count != before:
            self._beats[member.rank] = (count, now)
            return False
        return now - since > SILENT_S

    def _end_if_deaf(self) -> None:
        """A signal that came while this rank waits for another, and that Python has not been told of since."""
        number = self._signals.unheard_for(LEAVE_WITHIN_S, self.exchange)
        if number is None:
            return
        name, code = signal.Signals(number).name, 128 + number
        own = f"it was stopped by {name}"
        self.tell(Failure(self._own.rank, str(self._own), own, code, by_signal=True))
        self.linger()
        self._end(f"stopped by {name} while it waited for another process", code)

    def _end(self, message: str, code: int) -> None:
        """At once: the main thread is in a library that does not come back."""
        sys.stderr.write(f"rank {self._own.rank}: error: {message}\n")
        sys.stderr.flush()
        os._exit(code)


class Signals:
    """Signals as they arrive, whatever the main thread is doing; nothing where this is not made by the main thread."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._waiting: tuple[int, int | None, float] | None = None
        self._before = -1
        self._open = threading.current_thread() is threading.main_thread()
        self._ours.setblocking(False)
        self._theirs.setblocking(False)
        if self._open:
            self._before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)

    def unheard_for(self, seconds: float, exchange: int | None) -> int | None:
        """A signal that has waited so long in one and the same `exchange` for its handler to run."""
        try:
            numbers = [n for n in self._ours.recv(64) if n in STOPPERS]
        except BlockingIOError:
            numbers = []
        now = time.monotonic()
        if numbers and self._waiting is None:
            self._waiting = (numbers[0], exchange, now)
        if self._waiting is None:
            return None
        number, began_in, since = self._waiting
        # Handlers of this program put the default in their own place before they do anything else.
        if exchange is None or exchange != began_in or signal.getsignal(number) in (signal.SIG_DFL, signal.SIG_IGN):
            self._waiting = None
            return None
        return number if now - since > seconds else None

    def close(self) -> None:
        """Give signals back to whoever listened before; by the main thread."""
        if self._open and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._before)
            self._open = False
        self._ours.close()
        self._theirs.close()


def one_line(error: BaseException) -> str:
    """What a library said, short."""
    return " ".join(str(error).split())[:120]
