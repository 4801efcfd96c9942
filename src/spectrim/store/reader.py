"""A model folder from strangers: opened, recognised or explained, and checked, by reading headers only.

`open_checkpoint` holds the promise that later stages rely on: every tensor of the index is in exactly the
shard that the index names, every byte range lies inside its file, and no path or link leaves the folder.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.store.files import check_stays_inside, foreign_kind, listed, open_regular, shown
from spectrim.store.header import TensorInfo, check_name, read_header
from spectrim.store.limits import JSON_BYTES_MAX, SHARDS_MAX, TENSORS_MAX
from spectrim.store.strict_json import read_json

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "check_shapes",
    "count_stored",
    "open_checkpoint",
    "read_header",
    "read_json",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
_NUMBERED_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")

# What the folder holds instead of weights that we read, by how the names end.
_OTHER_WEIGHTS = (
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "only pickled weights ({names}). They can run code, so spectrim never opens them. If you trust the "
        "file, load the model yourself and write safetensors with `model.save_pretrained(folder)`",
    ),
    ((".gguf",), "a GGUF model ({names}); use the safetensors folder that it was converted from"),
    ((".onnx",), "an ONNX model ({names}); use the safetensors folder that it was exported from"),
    (
        (".h5", ".msgpack", ".pb", ".tflite"),
        "TensorFlow or Flax weights ({names}); use the safetensors of the model",
    ),
    (("adapter_model.safetensors",), "an adapter ({names}); merge it into its base model first"),
    ((".safetensors",), f"safetensors under other names ({{names}}); {SINGLE} or {INDEX} must be there"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checked model folder: its parsed config and where every tensor lies. No weight has been read."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    shards: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def numel(self) -> int:
        """Numbers in all tensors, as stored."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def has_remote_code(self) -> bool:
        """Whether config.json asks to run Python that came with the model."""
        return "auto_map" in self.config


def open_checkpoint(folder: Path) -> Checkpoint:
    """The model in `folder`, every header read and checked, or an `InputError` that says what is wrong."""
    folder = Path(folder)
    names = _names_in(folder)
    if ADAPTER in names:
        raise InputError(
            f"{folder}: carries an adapter ({ADAPTER}), which would take another model's place when it is loaded; "
            "merge it into its base model first"
        )
    shard_of = _index(folder) if _is_sharded(folder, names) else None
    config = _config(folder)
    if shard_of is None:
        shards = (folder / SINGLE,)
        check_stays_inside(shards[0], folder)
        tensors = read_header(shards[0])
        if not tensors:
            raise InputError(f"{shards[0]}: holds no tensors; download it again")
    else:
        _check_shard_files(folder, set(shard_of.values()), names)
        shards = tuple(folder / name for name in sorted(set(shard_of.values())))
        tensors = _tensors_of(shards, shard_of, folder / INDEX)
    return Checkpoint(folder=folder, config=config, tensors=tensors, shards=shards)


def _names_in(folder: Path) -> set[str]:
    try:
        if not folder.exists():
            raise InputError(f"{folder}: {_why_missing(folder)}")
        if not folder.is_dir():
            raise InputError(f"{folder}: {_why_not_folder(folder)}")
        names = set(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be listed: {error}; check the path and its permissions") from error
    if not names:
        raise InputError(f"{folder}: is empty; a model folder has {CONFIG} and {SINGLE} (or {INDEX})")
    return names


def _why_missing(folder: Path) -> str:
    text = folder.as_posix()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return f"no such folder; if this is a name on the Hub, first run: hf download {text} --local-dir DIR"
    return "no such folder; check the path"


def _why_not_folder(path: Path) -> str:
    with open_regular(path) as (file, _):
        kind = foreign_kind(file.read(40))
    if kind:
        return f"is {kind}"
    return f"is a file, not a folder; give the folder of {CONFIG} and the weights (perhaps {path.parent})"


def _is_sharded(folder: Path, names: set[str]) -> bool:
    if INDEX in names and SINGLE in names:
        if set(_index(folder).values()) == {SINGLE}:
            return True
        raise InputError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    if INDEX not in names and SINGLE not in names:
        raise InputError(f"{folder}: {_why_no_weights(names)}")
    return INDEX in names


def _why_no_weights(names: set[str]) -> str:
    for endings, text in _OTHER_WEIGHTS:
        found = sorted(name for name in names if name.endswith(endings))
        if found:
            more = ", ..." if len(found) > 3 else ""
            return "holds " + text.format(names=", ".join(map(shown, found[:3])) + more)
    return f"holds no weights; expected {SINGLE} or {INDEX}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise InputError(f"{folder}: {CONFIG} is missing; download it again beside the weights")
    check_stays_inside(path, folder)
    config = read_json(path, limit_bytes=JSON_BYTES_MAX)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(f"{path}: model_type must be the name of an architecture, found {shown(str(model_type))}")
    return config


def _index(folder: Path) -> dict[str, str]:
    """tensor name -> shard name, every entry checked before any shard is looked at."""
    path = folder / INDEX
    check_stays_inside(path, folder)
    weight_map = read_json(path, limit_bytes=JSON_BYTES_MAX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map must map tensor names to shards; download it again")
    if len(weight_map) > TENSORS_MAX:
        raise InputError(f"{path}: {len(weight_map):,} tensors, allowed {TENSORS_MAX:,}")
    for name, shard in weight_map.items():
        check_name(str(path), name)
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise InputError(
                f"{path}: tensor {shown(name)}: shard {shown(str(shard))} must be a plain file name "
                "(letters, digits, . _ -) that ends in .safetensors; no shard was opened, download it again"
            )
    num_shards = len(set(weight_map.values()))
    if num_shards > SHARDS_MAX:
        raise InputError(f"{path}: {num_shards:,} shards, allowed {SHARDS_MAX:,}")
    return weight_map


def _check_shard_files(folder: Path, indexed: set[str], names: set[str]) -> None:
    missing = sorted(indexed - names)
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(indexed)} shards in {INDEX} are missing; download them again:"
            + listed(missing)
        )
    # Other safetensors may lie beside (consolidated.safetensors); numbered shards belong to an index.
    strays = sorted(name for name in names - indexed if _NUMBERED_SHARD.fullmatch(name))
    if strays:
        raise InputError(
            f"{folder}: {len(strays)} shards are not named by {INDEX} (two downloads mixed?); remove them or "
            "download the folder again:" + listed(strays)
        )
    for name in sorted(indexed):
        check_stays_inside(folder / name, folder)


def _tensors_of(shards: tuple[Path, ...], shard_of: dict[str, str], index: Path) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for shard in shards:
        for name, info in read_header(shard).items():
            if name in tensors:
                problems.append(f"tensor {shown(name)}: in {tensors[name].file.name} and again in {shard.name}")
            elif name not in shard_of:
                problems.append(f"tensor {shown(name)}: in {shard.name}, not in {index.name}")
            elif shard_of[name] != shard.name:
                problems.append(f"tensor {shown(name)}: {index.name} says {shard_of[name]}, found in {shard.name}")
            tensors.setdefault(name, info)
    problems += [
        f"tensor {shown(name)}: {index.name} says {shard}, found in no shard"
        for name, shard in shard_of.items()
        if name not in tensors
    ]
    if problems:
        raise InputError(f"{index}: index and shards disagree; download the folder again:" + listed(problems))
    return tensors


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], *, tied: frozenset[str]) -> list[str]:
    """Names in the files beyond `expected`; `InputError` if a shape differs or an untied name is missing."""
    problems: list[str] = []
    for name, shape in expected.items():
        info = checkpoint.tensors.get(name)
        if info is None and name not in tied:
            problems.append(f"{shown(name)}: expected {tuple(shape)}, not in the files")
        elif info is not None and info.shape != tuple(shape):
            problems.append(f"{shown(name)}: expected {tuple(shape)}, found {info.shape} in {info.file.name}")
    if problems:
        raise InputError(
            f"{checkpoint.folder}: {CONFIG} and the weights disagree on {len(problems)} of {len(expected)} "
            f"tensors; use the {CONFIG} that belongs to these weights:" + listed(problems)
        )
    return sorted(checkpoint.tensors.keys() - expected.keys())


def count_stored(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """(numbers, bytes) of every tensor as it lies in the files: what a report may call stored."""
    return {name: (info.numel, info.nbytes) for name, info in checkpoint.tensors.items()}
