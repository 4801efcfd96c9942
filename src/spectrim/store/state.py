"""One saved moment of a training run, in one safetensors file that is old, new or absent, never half.

The header's metadata holds the step, the facts (JSON) and a sha256 over step, facts, names, dtypes, shapes and values.
What is read is what was saved, bit for bit, or it is refused: a scratch folder is as untrusted as any other.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from spectrim.errors import InputError
from spectrim.store import disk
from spectrim.store.files import check_stays_inside, open_regular, shown
from spectrim.store.header import read_header_and_metadata
from spectrim.store.points import point
from spectrim.store.strict_json import parse_object
from spectrim.store.tensors import read_from

FORMAT = "spectrim-state-1"


def write_state(path: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replaces `path` in one step. `ResourceError` if the disk fails; the older state is then untouched."""
    ours = apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps(facts, allow_nan=False)
    metadata = {"format": FORMAT, "step": str(step), "facts": text, "sha256": digest(step, text, ours)}
    fresh = path.with_name(f"{path.name}.new")
    try:
        save_file(ours, fresh, metadata=metadata)
        point("state-written")
        disk.fsync_file(fresh)
        point("state-synced")
        os.replace(fresh, path)
        point("state-renamed")
        disk.fsync_folder(path.parent)
        point("state-saved")
    except (OSError, SafetensorError) as error:
        disk.remove(fresh)
        if disk.system_errno(error) is None:
            raise
        raise disk.as_resource_error(error, path) from error


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values without shared memory, which safetensors refuses: layers that read one input have one mean."""
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return found


def read_state(path: Path) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
    """Step, tensors (on the CPU) and facts; `InputError` if anything differs from what was saved."""
    check_stays_inside(path, path.parent)
    metadata, infos = read_header_and_metadata(path)
    with open_regular(path) as (file, _):
        tensors = {name: read_from(file, info) for name, info in infos.items()}
    if metadata.get("format") != FORMAT or not {"step", "facts", "sha256"} <= metadata.keys():
        raise InputError(f"{path}: is not a {FORMAT} file (its header says {shown(str(metadata.get('format')))})")
    step, text = metadata["step"], metadata["facts"]
    found = digest(int(step), text, tensors) if step.isdecimal() and len(step) < 17 else "an impossible step"
    if found != metadata["sha256"]:
        raise InputError(
            f"{path}: damaged or edited: sha256 {shown(metadata['sha256'][:12])} recorded, {found[:12]} found"
        )
    return int(step), tensors, parse_object(text.encode(), where=f"{path}: facts")


def read_step(path: Path) -> tuple[str, int]:
    """Stage (from the file's name) and step of a state, from its header alone; -1 where that cannot be read."""
    check_stays_inside(path, path.parent)
    step = ""
    with contextlib.suppress(InputError):
        step = read_header_and_metadata(path)[0].get("step", "")
    return path.stem.replace("-", " "), int(step) if step.isdecimal() and len(step) < 17 else -1


def digest(step: int, facts: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over all that a state is; the tensors are contiguous and on the CPU."""
    sha = hashlib.sha256(f"{step}\0{len(facts)}\0{facts}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
