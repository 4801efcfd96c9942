"""SIGKILL at every named point of the storage protocol: the same command again gives the bytes of a clean run.

Children are forks that run the whole command line; a kill does not lose what was written, so nothing is really synced.
"""

import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from command_line import call, hashes, small_model, small_text
from spectrim import job
from spectrim.resume import Resume
from spectrim.store import disk, points, verify_manifest
from spectrim.store.points import POINTS

pytestmark = [pytest.mark.faults, pytest.mark.fault(24, 26, 60)]

TOLD = {"report.json", "report.html", "manifest.json"}
OLD = '{"old": true}'
ONCE = "staged", "before-seal", "before-publish", "renamed", "after-publish", "replaced-removed", "locked", "tidied"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0), mock.patch.object(os, "fsync"):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The closed form with every stage that saves, on one block; --out is missing."""
    where = tmp_path_factory.mktemp("input")
    return [
        *("compress", str(small_model(where / "model", num_hidden_layers=1)), "--method", "soco", "--preset", "fast"),
        *("--calib", str(small_text(where / "text.txt")), "--eval", "none", "--save-every", "0"),
        *("--calib-windows", "4", "--calib-length", "16", "--set", "rounds=0"),
    ]


def passed(body: Callable[[], object]) -> Counter[str]:
    """How often each point is passed."""
    seen: Counter[str] = Counter()
    with mock.patch.object(points, "reached", lambda name: seen.update([name])):
        body()
    return seen


class Steps:
    """Counts steps (each asks once whether to save) over all forks."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 8)
        self.real = Resume.due

    def __enter__(self) -> "Steps":
        def due(resume: Resume) -> bool:
            self.shared[:] = (self.total + 1).to_bytes(8, "little")
            return self.real(resume)

        self.patch = mock.patch.object(Resume, "due", due)
        self.patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.stop()

    @property
    def total(self) -> int:
        return int.from_bytes(self.shared[:], "little")


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counter[str], int]:
    """An undisturbed result, how often it passed each point, and its steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with mock.patch.object(job, "reload_difference", return_value=0.0), Steps() as steps:
        seen = passed(lambda: call(*words, "--out", out))
    verify_manifest(out)
    return out, seen, steps.total


def die_at(name: str, count: int) -> Callable[[str], None]:
    left = [count]

    def reached(here: str) -> None:
        left[0] -= here == name
        if here == name and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return reached


def kill_at(name: str, count: int, *words: object) -> None:
    """A child that must die of its own SIGKILL, at that point and nowhere else."""
    pid = os.fork()
    if pid == 0:
        try:
            with mock.patch.object(points, "reached", die_at(name, count)):
                call(*words)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == -signal.SIGKILL, f"never came to {name} number {count}"


def assert_same(out: Path, whole: Path) -> None:
    verify_manifest(out)
    ours, theirs = hashes(out), hashes(whole)
    assert {n for n in theirs if ours.get(n) != theirs[n]} <= TOLD
    assert ours.keys() == theirs.keys()
    assert not out.with_name("out.resume").exists()


def test_a_run_passes_every_point_in_one_way_or_another(words, whole, tmp_path):
    out = tmp_path / "out"
    fill_old(out)
    with mock.patch.object(disk, "exchange", return_value=False):
        seen = passed(lambda: call(*words, "--out", out, "--overwrite"))
    assert {*seen, *whole[1]} == {*POINTS}


def test_a_point_that_is_not_in_the_table_is_a_bug():
    with pytest.raises(AssertionError, match="is not in POINTS"):
        points.point("somewhere")


def test_nothing_from_outside_arms_a_point(words, tmp_path, monkeypatch):
    """No variable and no file: the hook is an attribute that only code in the same process can replace."""
    source = Path(points.__file__).read_text()
    assert "import" not in source
    assert "environ" not in source


@pytest.mark.parametrize(
    ("name", "which"),
    [(name, "first") for name in POINTS if name != "old-set-aside"]
    + [("state-renamed", "last"), ("text-written", "last"), ("tidying", "last")]
    + [
        pytest.param(name, "last", marks=pytest.mark.slow)
        for name in POINTS
        if name not in (*ONCE, "old-set-aside", "state-renamed", "text-written", "tidying")
    ],
)
def test_killed_at_every_point(words, whole, tmp_path, name, which):
    clean, seen, in_all = whole
    out = tmp_path / "out"
    with Steps() as steps:
        kill_at(name, 1 if which == "first" else seen[name], *words, "--out", out)
        if out.exists():
            verify_manifest(out)
        published = out.exists()
        answer = call(*words, "--out", out, *(["--overwrite"] if published else []))
        assert answer.code == 0, answer.err
        if not published:
            assert in_all <= steps.total <= in_all + 1, "more than one step was done twice"
    assert_same(out, clean)


def test_killed_at_the_same_point_again_and_again(words, whole, tmp_path):
    out = tmp_path / "out"
    runs = 0
    while not out.exists():
        pid = os.fork()
        if pid == 0:
            try:
                with mock.patch.object(points, "reached", die_at("state-saved", 3)):
                    call(*words, "--out", out)
            finally:
                os._exit(0)
        runs += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert runs < 50
    assert runs >= 4
    assert_same(out, whole[0])


def fill_old(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text(OLD)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in ("before-publish", "renamed", "after-publish", "replaced-removed")
     for way in ("exchange", "renames")] + [("old-set-aside", "renames")],
)  # fmt: skip
def test_killed_while_the_old_result_is_replaced(words, whole, tmp_path, name, way):
    out = tmp_path / "out"
    fill_old(out)
    with mock.patch.object(disk, "exchange", return_value=False) if way == "renames" else mock.MagicMock():
        kill_at(name, 1, *words, "--out", out, "--overwrite")
    if name == "old-set-aside":  # the only moment without OUT: the old one is beside it, whole, and is told of
        assert not out.exists()
        (aside,) = tmp_path.glob("out.old-*")
        assert (aside / "config.json").read_text() == OLD
        assert "is the only copy of" in call("status", tmp_path).out
    elif name == "before-publish":
        assert (out / "config.json").read_text() == OLD
    else:
        verify_manifest(out)
    answer = call(*words, "--out", out, "--overwrite")
    assert answer.code == 0, answer.err
    assert_same(out, whole[0])
