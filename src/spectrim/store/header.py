"""The header of a safetensors file, validated here before any other reader sees the file.

The format: 8 bytes little-endian length, that many bytes of JSON, then the data. Every tensor states dtype,
shape and byte range; the ranges must cover the data exactly: no hole, overlap or surplus, so that the file
can be nothing else at the same time.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.store.files import foreign_kind, open_regular, shown
from spectrim.store.limits import ELEMENTS_MAX, HEADER_BYTES_MAX, RANK_MAX, TENSOR_NAME_BYTES_MAX, TENSORS_MAX
from spectrim.store.strict_json import parse_object

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_PREFIX_BYTES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes of `file` from the absolute offset `start`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name, in data order; `InputError` if anything is off."""
    return read_header_and_metadata(path)[1]


def read_header_and_metadata(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The header's free text as well."""
    path = Path(path)
    raw, size = _read_raw_header(path)
    entries = parse_object(raw, where=f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    _check_metadata(path, metadata)
    if len(entries) > TENSORS_MAX:
        raise InputError(f"{path}: {len(entries):,} tensors, allowed {TENSORS_MAX:,}")
    data_start = _PREFIX_BYTES + len(raw)
    infos = [_tensor_info(path, name, entry, data_start) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.start, info.nbytes))
    _check_cover(path, infos, data_start=data_start, size=size)
    return metadata, {info.name: info for info in infos}


def _read_raw_header(path: Path) -> tuple[bytes, int]:
    with open_regular(path) as (file, size):
        head = file.read(_PREFIX_BYTES)
        if len(head) < _PREFIX_BYTES:
            raise _truncated(path, expected=_PREFIX_BYTES, found=size)
        length = int.from_bytes(head, "little")
        if length > HEADER_BYTES_MAX:
            # Only here: a valid file's length can never look like another format's magic.
            foreign = foreign_kind(head + file.read(32))
            raise InputError(f"{path}: is {foreign}" if foreign else _over_long(path, length, size))
        if _PREFIX_BYTES + length > size:
            raise _truncated(path, expected=_PREFIX_BYTES + length, found=size)
        raw = file.read(length)
    if len(raw) != length:
        raise InputError(f"{path}: changed while it was read; run again")
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: header: starts with {raw[:8]!r}, not with '{{'; download it again")
    if raw.count(b"{") > TENSORS_MAX + 2:  # before parsing; +2 for the outer object and __metadata__
        raise InputError(f"{path}: header: more than the {TENSORS_MAX:,} tensors that are allowed")
    return raw, size


def _over_long(path: Path, length: int, size: int) -> str:
    return (
        f"{path}: header length {length:,} bytes, allowed {HEADER_BYTES_MAX:,}, file has {size:,}; "
        "not a safetensors file, or damaged: download it again"
    )


def _truncated(path: Path, *, expected: int, found: int) -> InputError:
    return InputError(f"{path}: truncated: expected {expected} bytes, found {found}; download it again")


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: header: __metadata__ must map text to text; download it again")


def check_name(where: str, name: str) -> None:
    """Refuses tensor names that are empty, over-long or would play tricks on a terminal."""
    try:
        num_bytes = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: tensor name {shown(name)} is not valid text") from error
    if not 0 < num_bytes <= TENSOR_NAME_BYTES_MAX:
        raise InputError(
            f"{where}: tensor name {shown(name)} has {num_bytes:,} bytes, "
            f"allowed 1 to {TENSOR_NAME_BYTES_MAX}; rename it"
        )
    if not name.isprintable():
        raise InputError(f"{where}: tensor name {shown(name)} has characters that cannot be printed; rename it")


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    check_name(f"{path}: header", name)
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise InputError(f"{where}: must have exactly the fields {', '.join(sorted(_FIELDS))}; download it again")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise InputError(f"{where}: unknown dtype {shown(str(dtype))}; supported: {', '.join(sorted(DTYPE_BITS))}")
    begin, end = _byte_range(where, entry["data_offsets"])
    nbytes = _expected_bytes(where, dtype, _checked_shape(where, shape))
    if end - begin != nbytes:
        raise InputError(
            f"{where}: {dtype} of shape {shape} needs {nbytes} bytes, data_offsets [{begin}, {end}] give "
            f"{end - begin}; download it again"
        )
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=path, start=data_start + begin, nbytes=nbytes)


def _whole_numbers(value: Any) -> bool:
    # bool is an int in Python, 2.0 is not in JSON
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= ELEMENTS_MAX for item in value)


def _checked_shape(where: str, shape: Any) -> list[int]:
    if not _whole_numbers(shape):
        raise InputError(f"{where}: shape {shown(str(shape))} must be a list of whole numbers from 0 to 2^63-1")
    if len(shape) > RANK_MAX:
        raise InputError(f"{where}: {len(shape)} dimensions, allowed {RANK_MAX}")
    # A zero must not hide an overflow: readers multiply from left to right.
    if math.prod(max(size, 1) for size in shape) > ELEMENTS_MAX:
        raise InputError(f"{where}: shape {shape} has more than 2^63-1 numbers (overflow); download it again")
    return shape


def _byte_range(where: str, offsets: Any) -> tuple[int, int]:
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(
            f"{where}: data_offsets {shown(str(offsets))} must be [begin, end] with 0 <= begin <= end; "
            "download it again"
        )
    return offsets[0], offsets[1]


def _expected_bytes(where: str, dtype: str, shape: list[int]) -> int:
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise InputError(f"{where}: {dtype} of shape {shape} is {bits} bits, not a whole number of bytes")
    return bits // 8


def _check_cover(path: Path, infos: list[TensorInfo], *, data_start: int, size: int) -> None:
    position, before = data_start, "the header"
    for info in infos:
        if info.start != position:
            problem = "a hole" if info.start > position else "an overlap"
            raise InputError(
                f"{path}: {problem} of {abs(info.start - position)} bytes between {before} and tensor "
                f"{shown(info.name)}; download it again"
            )
        position, before = info.start + info.nbytes, f"tensor {shown(info.name)}"
    if position > size:
        raise _truncated(path, expected=position, found=size)
    if position < size:
        raise InputError(
            f"{path}: {size - position} surplus bytes after {before}: "
            f"expected {position} bytes, found {size}; download it again"
        )
