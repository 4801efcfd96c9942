"""How the processes of one run find each other, and what is said of one that never comes or leaves on the way.

    store      one process keeps it (rank 0, or the launcher), the others knock until it answers
    sign in    every rank writes there who it is and looks who else has: whoever has signed in and is gone has a name
    watch      from then on by threads (peers.py), before any library is asked to connect all with all

All waiting is done here in short steps, and not inside a library: a signal is heard at once. A rank that ends before it
has signed in can tell nobody; the others give it MEET_WITHIN_S.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]  documented

from spectrim.errors import ResourceError, UsageError
from spectrim.peers import LOOK_EVERY_S, Board, Failure, Member, PeerFailed, began, is_gone, killed, one_line
from spectrim.peers import own_failure as failure_of

MEET_WITHIN_S = 300.0
"""For all processes to appear, unless the environment says otherwise."""
VARIABLE = "SPECTRIM_MEET_WITHIN_S"
ANSWER_WITHIN = timedelta(seconds=30)
"""For a store that is there."""
ANY_TIME = timedelta(days=7)
"""For questions of gloo and NCCL, which ranks may rightly ask long before another one answers; peers.py watches."""


_came = threading.Event()
"""Set when this process begins to sign in: its end is then told by whoever runs it."""


def has_come() -> bool:
    """Whether this process has begun to meet the others."""
    return _came.is_set()


class Launcher(NamedTuple):
    """What was said to this process by whoever started it."""

    rank: int
    world: int
    address: str
    port: int
    attempt: str = "0"
    has_store: bool = False  # else rank 0 keeps it

    @property
    def keeps_store(self) -> bool:
        """Whether this process does."""
        return self.rank == 0 and not self.has_store

    @property
    def keeper(self) -> str:
        """Who keeps the store, in words."""
        return "the launcher" if self.has_store else "rank 0"


class Seat(NamedTuple):
    """A rank that has met all others."""

    own: Member
    members: tuple[Member, ...]
    store: Store  # for gloo and NCCL
    board: Board
    keeps_store: bool


def meet_within() -> float:
    """Seconds in which all must have signed in."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return MEET_WITHIN_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UsageError(f"{VARIABLE} is {text!r}; it must be a number of seconds above 0")
    return seconds


def sign_in(launcher: Launcher) -> Seat:
    """Meet all others. PeerFailed where one fails meanwhile, ResourceError where one does not come."""
    seconds = meet_within()
    _came.set()
    end = time.monotonic() + seconds
    store = _connected(launcher, end, keeps=launcher.keeps_store)
    board = Board(PrefixStore(f"spectrim {launcher.attempt} watch", _connected(launcher, end, keeps=False)))
    own = Member(launcher.rank, socket.gethostname(), os.getpid(), began(os.getpid()))
    found = {own.rank: own}
    try:
        members = _all_members(board, own, found, launcher, end, seconds)
    except BaseException as error:
        if not isinstance(error, PeerFailed):
            board.put(failure_of(own, error))
        if not isinstance(error, Exception):
            _say_who_is_missing(launcher, found)
        if launcher.keeps_store:
            time.sleep(LOOK_EVERY_S * 3)  # the store goes with this process: until the others have read why
        raise
    store.set_timeout(ANY_TIME)
    return Seat(own, members, PrefixStore(f"spectrim {launcher.attempt}", store), board, launcher.keeps_store)


def _all_members(
    board: Board, own: Member, found: dict[int, Member], launcher: Launcher, end: float, seconds: float
) -> tuple[Member, ...]:
    """All ranks in order; `found` has those that have come so far."""
    try:
        board.ask(lambda store: store.set(_key(own.rank), json.dumps(own)))
        while True:
            for rank in _missing(launcher, found):
                told = board.ask(lambda store, key=_key(rank): store.get(key) if store.check([key]) else None)
                if told is not None:
                    found[rank] = Member(*json.loads(told.decode()))
            _stop_if_one_failed(board, own, found)
            missing = _missing(launcher, found)
            if not missing:
                return tuple(found[rank] for rank in range(launcher.world))
            if time.monotonic() > end:
                raise ResourceError(
                    f"{_ranks(missing)} did not come to {launcher.address}:{launcher.port} within {seconds:g} s "
                    f"({len(found)} of {launcher.world} processes are there): not started, or ended before it came. "
                    f"Look at what it said; {VARIABLE} gives more time"
                )
            time.sleep(LOOK_EVERY_S)
    except RuntimeError as error:  # the store's errors of the network are RuntimeErrors
        if (keeper := found.get(0)) is not None and keeper != own and is_gone(keeper):
            raise PeerFailed(killed(keeper)) from error
        raise ResourceError(
            f"{launcher.keeper}, which keeps the store of this run at {launcher.address}:{launcher.port}, has gone "
            f"({one_line(error)}); look at what it said"
        ) from error


def _stop_if_one_failed(board: Board, own: Member, found: dict[int, Member]) -> None:
    failure = board.read()
    if failure is None:
        gone = [m for m in found.values() if m.rank != own.rank and m.host == own.host and is_gone(m)]
        failure = board.put(killed(gone[0])) if gone else None
    if failure is not None:
        raise PeerFailed(failure)


def _missing(launcher: Launcher, found: dict[int, Member]) -> list[int]:
    return [rank for rank in range(launcher.world) if rank not in found]


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _say_who_is_missing(launcher: Launcher, found: dict[int, Member]) -> None:
    """On a signal: a launcher stops all that are left when one has ended, which is then the one to look at."""
    missing = _missing(launcher, found)
    if missing:
        sys.stderr.write(f"rank {launcher.rank}: {_ranks(missing)} had not come yet\n")


def _key(rank: int) -> str:
    return f"member {rank}"


def _connected(launcher: Launcher, end: float, *, keeps: bool) -> TCPStore:
    """A connection to the store; `keeps`: made by this process."""
    address, port = launcher.address, launcher.port
    while True:
        try:
            if not keeps:
                socket.create_connection((address, port), timeout=LOOK_EVERY_S * 8).close()
            return TCPStore(address, port, None, keeps, timeout=ANSWER_WITHIN, wait_for_workers=False)
        except (OSError, RuntimeError) as error:  # torch's DistStoreError and DistNetworkError are RuntimeErrors
            if keeps:
                raise ResourceError(
                    f"rank 0 cannot keep the store of this run at {address}:{port} ({one_line(error)}); choose another "
                    "MASTER_PORT"
                ) from error
            if time.monotonic() > end:
                raise ResourceError(
                    f"rank {launcher.rank}: {launcher.keeper}, which keeps the store of this run, did not come to "
                    f"{address}:{port} within {meet_within():g} s ({one_line(error)}): not started, or ended before. "
                    f"Look at what it said; {VARIABLE} gives more time"
                ) from error
        time.sleep(LOOK_EVERY_S)


def tell_early(launcher: Launcher, what: str, code: int) -> None:
    """Of a rank that ends before it has signed in: put it on the board, if there is a store within a moment."""
    own = Member(launcher.rank, socket.gethostname(), os.getpid(), began(os.getpid()))
    with suppress(ResourceError):
        if not launcher.keeps_store:
            store = _connected(launcher, time.monotonic(), keeps=False)
            board = Board(PrefixStore(f"spectrim {launcher.attempt} watch", store))
            board.put(Failure(own.rank, str(own), what, code))
