"""Tensors of a checked safetensors file by plain reads: a mapped file that shrinks ends the process (SIGBUS)."""

import math
from io import BufferedReader

import torch
from torch import Tensor

from spectrim.errors import InputError
from spectrim.store.files import open_regular, read_fully, shown
from spectrim.store.header import TensorInfo

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_tensor(info: TensorInfo, rows: int | None = None) -> Tensor:
    """A tensor, or its first `rows`, on the CPU; `InputError` that names file and tensor if it cannot be read."""
    with open_regular(info.file) as (file, _):
        return read_from(file, info, rows)


def read_from(file: BufferedReader, info: TensorInfo, rows: int | None = None) -> Tensor:
    """The same from the open file."""
    if info.dtype not in DTYPES:
        raise InputError(f"{info.file}: tensor {shown(info.name)}: is {info.dtype}; known: {', '.join(DTYPES)}")
    shape = info.shape if rows is None else (min(rows, info.shape[0]), *info.shape[1:])
    dtype = DTYPES[info.dtype]
    raw = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    file.seek(info.start)
    if read_fully(file, raw.numpy().data) != len(raw):
        raise InputError(
            f"{info.file}: tensor {shown(info.name)}: the file became shorter while it was read; let nothing write to "
            "it and run again"
        )
    return raw.view(dtype).view(shape)
