"""Power loss: a disk that forgets all that was not synced, files and names, at every sync and rename of a run.

The model of a disk: bytes of a file are durable as they were at the last fsync of that file; names in a folder as they
were at the last fsync of that folder. After the loss a name that was synced before its bytes shows an empty file.
Under `early` names are durable at once, as many filesystems do it, and only bytes are forgotten.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import call, hashes, small_model, small_text
from spectrim import job
from spectrim.store import verify_manifest
from spectrim.store.files import open_regular
from spectrim.store.writer import staged, write_text

pytestmark = [pytest.mark.faults, pytest.mark.fault(26)]

TOLD = {"report.json", "report.html", "manifest.json"}


class Disk:
    """Watches fsync and the calls that change names below `root`, and can show what a power loss would leave."""

    def __init__(self, root: Path, *, early: bool) -> None:
        self.root, self.early = root, early
        self.files: dict[int, bytes] = {}  # inode -> durable bytes
        self.folders: dict[int, dict[str, int]] = {}  # inode -> durable names
        self.kinds: dict[int, str] = {}
        self.held: list[int] = []  # open descriptors, so that no inode is given away twice
        self.moments: list[tuple[str, dict[int, bytes], dict[int, dict[str, int]]]] = []
        self._sync_folder(root)

    def __enter__(self) -> "Disk":
        real_fsync, self.patches = os.fsync, []

        def fsync(descriptor: int) -> None:
            self._note("before fsync")
            real_fsync(descriptor)
            self._synced(descriptor)
            self._note("after fsync")

        self.patches.append(mock.patch.object(os, "fsync", fsync))
        for name in ("replace", "rename"):
            self.patches.append(mock.patch.object(os, name, self._renaming(getattr(os, name))))
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()
        for descriptor in self.held:
            os.close(descriptor)

    def _renaming(self, real: Any) -> Any:
        def rename(*arguments: Any, **options: Any) -> None:
            real(*arguments, **options)
            self._note("after rename")

        return rename

    def _synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.root):
            return
        if path.is_dir():
            self._sync_folder(path)
        else:
            self.held.append(os.open(path, os.O_RDONLY))
            self.files[os.fstat(descriptor).st_ino] = path.read_bytes()

    def _sync_folder(self, folder: Path) -> None:
        self.held.append(os.open(folder, os.O_RDONLY))
        names = {}
        for entry in os.scandir(folder):
            self.kinds[entry.inode()] = "folder" if entry.is_dir() else "file"
            if entry.is_dir():
                self.folders.setdefault(entry.inode(), {})
            self.held.append(os.open(entry.path, os.O_RDONLY))
            names[entry.name] = entry.inode()
        self.folders[os.stat(folder).st_ino] = names

    def _note(self, what: str) -> None:
        if self.early:
            for folder in [self.root, *(p for p in self.root.rglob("*") if p.is_dir())]:
                self._sync_folder(folder)
        self.moments.append((what, dict(self.files), {inode: dict(names) for inode, names in self.folders.items()}))

    def show(self, moment: int, into: Path) -> None:
        """What a power loss at that moment leaves."""
        _, files, folders = self.moments[moment]

        def make(inode: int, folder: Path) -> None:
            folder.mkdir()
            for name, child in folders.get(inode, {}).items():
                if self.kinds[child] == "folder":
                    make(child, folder / name)
                else:
                    (folder / name).write_bytes(files.get(child, b""))

        make(self.root.stat().st_ino, into)


@pytest.fixture(autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("input")
    return [
        *("compress", str(small_model(where / "model", num_hidden_layers=1)), "--method", "soco", "--keep", "0.8"),
        *("--set", "steps=2", "--set", "batch_size=2", "--set", "coupling=none", "--set", "rounds=0"),
        *("--calib", str(small_text(where / "text.txt")), "--eval", "none", "--save-every", "0"),
        *("--calib-windows", "4", "--calib-length", "16", "--train-windows", "4"),
    ]


@pytest.mark.parametrize("early", [False, True], ids=["names forgotten", "names kept"])
def test_after_a_power_loss_the_same_command_gives_the_same_bytes(
    words: list[str], tmp_path: Path, early: bool
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with Disk(place, early=early) as watched:
        assert call(*words, "--out", place / "out").code == 0
    whole = place / "out"
    count = len(watched.moments)
    assert count > 60
    resumed = 0
    for moment in range(0, count, max(1, count // 7)):
        after = tmp_path / str(moment)
        watched.show(moment, after)
        out = after / "out"
        if out.exists():
            verify_manifest(out)
            continue
        answer = call(*words, "--out", out)
        assert answer.code == 0, f"moment {moment} of {count} ({watched.moments[moment][0]}): {answer.err}"
        resumed += "resumed at" in answer.err
        ours, theirs = hashes(out), hashes(whole)
        assert ours.keys() == theirs.keys()
        assert {name for name in theirs if ours[name] != theirs[name]} <= TOLD, f"moment {moment} of {count}"
    assert resumed > 1, "the moments did not meet a run with a state"


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["names forgotten", "names kept"])
def test_a_power_loss_at_every_moment(words: list[str], tmp_path: Path, early: bool) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with Disk(place, early=early) as watched:
        assert call(*words, "--out", place / "out").code == 0
    whole = hashes(place / "out")
    for moment in range(len(watched.moments)):
        out = tmp_path / str(moment) / "out"
        watched.show(moment, out.parent)
        if out.exists():
            verify_manifest(out)
            continue
        answer = call(*words, "--out", out)
        assert answer.code == 0, (moment, answer.err)
        assert {name for name in whole if hashes(out).get(name) != whole[name]} <= TOLD, moment


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("before", ["absent", "old"])
@pytest.mark.fault(28)
def test_publishing_survives_a_power_loss_at_every_moment(tmp_path: Path, early: bool, before: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    if before == "old":
        with staged(out) as folder:
            write_text(folder / "config.json", "old")
    with Disk(place, early=early) as watched:
        if before == "old":
            watched.files |= {(out / "config.json").stat().st_ino: b"old"}
            watched._sync_folder(out)
        with staged(out, overwrite=True) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(name * 100)
    outcomes = set()
    for moment in range(len(watched.moments)):
        after = tmp_path / f"after-{moment}"
        watched.show(moment, after)
        found = {p.name: p.read_text() for p in sorted((after / "out").glob("*"))}
        outcomes.add("new" if found == {"a": "a" * 100, "b": "b" * 100} else str(found))
    assert outcomes == {"new", "{'config.json': 'old'}" if before == "old" else "{}"}


def test_the_shim_sees_a_missing_sync(tmp_path: Path) -> None:
    """A writer that renames without syncing loses the bytes: the shim must show that, else it proves nothing."""
    place = tmp_path / "place"
    place.mkdir()
    with Disk(place, early=True) as watched:
        (place / "fresh").write_text("value")
        os.replace(place / "fresh", place / "file")
    watched.show(len(watched.moments) - 1, tmp_path / "after")
    with open_regular(tmp_path / "after" / "file") as (_, size):
        assert size == 0
