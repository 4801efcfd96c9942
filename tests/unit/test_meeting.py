"""Processes that meet: whoever does not come, or goes again, is named in time; a signal is heard while they wait."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import PrefixStore, Store, TCPStore

from several_worker import free_port
from spectrim import meeting, peers
from spectrim.errors import ResourceError, UsageError
from spectrim.meeting import Launcher, sign_in
from spectrim.peers import Board, Failure, Member, PeerFailed, Signals, Watch, died

SRC = Path(__file__).resolve().parents[2] / "src"
WAITS = """
import sys
from spectrim.terminal import exit_codes, stoppable
from spectrim.processes import joined
with exit_codes(), stoppable():
    print("begins", file=sys.stderr, flush=True)
    with joined("cpu"):
        pass
"""
"""One of several processes and nothing else, in a program that hears signals as the command line does."""


@pytest.fixture
def store() -> Store:
    return TCPStore("127.0.0.1", free_port(), None, True, timeout=timedelta(seconds=10), wait_for_workers=False)


def launcher(store: Store, rank: int = 0, world: int = 2) -> Launcher:
    return Launcher(rank, world, "127.0.0.1", store.port, has_store=True)


def board_of(store: Store) -> Board:
    return Board(PrefixStore("spectrim 0 watch", store))


def ended_process() -> Member:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    member = Member(1, os.uname().nodename, process.pid, peers.began(process.pid))
    process.communicate(b"\n")
    return member


def test_a_rank_that_does_not_come_is_named_after_the_time_that_was_given(store, monkeypatch):
    monkeypatch.setenv(meeting.VARIABLE, "0.4")
    began = time.monotonic()
    with pytest.raises(ResourceError, match=r"rank 1 did not come to 127.0.0.1:\d+ within 0.4 s \(1 of 2 processes"):
        sign_in(launcher(store))
    assert time.monotonic() - began < 5
    failure = board_of(store).read()  # whoever comes later need not wait
    assert failure is not None
    assert failure.rank == 0
    with pytest.raises(PeerFailed, match="rank 1 did not come"):
        sign_in(launcher(store, rank=1))


def test_a_rank_that_signed_in_and_is_gone_is_named_at_once(store):
    gone = ended_process()
    PrefixStore("spectrim 0 watch", store).set("member 1", json.dumps(gone))
    with pytest.raises(PeerFailed, match=rf"rank 1 \(process {gone.process} on .*its process has ended without a word"):
        sign_in(launcher(store, world=3))


def test_a_rank_that_ended_before_it_came_says_so(store):
    meeting.tell_early(launcher(store, rank=1), "it ended before the processes had met", 3)
    with pytest.raises(PeerFailed, match=r"rank 1 \(process .* failed.*ended before") as error:
        sign_in(launcher(store))
    assert error.value.exit_code == 3


def test_a_store_that_nobody_keeps_is_said_to_be_missing(monkeypatch):
    monkeypatch.setenv(meeting.VARIABLE, "0.3")
    with pytest.raises(ResourceError, match="rank 1: rank 0, which keeps the store of this run, did not come"):
        sign_in(Launcher(1, 2, "127.0.0.1", free_port()))


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_the_time_to_meet_is_a_number_of_seconds(monkeypatch, text: str):
    monkeypatch.setenv(meeting.VARIABLE, text)
    with pytest.raises(UsageError, match="SPECTRIM_MEET_WITHIN_S is"):
        meeting.meet_within()


def test_two_ranks_meet(store):
    seats = {}
    ranks = [threading.Thread(target=lambda r=r: seats.update({r: sign_in(launcher(store, r))})) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(20)
    assert [seats[r].own.rank for r in range(2)] == [0, 1]
    assert seats[0].members == seats[1].members


def test_a_signal_is_heard_while_a_rank_waits_for_another():
    """The cause of runs that did not end: all waiting was inside a library, where Python hears nothing."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        while process.stderr.readline() != "begins\n":
            assert process.poll() is None
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143, said
    assert "rank 0: rank 1 had not come yet" in said


def test_of_signals_only_one_that_waits_for_a_library_is_acted_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    signals = Signals()
    try:
        assert signals.unheard_for(0.0, 4) is None
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.unheard_for(9.0, 4) is None  # not yet
        assert signals.unheard_for(0.0, 4) == signal.SIGHUP
        assert signals.unheard_for(0.0, 5) is None  # the exchange has ended: its handler runs
        os.kill(os.getpid(), signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as handlers do that have run
        assert signals.unheard_for(0.0, 4) is None
        assert signals.unheard_for(0.0, None) is None
    finally:
        signals.close()
        signal.signal(signal.SIGHUP, before)


class Silent(Store):
    """A store whose host is gone: questions are sent, and never answered."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()

    def set(self, key, value) -> None:
        self.gone.wait(20)
        raise RuntimeError("closed")


def test_a_store_that_never_answers_is_the_death_of_its_host(monkeypatch):
    monkeypatch.setattr(peers, "SILENT_S", 0.3)
    ended: list[str] = []
    monkeypatch.setattr(peers, "LEAVE_WITHIN_S", 0.1)
    monkeypatch.setattr(Watch, "_end", lambda _self, message, code: ended.append(f"{code} {message}"))
    members = [Member(rank, f"host-{rank}", 10 + rank, None) for rank in range(2)]
    silent = Silent()
    watch = Watch(Board(silent), members[1], members)
    try:
        failure = watch.failure(5.0)
        assert failure is not None
        assert (failure.rank, "has not answered" in failure.what) == (0, True)
        time.sleep(0.5)
        assert ended == [f"4 {PeerFailed(failure)}"]
    finally:
        silent.gone.set()
        watch.stop()


def test_the_first_failure_stands(store):
    board, member = board_of(store), Member(1, "host", 11, None)
    assert board.read() is None
    first = died(member, "first")
    assert board.put(first) == first
    assert board.put(Failure(0, "rank 0", "second", 5)) == first
    assert board.read() == first
