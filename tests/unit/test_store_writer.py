"""Preflight, staged publishing and the manifest, when nothing fails on the way."""

# ruff: noqa: PT012 - what is tested is the block inside `staged`

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spectrim.errors import InputError, ResourceError, SpectrimError, UsageError
from spectrim.store import disk, points
from spectrim.store import target as target_module
from spectrim.store.manifest import verify_manifest, write_manifest
from spectrim.store.writer import preflight, staged, write_json, write_text


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def old_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"old": 1}')
    (folder / "only-old").write_text("old")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def refused(kind: type[SpectrimError], out: Path, **options: object) -> str:
    arguments: dict = {"source": None, "overwrite": False, "bytes_needed": 10, **options}
    with pytest.raises(kind) as caught:
        preflight(out, **arguments)
    return str(caught.value)


# ---- preflight


def test_preflight_leaves_nothing_and_creates_parents(tmp_path: Path, source: Path) -> None:
    preflight(tmp_path / "a" / "b" / "out", source=source, overwrite=False, bytes_needed=10)
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_preflight_accepts_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    preflight(tmp_path / "out", source=None, overwrite=False, bytes_needed=10)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(21)
def test_preflight_names_the_flag_for_what_exists(tmp_path: Path) -> None:
    out = old_model(tmp_path / "out")
    says = "choose another --out, or add --overwrite to replace it"
    assert refused(UsageError, out) == f"{out}: exists and holds 2 entries; {says}"
    (tmp_path / "file").write_text("x")
    assert refused(UsageError, tmp_path / "file") == (f"{tmp_path / 'file'}: exists and is not a folder; {says}")
    preflight(out, source=None, overwrite=True, bytes_needed=10)
    assert contents(out)["only-old"] == b"old"


def test_preflight_overwrites_models_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    message = refused(UsageError, home, overwrite=True)
    assert (
        "--overwrite replaces models only, and this folder of 1 entries has no manifest.json or config.json" in message
    )


def test_preflight_refuses_the_source_in_every_disguise(tmp_path: Path, source: Path) -> None:
    for out in (source, source / ".." / "source", Path(os.path.relpath(source))):
        assert "is the source model itself, which is never changed" in refused(
            UsageError, out, source=source, overwrite=True
        )
    assert f"lies inside the source model {source}" in refused(UsageError, source / "x" / "out", source=source)
    assert f"contains the source model {source}" in refused(UsageError, tmp_path, source=source, overwrite=True)


def test_preflight_compares_names_when_there_is_no_source_yet(tmp_path: Path) -> None:
    out = tmp_path / "gone"
    assert "is the source model itself" in refused(UsageError, out, source=tmp_path / "x" / ".." / "gone")


@pytest.mark.fault(20)
def test_preflight_sees_through_links_to_the_source(tmp_path: Path, source: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(source)
    assert "is the source model itself" in refused(UsageError, link, source=source, overwrite=True)
    assert "lies inside the source model" in refused(UsageError, link / "out", source=source)
    assert "is the source model itself" in refused(UsageError, source, source=link, overwrite=True)
    assert not (source / "out").exists()


def test_preflight_compares_by_inode_too(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a bind mount cannot be made without privileges: two names, one device and inode, no link between them
    other = tmp_path / "other"
    other.mkdir()
    real = os.stat
    monkeypatch.setattr(
        target_module.os, "stat", lambda path, **how: real(source if Path(path) == other else path, **how)
    )
    assert "is the source model itself" in refused(UsageError, other, source=source)
    assert "lies inside the source model" in refused(UsageError, other / "out", source=source)


@pytest.mark.fault(21)
def test_preflight_refuses_links_and_mount_points(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("target")
    assert refused(UsageError, link) == f"{link}: is a link to target; give the real path as --out"
    assert refused(UsageError, Path("/"), overwrite=True) == (
        "/: is a mount point, which cannot be replaced; use a folder in it: --out /model"
    )


def test_preflight_says_needed_and_free(tmp_path: Path) -> None:
    message = refused(ResourceError, tmp_path / "out", bytes_needed=10**18)
    assert f"{tmp_path / 'out'}: needs 1100000000.00 GB (1,100,000,000,000,000,000 bytes) on this disk" in message
    assert "GB (" in message.split("on this disk, ")[1]
    assert "free; free some space or choose another --out" in message


def test_preflight_asks_for_a_tenth_more_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1099

    monkeypatch.setattr(target_module.shutil, "disk_usage", lambda path: Usage)
    assert "needs 0.00 GB (1,100 bytes) on this disk, 0.00 GB (1,099 bytes) are free" in (
        refused(ResourceError, tmp_path / "new" / "out", bytes_needed=1000)
    )
    assert not (tmp_path / "new").exists()
    Usage.free = 1100
    preflight(tmp_path / "new" / "out", source=None, overwrite=False, bytes_needed=1000)


def test_preflight_refuses_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert f"{tmp_path / 'file'}: is not a folder, so nothing can be written in it" in (
        refused(ResourceError, tmp_path / "file" / "a" / "out")
    )


@pytest.mark.fault(22)
def test_preflight_refuses_names_too_long_for_the_partial_folder(tmp_path: Path) -> None:
    message = refused(ResourceError, tmp_path / ("x" * 250))
    assert message.endswith("cannot be created: File name too long; use a shorter --out")


@pytest.mark.fault(22)
def test_preflight_works_with_odd_names(tmp_path: Path) -> None:
    out = tmp_path / "mit Leerzeichen ü 重"
    preflight(out, source=None, overwrite=False, bytes_needed=10)
    with staged(out) as folder:
        write_text(folder / "a", "1")
    assert contents(out) == {"a": b"1"}


# ---- staged


def test_staged_publishes_everything_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as folder:
        assert folder.parent == tmp_path
        assert folder.name.startswith("out.partial-")
        assert len(folder.name) == len("out.partial-") + 8
        write_json(folder / "config.json", {"ü": [1, None]})
        (folder / "sub").mkdir()
        write_text(folder / "sub" / "a.txt", "x\r\ny\n")
        assert not out.exists()
    assert contents(out) == {
        "config.json": '{\n  "ü": [\n    1,\n    null\n  ]\n}\n'.encode(),
        "sub/a.txt": b"x\r\ny\n",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_staged_uses_an_empty_folder_and_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    with staged(Path("out")) as folder:
        write_text(folder / "a", "1")
        monkeypatch.chdir("/")  # the result must not depend on where a library leaves us
    assert contents(tmp_path / "out") == {"a": b"1"}


def test_staged_refuses_what_exists_before_any_work(tmp_path: Path) -> None:
    out = old_model(tmp_path / "out")
    with pytest.raises(UsageError, match=r"exists and holds 2 entries.*--overwrite"), staged(out):
        raise AssertionError("the block must not start")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_overwrite_replaces_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "renames":
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    out = old_model(tmp_path / "out")
    with staged(out, overwrite=True) as folder:
        write_text(folder / "new", "new")
        assert contents(out)["only-old"] == b"old"
    assert contents(out) == {"new": b"new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_replaces_a_file_and_an_absent_name(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("file")
    for name in ("out", "absent"):
        with staged(tmp_path / name, overwrite=True) as folder:
            write_text(folder / "a", "1")
        assert contents(tmp_path / name) == {"a": b"1"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["absent", "out"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="Linux only")
def test_exchange_is_one_atomic_step_here(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    if not disk.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this filesystem has no RENAME_EXCHANGE")
    assert (tmp_path / "b" / "x").exists()
    assert not (tmp_path / "a" / "x").exists()
    with pytest.raises(FileNotFoundError):
        disk.exchange(tmp_path / "gone", tmp_path / "b")


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared while this run was under way"), staged(out) as folder:
        write_text(folder / "new", "new")
        old_model(out)
    assert contents(out) == {"config.json": b'{"old": 1}', "only-old": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def umask() -> Iterator[object]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.fault(42)
@pytest.mark.parametrize(("mask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(
    tmp_path: Path, umask: object, mask: int, file_mode: int, folder_mode: int
) -> None:
    umask(mask)
    with staged(tmp_path / "out") as folder:
        save_file({"a": np.ones(3)}, folder / "model.safetensors")  # safetensors 0.8 leaves 0600
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "a").touch(mode=0o777)
    out = tmp_path / "out"
    modes = {p.relative_to(tmp_path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in [out, *out.rglob("*")]}
    assert modes == {
        "out": folder_mode,
        "out/model.safetensors": file_mode,
        "out/sub": folder_mode,
        "out/sub/a": file_mode,
    }
    assert load_file(out / "model.safetensors")["a"].tolist() == [1, 1, 1]


def test_links_in_a_result_are_a_bug_of_ours(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"bug: .*results hold no links"),
        staged(tmp_path / "out") as folder,
    ):
        (folder / "link").symlink_to("/etc/passwd")
    assert list(tmp_path.iterdir()) == []


def test_points_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(points, "reached", lambda name: seen.append((name, (tmp_path / "out").exists())))
    with staged(tmp_path / "out"):
        pass
    before = ("staged", "before-seal", "before-publish")
    after = ("renamed", "after-publish", "replaced-removed")
    assert seen == [*((name, False) for name in before), *((name, True) for name in after)]


def test_write_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.json: Out of range float values"):
        write_json(tmp_path / "a.json", {"perplexity": float("nan")})
    assert not (tmp_path / "a.json").exists()


# ---- manifest


@pytest.fixture
def published(tmp_path: Path) -> Path:
    with staged(tmp_path / "out") as folder:
        save_file({"a": np.ones(3)}, folder / "model.safetensors")
        write_text(folder / "README.md", "hello\n")
        (folder / "sub").mkdir()
        write_text(folder / "sub" / "b", "")
        write_manifest(folder, facts={"method": "soco", "seed": 3})
    return tmp_path / "out"


def test_manifest_holds_facts_sizes_and_sha256(published: Path) -> None:
    manifest = json.loads((published / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["method"], manifest["seed"]) == (1, "soco", 3)
    assert list(manifest["files"]) == ["README.md", "model.safetensors", "sub/b"]
    assert manifest["files"]["README.md"] == {
        "bytes": 6,
        "sha256": "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03",
    }
    verify_manifest(published)


def differences(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        verify_manifest(folder)
    return str(caught.value)


@pytest.mark.fault(10)
def test_one_flipped_bit_is_found(published: Path) -> None:
    path = published / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert "changed: 'model.safetensors': same size, other sha256" in differences(published)


@pytest.mark.fault(10)
def test_every_kind_of_difference_is_listed(published: Path) -> None:
    (published / "README.md").write_text("edited by hand\n")
    (published / "model.safetensors").unlink()
    (published / "notes\x1b.txt").write_text("x")
    os.mkfifo(published / "pipe")
    (published / "sub" / "b").unlink()
    (published / "sub" / "b").symlink_to("/etc/passwd")
    (published / "more").symlink_to("/etc")
    message = differences(published)
    assert "6 differences from manifest.json" in message
    assert "missing: 'model.safetensors'" in message
    assert "changed: 'README.md': 6 bytes recorded, 15 found" in message
    assert "extra: 'notes\\x1b.txt'" in message
    assert "extra: 'more'" in message
    assert "extra: 'pipe'" in message
    assert message.endswith("and 1 more")


def test_recorded_file_replaced_by_a_link_out_is_unreadable(published: Path) -> None:
    (published / "sub" / "b").unlink()
    (published / "sub" / "b").symlink_to("/etc/passwd")
    assert "is a link to /etc/passwd, outside of the model folder" in differences(published)


def test_manifest_that_is_a_link_out_is_refused(published: Path, tmp_path: Path) -> None:
    (published / "manifest.json").rename(tmp_path / "elsewhere.json")
    (published / "manifest.json").symlink_to("../elsewhere.json")
    assert f"manifest.json: is a link to {tmp_path / 'elsewhere.json'}, outside" in differences(published)


def test_bookkeeping_of_git_and_the_hub_is_no_difference(published: Path) -> None:
    (published / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (published / ".cache" / "huggingface").mkdir(parents=True)
    (published / ".cache" / "huggingface" / "x.metadata").write_text("x")
    verify_manifest(published)


def test_manifest_survives_the_hub_cache_layout(published: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "sub").mkdir()
    for number, path in enumerate(p for p in sorted(published.rglob("*")) if p.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.relative_to(published)).symlink_to(blobs / str(number))
    verify_manifest(snapshot)


@pytest.mark.fault(9, 70)
@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, "has no manifest.json; only folders that spectrim wrote can be verified"),
        ({"format_version": 2, "files": {}}, "format_version '2', this spectrim reads 1"),
        ({"format_version": True, "files": {}}, "format_version 'True', this spectrim reads 1"),
        ({"files": {}}, "format_version 'None', this spectrim reads 1"),
        ({"format_version": 1, "files": []}, "files must map names to sizes and checksums"),
        ({"format_version": 1, "files": {"README.md": 5}}, "no size and sha256 recorded: 'README.md'"),
        ({"format_version": 1, "files": {"../../etc/passwd": {}}}, "missing: '../../etc/passwd'"),
    ],
)
def test_bad_manifests(published: Path, manifest: object, says: str) -> None:
    (published / "manifest.json").unlink()
    if manifest is not None:
        (published / "manifest.json").write_text(json.dumps(manifest))
    assert says in differences(published)


def test_facts_must_not_hide_the_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"own keys \['files'\]"):
        write_manifest(tmp_path, facts={"files": {}})
