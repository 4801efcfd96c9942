"""Injected faults. After every one: OUT is absent, or what it was, or complete; the source is untouched."""

# ruff: noqa: PT012 - what is tested is the block inside `staged`, and it has to do something before it fails

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import TestCase

import numpy as np
import pytest
from safetensors.numpy import save_file

from spectrim.errors import InputError, Interrupted, NumericalError, ResourceError, UsageError
from spectrim.store import disk, points
from spectrim.store import files as files_module
from spectrim.store import target as target_module
from spectrim.store import writer as writer_module
from spectrim.store.manifest import verify_manifest, write_manifest
from spectrim.store.reader import open_checkpoint, read_header
from spectrim.store.writer import preflight, staged, write_text

pytestmark = pytest.mark.faults

POINTS = ("staged", "before-publish", "after-publish")
OLD = {"config.json": b"{}", "old": b"old"}
PACKAGE = Path(files_module.__file__).parents[1]

# A stub package keeps the child from importing anything but the store.
CHILD = """
import os, signal, sys, types
package = types.ModuleType("spectrim")
package.__path__ = [sys.argv[1]]
sys.modules["spectrim"] = package
from pathlib import Path
from spectrim.store import disk, points, writer
from spectrim.store.manifest import write_manifest

out, overwrite, way, where = Path(sys.argv[2]), sys.argv[3] == "True", sys.argv[4], sys.argv[5]

def point(name):
    if name == where:
        os.kill(os.getpid(), signal.SIGKILL)

points.reached = point
if way == "renames":
    disk.exchange = lambda one, other: False
print("ready", flush=True)
with writer.staged(out, overwrite=overwrite) as folder:
    for number in range(20):
        writer.write_text(folder / f"file-{number}", "x" * 5000)
    write_manifest(folder, facts={})
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill_old(out: Path) -> None:
    out.mkdir()
    for name, raw in OLD.items():
        (out / name).write_bytes(raw)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.arange(12, dtype=np.float32), "b": np.ones((2, 2))}, folder / "model.safetensors")
    return folder


def child_command(out: Path, *, overwrite: bool = False, way: str = "exchange", where: str = "") -> list[str]:
    return [sys.executable, "-c", CHILD, str(PACKAGE), str(out), str(overwrite), way, where]


# ---- killed


@pytest.mark.fault(24, 28)
@pytest.mark.parametrize("before", ["absent", "empty", "filled"])
@pytest.mark.parametrize("where", POINTS)
def test_sigkill_at_every_point(tmp_path: Path, source: Path, where: str, before: str) -> None:
    out, overwrite = tmp_path / "out", before == "filled"
    if before == "empty":
        out.mkdir()
    if overwrite:
        fill_old(out)
    source_before = contents(source)

    child = subprocess.run(child_command(out, overwrite=overwrite, where=where), capture_output=True, text=True)

    assert child.returncode == -signal.SIGKILL, child.stderr
    if where == "after-publish":
        verify_manifest(out)
    else:
        assert (contents(out) if out.exists() else None) == {"absent": None, "empty": {}, "filled": OLD}[before]
    assert contents(source) == source_before
    left = [p.name for p in tmp_path.iterdir() if p.name not in ("out", "source")]
    expected_left = overwrite if where == "after-publish" else True
    assert [name.startswith("out.partial-") for name in left] == [True] * expected_left

    rerun = subprocess.run(child_command(out, overwrite=True), capture_output=True, text=True)
    assert rerun.returncode == 0, rerun.stderr
    verify_manifest(out)
    assert len(contents(out)) == 21


@pytest.mark.fault(25, 28)
@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill_old(out)
    rng = np.random.default_rng(0)
    outcomes = {"old": 0, "new": 0}
    for _ in range(100):
        child = subprocess.Popen(child_command(out, overwrite=True), stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        child.kill()
        child.communicate()
        if contents(out) == OLD:
            outcomes["old"] += 1
        else:
            verify_manifest(out)
            outcomes["new"] += 1
            disk.remove(out)
            fill_old(out)
    assert min(outcomes.values()) > 0, f"the kills did not cover both sides of publishing: {outcomes}"


@pytest.mark.fault(28)
def test_kill_between_the_renames_leaves_the_old_result_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RENAME_EXCHANGE there is a moment without OUT; an error in it must bring the old one back."""
    out = tmp_path / "out"
    fill_old(out)
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    real = os.rename
    during: list[list[str]] = []

    def second_fails(old: Path, new: Path) -> None:
        if ".partial-" in str(old) and not out.exists():
            during.append(sorted(p.name.split("-")[0] for p in tmp_path.iterdir()))
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(disk.os, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as folder:
        write_text(folder / "new", "new")
    assert during == [["out.old", "out.partial"]]
    assert contents(out) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- exceptions


@pytest.mark.fault(32)
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        Interrupted("stopped", signal.SIGTERM),
        NumericalError("layer 3: NaN"),
        ValueError("a bug"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("filled", [False, True])
def test_any_exception_leaves_nothing_and_arrives_unchanged(
    tmp_path: Path, source: Path, error: BaseException, filled: bool
) -> None:
    out = tmp_path / "out"
    if filled:
        fill_old(out)
    source_before = contents(source)
    with pytest.raises(type(error)) as caught, staged(out, overwrite=filled) as folder:
        write_text(folder / "a", "1")
        raise error
    assert caught.value is error
    assert (contents(out) if filled else out.exists()) == (OLD if filled else False)
    assert contents(source) == source_before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out", "source"] if filled else ["source"])


def test_sigint_inside_the_block(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out") as folder:
        write_text(folder / "a", "1")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(27, 28)
@pytest.mark.parametrize("where", POINTS)
def test_interrupt_at_every_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    out = tmp_path / "out"
    fill_old(out)

    def interrupt(name: str) -> None:
        if name == where:
            raise KeyboardInterrupt

    monkeypatch.setattr(points, "reached", interrupt)
    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as folder:
        write_text(folder / "new", "new")
    assert contents(out) == ({"new": b"new"} if where == "after-publish" else OLD)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- disk

ADVICE = {
    errno.ENOSPC: "No space left on device (errno 28)",
    errno.EDQUOT: "quota on this disk is used up",
    errno.EFBIG: "`ulimit -f` allows no file this large",
    errno.EIO: "the disk or network mount reports a fault",
    errno.EROFS: "the disk is mounted read-only",
    errno.EACCES: "give yourself permission",
}


@pytest.mark.fault(36, 38, 40)
@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
@pytest.mark.parametrize("filled", [False, True])
def test_disk_errors_become_resource_errors(tmp_path: Path, number: int, filled: bool) -> None:
    out = tmp_path / "out"
    if filled:
        fill_old(out)
    with pytest.raises(ResourceError) as caught, staged(out, overwrite=filled) as folder:
        write_text(folder / "a", "x" * 1000)
        raise OSError(number, os.strerror(number), str(folder / "b"))
    message = str(caught.value)
    assert message.startswith(f"{folder / 'b'}: {os.strerror(number)} (errno {number})")
    assert f"after 0.00 GB (1,000 bytes) in {folder.name}, now removed" in message
    assert ADVICE[number] in message
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.exit_code == 4
    assert (contents(out) if filled else out.exists()) == (OLD if filled else False)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if filled else [])


@pytest.mark.fault(36)
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5])
def test_failing_fsync_is_fatal_and_never_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    calls = 0
    real = os.fsync

    def failing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    out = tmp_path / "out"
    # 1: write_text; 2, 3: the file, its folder; 4: the partial folder; 5: the parent, after the rename
    with pytest.raises(ResourceError, match=r"Input/output error \(errno 5\)"), staged(out) as folder:
        (folder / "sub").mkdir()
        write_text(folder / "sub" / "a", "1")
    assert calls == nth
    assert (contents(out) if out.exists() else None) == ({"sub/a": b"1"} if nth == 5 else None)
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if nth == 5 else [])


def test_folders_that_cannot_be_synced_are_tolerated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def no_folders(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    with staged(tmp_path / "out") as folder:
        write_text(folder / "a", "1")
    assert contents(tmp_path / "out") == {"a": b"1"}


def test_failing_rename_leaves_the_old_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(old: Path, new: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(old))

    monkeypatch.setattr(writer_module.os, "rename", fails)
    with pytest.raises(ResourceError, match="mounted read-only"), staged(tmp_path / "out") as folder:
        write_text(folder / "a", "1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(26)
def test_everything_is_synced_before_the_rename_and_the_parent_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power loss: a name must never become durable before what it names."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).split("-")[0])
        real_fsync(descriptor)

    def rename(old: Path, new: Path) -> None:
        events.append("RENAME")
        real_rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with staged(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("not synced by its writer")
        (folder / "b").write_text("nor this")
    assert events == ["a", "sub", "b", "out.partial", "RENAME", tmp_path.name.split("-")[0]]


def test_created_parents_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    preflight(tmp_path / "a" / "b" / "out", source=None, overwrite=False, bytes_needed=1)
    assert synced == [str(tmp_path / "a"), str(tmp_path)]


@pytest.mark.fault(38)
@pytest.mark.parametrize("writer", ["safetensors", "text"])
def test_a_real_limit_on_file_size(tmp_path: Path, writer: str) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            with staged(tmp_path / "out") as folder:
                if writer == "safetensors":
                    save_file({"a": np.zeros(10_000)}, folder / "m.safetensors")
                else:
                    write_text(folder / "a.txt", "x" * 10_000)
        except ResourceError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, encoding="utf-8") as told:
        said = told.read()
    assert "File too large (errno 27) after 0.00 GB (" in said
    assert "`ulimit -f` allows no file this large" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(36, 37)
def test_a_real_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs privileges that this machine does not give")
    try:
        with pytest.raises(ResourceError, match=r"No space left on device \(errno 28\)"):
            preflight(mount / "out", source=None, overwrite=False, bytes_needed=500_000)
            with staged(mount / "out") as folder:
                save_file({"a": np.zeros(1_000_000)}, folder / "m.safetensors")
        assert list(mount.iterdir()) == []
        with pytest.raises(ResourceError, match=r"needs 0.01 GB \(11,000,000 bytes\)"):
            preflight(mount / "out", source=None, overwrite=False, bytes_needed=10_000_000)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


# ---- permissions: the tests may run as root, for whom the kernel refuses nothing, so the refusal is injected


@pytest.mark.fault(39)
def test_preflight_refuses_a_parent_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ResourceError) as caught:
        preflight(tmp_path / "new" / "out", source=None, overwrite=False, bytes_needed=1)
    assert str(caught.value) == (f"{tmp_path}: cannot be written; give yourself permission or choose another --out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EACCES, "give yourself permission"), (errno.EROFS, "mounted read-only")]
)
def test_preflight_probes_what_access_does_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    """Root-squashed network mounts and quotas say yes to access() and no to mkdir()."""

    def refuse(path: Path, *rest: object, **more: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ResourceError, match=advice):
        target_module.create_partial(tmp_path / "out")
    with pytest.raises(ResourceError, match=rf"cannot be created: .*{advice}"):
        preflight(tmp_path / "new" / "out", source=None, overwrite=False, bytes_needed=1)


def test_an_old_result_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill_old(out)
    monkeypatch.setattr(disk.shutil, "rmtree", lambda path, ignore_errors: None)
    with TestCase().assertLogs("spectrim") as told, staged(out, overwrite=True) as folder:
        write_text(folder / "new", "new")
    assert contents(out) == {"new": b"new"}
    assert contents(folder) == OLD
    assert f"{folder}: is the replaced old result and could not be removed" in told.output[0]


@pytest.mark.fault(33, 21)
def test_two_runs_never_share_a_partial_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(["00000000", "00000000", "11111111"])
    monkeypatch.setattr(target_module.secrets, "token_hex", lambda count: next(names))
    with staged(tmp_path / "out") as first:
        with (
            pytest.raises(UsageError, match="appeared while this run was under way"),
            staged(tmp_path / "out") as second,
        ):
            assert (first.name, second.name) == ("out.partial-00000000", "out.partial-11111111")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "x").touch()
        assert first.is_dir()
        assert not second.exists()
        disk.remove(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- damaged input


def test_truncated_shards_are_refused_in_preflight(tmp_path: Path, source: Path) -> None:
    path = source / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    cuts = {
        "nothing": (0, 8),
        "inside the length": (5, 8),
        "after the length": (8, header_end),
        "inside the header": (header_end // 2, header_end),
        "header without its last byte": (header_end - 1, header_end),
        "header only": (header_end, len(whole)),
        "inside the data": (header_end + 40, len(whole)),
        "last byte": (len(whole) - 1, len(whole)),
    }
    for where, (kept, expected) in cuts.items():
        path.write_bytes(whole[:kept])
        with pytest.raises(InputError) as caught:
            open_checkpoint(source)
        assert str(caught.value) == (
            f"{path}: truncated: expected {expected} bytes, found {kept}; download it again"
        ), where
    path.write_bytes(whole)
    assert open_checkpoint(source).numel == 16


@pytest.mark.fault(40)
def test_read_errors_name_the_file(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_open(path: object, *rest: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files_module.os, "open", failing_open)
    with pytest.raises(InputError) as caught:
        read_header(source / "model.safetensors")
    assert str(caught.value) == (
        f"{source / 'model.safetensors'}: cannot be read: Input/output error (errno 5); "
        "the disk or network mount reports a fault; copy the folder elsewhere and check it"
    )


def test_unreadable_files_give_advice(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object, *rest: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files_module.os, "open", refused)
    with pytest.raises(InputError, match=r"Permission denied \(errno 13\); give yourself read permission"):
        open_checkpoint(source)


@pytest.mark.fault(40, 23)
def test_a_file_that_shrinks_while_being_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, real_stat = os.open, os.fstat

    def cut_after_open(path: object, *rest: int) -> int:
        descriptor = real(path, *rest)
        size = os.stat(path).st_size
        monkeypatch.setattr(files_module.os, "fstat", lambda fd: before.get(fd) or real_stat(fd))
        before[descriptor] = os.stat(path)
        os.truncate(path, size // 4)
        return descriptor

    before: dict[int, os.stat_result] = {}
    monkeypatch.setattr(files_module.os, "open", cut_after_open)
    with pytest.raises(InputError, match="changed while it was read"):
        read_header(source / "model.safetensors")


def test_canary_pickles_do_not_run(source: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    pickled = f"cos\nsystem\n(S'touch {canary}'\ntR.".encode()
    for name in ("pytorch_model.bin", "training_args.bin"):
        (source / name).write_bytes(pickled)
    assert open_checkpoint(source).numel == 16
    (source / "model.safetensors").write_bytes(pickled)
    with pytest.raises(InputError):
        open_checkpoint(source)
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match="They can run code, so spectrim never opens them"):
        open_checkpoint(source)
    assert not canary.exists()


@pytest.mark.fault(35)
def test_writing_never_changes_the_source(tmp_path: Path, source: Path) -> None:
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in source.iterdir()}
    with staged(tmp_path / "out") as folder:
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        write_manifest(folder, facts={})
    assert open_checkpoint(tmp_path / "out").numel == 16
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in source.iterdir()} == before
