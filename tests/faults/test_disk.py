"""Disks that fill, fail, forbid or cheat, under whole runs: exit 4 (or a told loss of a state), and nothing lost."""

import errno
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from command_line import call, hashes, shortest_run, small_model
from spectrim import job
from spectrim.errors import InputError, ResourceError
from spectrim.models import load
from spectrim.store import disk, files, verify_manifest, writer
from spectrim.store import state as state_module
from spectrim.store import tensors as tensors_module
from spectrim.store.state import read_state, write_state
from spectrim.store.writer import preflight, staged, write_text

pytestmark = pytest.mark.faults

TOLD = {"report.json", "report.html", "manifest.json", "README.md"}
"""Seconds, and warnings of states that could not be saved."""


@pytest.fixture(autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return shortest_run(tmp_path_factory.mktemp("input"), vocab_size=8192)  # a file larger than a state


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "out"
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        assert call(*words, "--out", out).code == 0
    return hashes(out)


def assert_same(out: Path, whole: dict[str, str]) -> None:
    verify_manifest(out)
    found = hashes(out)
    assert found.keys() == whole.keys()
    assert {name for name in whole if found[name] != whole[name]} <= TOLD


CALLS: dict[str, tuple[Any, str]] = {
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "rename": (os, "rename"),
    "chmod": (os, "chmod"),
    "state": (state_module, "save_file"),
    "text": (writer, "write_text"),
}


def failing(real: Callable[..., Any], nth: int, number: int) -> tuple[Callable[..., Any], list[int]]:
    """The call, whose `nth` time fails; and how often it was called."""
    count = [0]

    def call_(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == nth:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    return call_, count


@pytest.mark.fault(36, 40)
@pytest.mark.parametrize("name", CALLS)
def test_the_nth_call_fails(words: list[str], whole: dict[str, str], tmp_path: Path, name: str) -> None:
    """First, last and two in between: a state is given up and told, anything else is exit 4; then the run goes on."""
    owner, attribute = CALLS[name]
    real = getattr(owner, attribute)
    patched, count = failing(real, -1, 0)
    with mock.patch.object(owner, attribute, patched):
        assert call(*words, "--out", tmp_path / "counted").code == 0
    source = hashes(Path(words[1]))
    last = count[0]
    for nth in sorted({1, 1 + last // 3, 1 + 2 * last // 3, last}):
        out = tmp_path / str(nth) / "out"
        patched, _ = failing(real, nth, errno.ENOSPC)
        with mock.patch.object(owner, attribute, patched):
            answer = call(*words, "--out", out)
        assert answer.code in (0, 4), (nth, answer.err)
        assert "bug of spectrim" not in answer.err
        if answer.code == 4:
            assert "No space left on device (errno 28)" in answer.message, (nth, answer.err)
            assert "free some space" in answer.message
            if out.exists():  # the last sync, of the parent: published, though perhaps not for ever
                verify_manifest(out)
            assert not list(out.parent.glob("out.partial-*"))
            assert call(*words, "--out", out, "--overwrite").code == 0
        assert_same(out, whole)
        assert not out.with_name("out.resume").exists()
        shutil.rmtree(out.parent)
    assert hashes(Path(words[1])) == source


@pytest.mark.fault(28, 36)
def test_a_disk_that_is_full_from_the_nth_call_on_keeps_the_old_result(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as folder:
        write_text(folder / "config.json", "old")
    real, synced = os.fsync, [0]

    def full(descriptor: int) -> None:
        synced[0] += 1
        if synced[0] > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with mock.patch.object(os, "fsync", full):
        answer = call(*words, "--out", out, "--overwrite")
    assert answer.code == 4, answer.err
    assert (out / "config.json").read_text() == "old"
    assert call(*words, "--out", out, "--overwrite").code == 0
    verify_manifest(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs privileges that this machine does not give")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.fault(36, 37)
def test_a_real_disk_that_fills_during_the_run(
    words: list[str], whole: dict[str, str], tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 2_300_000))
    with mock.patch.object(job, "write_folder", filling(job.write_folder, small_disk)):
        answer = call(*words, "--out", out)
    assert answer.code == 4, answer.err
    assert "No space left on device (errno 28)" in answer.message
    assert "now removed; all of it takes about 0.00 GB (1," in answer.message
    assert "kept in" in answer.message
    assert not out.exists()
    assert not list(small_disk.glob("out.partial-*"))
    assert list((small_disk / "out.resume").glob("*.safetensors"))
    for path in (filler, small_disk / "late"):
        path.unlink()
    answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert "resumed at" in answer.err
    assert_same(out, whole)


def filling(real: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Somebody else fills the disk just before the result is written."""

    def write(*arguments: Any, **options: Any) -> Any:
        (folder / "late").write_bytes(b"x" * max(0, shutil.disk_usage(folder).free - 200_000))
        return real(*arguments, **options)

    return write


@pytest.mark.fault(37)
def test_states_leave_the_room_that_the_result_needs(words: list[str], tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    source = Path(words[1], "model.safetensors").stat().st_size
    tight = usage._replace(free=int(source * 1.1) + 1)
    with mock.patch.object(shutil, "disk_usage", return_value=tight):
        answer = call(*words, "--out", tmp_path / "out", "--set", "storage=pivot")
    assert answer.code == 0, answer.err
    assert "with the result to come" in answer.err
    verify_manifest(tmp_path / "out")


@pytest.mark.fault(36)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_device() -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        write_text(Path("/dev/full"), "x")
    assert "free some space" in str(disk.as_resource_error(caught.value, Path("/dev/full")))


@pytest.mark.fault(36)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_result_that_cannot_be_printed_is_no_bug() -> None:
    import sys

    from spectrim import terminal

    with open("/dev/full", "w") as full, mock.patch.object(sys, "stdout", full):
        with pytest.raises(ResourceError, match=r"stdout: No space left on device \(errno 28\); only this text was"):
            terminal.emit({"a": 1}, True, lambda: None)
        assert full.closed


@pytest.mark.fault(38)
def test_a_limit_on_file_size_keeps_what_fits_and_names_the_cause(
    words: list[str], whole: dict[str, str], tmp_path: Path
) -> None:
    """A fork, since the limit cannot be raised again: states and small files fit, the weights do not."""
    said = tmp_path / "said"
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
            answer = call(*words, "--out", tmp_path / "out")
            said.write_text(f"{answer.code} {answer.message}")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert said.read_text().startswith("4 "), said.read_text()
    assert "File too large (errno 27)" in said.read_text()
    assert "`ulimit -f` allows no file this large" in said.read_text()
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial-*"))
    answer = call(*words, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert_same(tmp_path / "out", whole)


@pytest.mark.fault(39)
@pytest.mark.parametrize("mode", [0o555, 0o444, 0o666], ids=["read-only", "no execute bit", "writable, no execute bit"])
def test_a_folder_that_cannot_be_written_by_this_user(mode: int) -> None:
    """As a user without rights, for whom the kernel itself refuses."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        place = Path(name, "place")
        place.mkdir()
        place.chmod(mode)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if os.geteuid() == 0:
                    os.setgroups([])
                    os.setresuid(65534, 65534, 65534)
                preflight(place / "out", source=None, overwrite=False, bytes_needed=1)
            except ResourceError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        with os.fdopen(read) as told:
            said = told.read()
        assert said.startswith(str(place)), said
        assert said.endswith("; give yourself permission or choose another --out")
        place.chmod(0o755)
        assert list(place.iterdir()) == []


@pytest.mark.fault(41)
def test_a_rename_across_filesystems(words: list[str], tmp_path: Path) -> None:
    real = os.rename

    def across(old: Any, new: Any) -> None:
        if ".partial-" in str(old):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(old))
        real(old, new)

    with mock.patch.object(os, "rename", across):
        answer = call(*words, "--out", tmp_path / "out")
    assert answer.code == 4, answer.err
    assert "are on different disks, which no rename bridges" in answer.message
    assert not (tmp_path / "out").exists()
    assert call(*words, "--out", tmp_path / "out").code == 0


@pytest.mark.fault(41)
def test_the_partial_folder_lies_beside_the_target_and_so_on_its_disk(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "out") if (tmp_path / "a").mkdir() is None else mock.MagicMock() as folder:
        assert folder.parent == tmp_path / "a"
        write_text(folder / "x", "1")


@pytest.mark.fault(42)
@pytest.mark.parametrize(("mask", "files_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_results_have_the_permissions_that_the_umask_gives(
    words: list[str], tmp_path: Path, mask: int, files_mode: int, folder_mode: int
) -> None:
    before = os.umask(mask)
    try:
        assert call(*words, "--out", tmp_path / "out").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {files_mode}


# ---- reading


@pytest.mark.fault(40)
def test_short_reads_are_read_on(tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    write_state(path, 3, {"x": torch.arange(1000), "y": torch.ones(5, dtype=torch.bfloat16)}, {"a": 1})
    real = files.read_fully

    class Short:
        """A file on a mount that gives seven bytes at a time."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def seek(self, at: int) -> None:
            self.file.seek(at)

        def readinto(self, into: memoryview) -> int:
            return self.file.readinto(into[:7])

    with mock.patch.object(tensors_module, "read_fully", lambda file, into: real(Short(file), into)):
        step, tensors, _ = read_state(path)
    assert step == 3
    assert torch.equal(tensors["x"], torch.arange(1000))


@pytest.mark.fault(40)
def test_a_state_that_shrinks_while_it_is_read_is_refused_and_kills_nobody(tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    write_state(path, 3, {"x": torch.arange(100_000)}, {})
    real = state_module.read_header_and_metadata

    def cut_after(path: Path) -> Any:
        found = real(path)
        os.truncate(path, 5000)
        return found

    with (
        mock.patch.object(state_module, "read_header_and_metadata", cut_after),
        pytest.raises(InputError, match="became shorter while it was read"),
    ):
        read_state(path)


@pytest.mark.fault(40)
def test_a_disk_that_fails_while_a_state_is_read_costs_that_state(
    words: list[str], whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with mock.patch.object(job, "write_folder", side_effect=RuntimeError):
        assert call(*words, "--out", out).code == 6
    assert list((tmp_path / "out.resume").glob("*.safetensors"))
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(state_module, "read_from", side_effect=broken):
        answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert "Input/output error (errno 5)" in answer.err
    assert "starts anew, which costs time and changes no number" in answer.err
    assert_same(out, whole)


@pytest.mark.fault(23)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["replaced", "written to", "cut"])
def test_a_source_that_is_swapped_under_the_run_is_refused(tmp_path: Path, how: str, when: str) -> None:
    model = small_model(tmp_path / "model")
    weights = model / "model.safetensors"
    real = load.AutoModelForCausalLM.from_pretrained

    def swap() -> None:
        if how == "replaced":
            shutil.copyfile(weights, tmp_path / "fresh")
            os.replace(tmp_path / "fresh", weights)
        elif how == "written to":
            with open(weights, "r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\1" * 8)
        else:
            os.truncate(weights, weights.stat().st_size - 8)

    def loading(*arguments: Any, **options: Any) -> Any:
        loaded = real(*arguments, **options)
        swap()
        return loaded

    checked = load.check_against_config
    with (
        mock.patch.object(load.AutoModelForCausalLM, "from_pretrained", loading)
        if when == "after"
        else mock.patch.object(load, "check_against_config", lambda source: (checked(source), swap()))
    ):
        answer = call("compress", model, "--method", "svd", "--eval", "none", "--out", tmp_path / "out")
    assert answer.code == 3, answer.err
    assert "changed while the model was being read" in answer.message
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(35)
def test_saving_over_the_file_that_is_mapped_is_impossible_and_values_survive(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    before = hashes(model)
    for out in (model, model / "sub", tmp_path):
        answer = call("compress", model, "--method", "svd", "--eval", "none", "--out", out, "--overwrite")
        assert answer.code == 2, answer.err
    assert hashes(model) == before
    link = tmp_path / "link"
    link.symlink_to(model)
    assert call("compress", link, "--method", "svd", "--eval", "none", "--out", model, "--overwrite").code == 2
    assert hashes(model) == before


@pytest.mark.fault(32)
def test_an_exception_while_the_result_is_written_leaves_no_index_and_no_manifest(
    words: list[str], tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def boom(folder: Path, **_: Any) -> None:
        seen.append(sorted(p.name for p in folder.iterdir()))
        raise RuntimeError("half-way")

    with mock.patch.object(job, "write_manifest", boom):
        answer = call(*words, "--out", tmp_path / "out")
    assert answer.code == 6
    assert "model.safetensors" in seen[0]
    assert [p.name for p in tmp_path.iterdir()] == ["out.resume"]
