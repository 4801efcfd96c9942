"""Tensors that go from a stranger's files into a result as they are: those that the model has no place for.

Copied as bytes, whatever their dtype, in a shard of their own behind the others.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from spectrim.errors import InputError
from spectrim.store.companions import CHUNK_BYTES
from spectrim.store.files import open_regular, shown
from spectrim.store.header import TensorInfo, read_header
from spectrim.store.reader import INDEX, SINGLE
from spectrim.store.strict_json import read_json
from spectrim.store.writer import write_json

_NUMBERED = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def add_shard(folder: Path, extra: Mapping[str, TensorInfo]) -> None:
    """Adds `extra` to the model in `folder`, which has none of these names, as one more shard of its index."""
    if not extra:
        return
    before = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(before) + 1
    weight_map: dict[str, str] = {}
    for number, name in enumerate(before, 1):
        assert name == SINGLE or _NUMBERED.fullmatch(name), f"{name}: transformers writes other names now"
        fresh = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.rename(folder / name, folder / fresh)
        weight_map |= dict.fromkeys(read_header(folder / fresh), fresh)
    assert not weight_map.keys() & extra.keys(), "a tensor that the model has is no extra one"
    last = f"model-{count:05d}-of-{count:05d}.safetensors"
    copy_tensors(folder / last, extra)
    weight_map |= dict.fromkeys(extra, last)
    written = [info for name in sorted(set(weight_map.values())) for info in read_header(folder / name).values()]
    facts = {"total_parameters": sum(i.numel for i in written), "total_size": sum(i.nbytes for i in written)}
    if (folder / INDEX).exists():
        facts = {**read_json(folder / INDEX).get("metadata", {}), **facts}
    write_json(folder / INDEX, {"metadata": facts, "weight_map": dict(sorted(weight_map.items()))})


def copy_tensors(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """A safetensors file of tensors of other files, byte for byte; memory is that of one piece."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as copy:
        copy.write(len(header).to_bytes(8, "little") + header)
        for name, info in tensors.items():
            with open_regular(info.file) as (source, _):
                source.seek(info.start)
                left = info.nbytes
                while left and (part := source.read(min(left, CHUNK_BYTES))):
                    copy.write(part)
                    left -= len(part)
                if left:
                    raise InputError(f"{info.file}: tensor {shown(name)}: the file became shorter; run again")
