"""manifest.json: size and sha256 of every other file in a result, and the facts of the run that made it."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.store.files import check_stays_inside, listed, open_regular, shown
from spectrim.store.strict_json import read_json
from spectrim.store.writer import write_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

# Put there by git and the Hub's upload and download, read by no loader. Not counted as extra.
_BOOKKEEPING = {".git", ".gitattributes", ".cache"}


def write_manifest(folder: Path, *, facts: Mapping[str, Any]) -> None:
    """Writes manifest.json over all files that are in `folder` now. Call it last, before publishing."""
    reserved = {"format_version", "files"} & facts.keys()
    if reserved:
        raise ValueError(f"facts must not use the manifest's own keys {sorted(reserved)}")
    folder = Path(folder)
    files = {name: measure_file(folder / name, folder) for name in _names_under(folder)}
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **facts, "files": files})


def verify_manifest(folder: Path) -> None:
    """Passes when `folder` holds exactly the published files, byte for byte; else lists what differs."""
    problems = differences(folder)
    if problems:
        raise InputError(
            f"{folder}: {len(problems)} differences from {MANIFEST}; "
            "copy or download the folder again, or make the model anew:" + listed(problems)
        )


def differences(folder: Path) -> list[str]:
    """All in which `folder` differs from its manifest; `InputError` if there is none that can be read."""
    folder = Path(folder)
    recorded = _recorded_files(folder)
    # Recorded names are only looked up among the names that are there, never used as paths.
    present = _names_under(folder)
    problems = [f"missing: {shown(name)}" for name in sorted(recorded.keys() - set(present))]
    for name in present:
        if name in recorded:
            problems += _differences(folder, name, recorded[name])
        elif name.split("/")[0] not in _BOOKKEEPING:
            problems.append(f"extra: {shown(name)}")
    return problems


def _names_under(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, with slashes, in one order on every system."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {error.strerror}; check its permissions") from error

    names: list[str] = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        # a link to a folder is reported like a file, and refused when it is measured
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        names += [Path(where, name).relative_to(folder).as_posix() for name in files + links]
    return sorted(name for name in names if name != MANIFEST)


def measure_file(path: Path, folder: Path) -> dict[str, Any]:
    """Size and sha256 of a file in `folder`; links that lead out of it are refused."""
    check_stays_inside(path, folder)
    with open_regular(path) as (file, size):
        return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _recorded_files(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise InputError(f"{folder}: has no {MANIFEST}; only folders that spectrim wrote can be verified")
    check_stays_inside(path, folder)
    manifest = read_json(path)
    version, files = manifest.get("format_version"), manifest.get("files")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {shown(str(version))}, this spectrim reads {FORMAT_VERSION}; "
            "use the spectrim version that wrote it"
        )
    if not isinstance(files, dict):
        raise InputError(f"{path}: files must map names to sizes and checksums; download it again")
    return files


def _differences(folder: Path, name: str, recorded: Any) -> list[str]:
    try:
        found = measure_file(folder / name, folder)
    except InputError as error:
        return [f"unreadable: {error}"]
    if not isinstance(recorded, dict) or recorded.keys() != found.keys() or type(recorded["bytes"]) is not int:
        return [f"no size and sha256 recorded: {shown(name)}"]
    if recorded["bytes"] != found["bytes"]:
        return [f"changed: {shown(name)}: {recorded['bytes']} bytes recorded, {found['bytes']} found"]
    if recorded["sha256"] != found["sha256"]:
        return [f"changed: {shown(name)}: same size, other sha256"]
    return []
