"""Strict JSON, safetensors headers and model folders: what is accepted, and what every refusal says."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as safetensors_deserialize
from safetensors.numpy import save_file

from spectrim.errors import InputError
from spectrim.store import files as files_module
from spectrim.store import header as header_module
from spectrim.store import strict_json as json_module
from spectrim.store.limits import HEADER_BYTES_MAX
from spectrim.store.reader import check_shapes, count_stored, open_checkpoint, read_header, read_json

CONFIG = {"model_type": "llama", "hidden_size": 4}
TINY = Path(files_module.__file__).parents[1] / "assets" / "tiny"


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(raw)
    return path


def write_model(folder: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({k: np.zeros(s, np.float32) for k, s in tensors.items()}, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, tuple[int, ...]]], weight_map: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for shard, tensors in shards.items():
        save_file({k: np.zeros(s, np.float32) for k, s in tensors.items()}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(action: object, *arguments: object, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments, **options)
    return str(caught.value)


# ---- read_json


def test_read_json_returns_the_object(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"a": [1, 2.5, null, true], "\\u00e9": "\\ud83d\\ude00", "n": -3}')
    assert read_json(path, limit_bytes=1000) == {"a": [1, 2.5, None, True], "é": "😀", "n": -3}


@pytest.mark.fault(9)
def test_integers_of_tokenizer_configs_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"model_max_length": 1000000000000000019884624838656}')
    assert read_json(path, limit_bytes=1000)["model_max_length"] == int(1e30)


BAD_JSON = {
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested 100,001 deep, allowed 64"),
    "deep objects": (b'{"a":' * 70 + b"1" + b"}" * 70, "nested 70 deep, allowed 64"),
    "depth hidden by strings": (b'{"a":' + b'["]",' * 80 + b"1" + b"]" * 80 + b"}", "nested 81 deep"),
    "depth hidden by escapes": (b'{"a":' + b'["\\\\\\"]",' * 80 + b"1" + b"]" * 80 + b"}", "nested 81 deep"),
    "depth hidden by escaped backslashes": (
        b'{"a":' + b'["\\\\",' * 80 + b"1" + b"]" * 80 + b"}",
        "nested 81 deep",
    ),
    "one too deep": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested 65 deep, allowed 64"),
    "duplicate keys": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "duplicate key 'b'"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"a": Infinity}', "Infinity is not a JSON number"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "float overflow": (b'{"a": 1e999}', "number '1e999' does not fit a 64-bit float"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "integer of 5,000 digits, allowed 64"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "Latin-1": (b'{"a": "\xe9"}', "not UTF-8"),
    "lone surrogate": (b'{"a": "\\ud800"}', "not UTF-8"),
    "a list": (b"[1]", "holds list, not an object"),
    "null": (b"null", "holds NoneType, not an object"),
    "empty": (b"", "Expecting value"),
    "two values": (b"{} {}", "Extra data"),
    "trailing comma": (b'{"a": 1,}', "not valid JSON"),
    "raw newline in text": (b'{"a": "x\ny"}', "Invalid control character"),
    "unterminated, escaped quotes": (b'{"a": "' + b'\\"' * 100_000, "Unterminated string"),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize(("raw", "says"), BAD_JSON.values(), ids=BAD_JSON.keys())
def test_bad_json_is_one_clear_error_naming_the_file(tmp_path: Path, raw: bytes, says: str) -> None:
    path = write(tmp_path / "config.json", raw)
    message = refusal(read_json, path, limit_bytes=10_000_000)
    assert message.startswith(f"{path}: not valid JSON: ")
    assert says in message
    assert "download it again" in message


@pytest.mark.fault(9)
def test_brackets_in_strings_do_not_count_as_depth(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"a": "[{" * 500, "b": '\\"[' * 99, "c": [[]] * 70}).encode())
    assert read_json(path, limit_bytes=10_000)["a"] == "[{" * 500


@pytest.mark.fault(9)
def test_depth_of_exactly_the_limit_is_accepted(tmp_path: Path) -> None:
    raw = b'{"a":' + b"[" * 63 + b"]" * 63 + b', "b": [[]]}'
    assert set(read_json(write(tmp_path / "a.json", raw), limit_bytes=10_000)) == {"a", "b"}


@pytest.mark.fault(9)
def test_json_over_the_size_limit_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'{"a": 1}' + b" " * 100)
    assert refusal(read_json, path, limit_bytes=50) == (f"{path}: 108 bytes, allowed 50; is this the right file?")
    assert read_json(path, limit_bytes=108) == {"a": 1}


@pytest.mark.fault(2, 9)
def test_many_small_values_are_counted_before_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_module, "JSON_CONTAINERS_MAX", 1000)
    path = write(tmp_path / "a.json", b'{"a":[' + b"[]," * 1000 + b"1]}")
    assert "1,002 objects and lists, allowed 1,000" in refusal(read_json, path, limit_bytes=10_000)
    monkeypatch.setattr(json_module, "JSON_MARKS_MAX", 500)
    path = write(tmp_path / "b.json", b'{"a":[' + b"0," * 1000 + b"1]}")
    assert "1,005 values and marks, allowed 500" in refusal(read_json, path, limit_bytes=10_000)


@pytest.mark.fault(16)
def test_a_pointer_file_is_explained(tmp_path: Path) -> None:
    path = write(tmp_path / "config.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")
    assert "is a Git LFS pointer, not the file itself; run `git lfs pull`" in refusal(read_json, path)


# ---- only regular files


@pytest.mark.fault(19)
@pytest.mark.parametrize("reader", [read_json, read_header])
def test_missing_and_special_files_are_refused_at_once(tmp_path: Path, reader: object) -> None:
    fifo, folder, loop, sock = (tmp_path / name for name in ("fifo", "folder", "loop", "sock"))
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(tmp_path)  # socket paths are limited to about 100 bytes
    listener.bind("sock")
    listener.close()
    start = time.monotonic()
    assert "is a named pipe, not a regular file" in refusal(reader, fifo)
    assert "is a folder, not a regular file" in refusal(reader, folder)
    assert "is a socket, not a regular file" in refusal(reader, sock)
    assert "is a device, not a regular file" in refusal(reader, Path("/dev/zero"))
    assert "links lead in a circle" in refusal(reader, loop)
    assert "No such file or directory (errno 2)" in refusal(reader, tmp_path / "gone")
    assert "embedded null byte" in refusal(reader, Path("a\0b"))
    assert "File name too long" in refusal(reader, tmp_path / ("x" * 300))
    assert time.monotonic() - start < 1


@pytest.fixture(autouse=True)
def _stay_here() -> object:
    here = Path.cwd()
    yield
    os.chdir(here)


@pytest.mark.fault(23)
def test_a_file_swapped_while_being_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = write(tmp_path / "a.json", b"{}"), write(tmp_path / "b.json", b"{}")
    real = os.open
    monkeypatch.setattr(os, "open", lambda name, *rest: real(other, *rest))
    assert "was replaced by another file while it was being opened" in refusal(read_json, path)


@pytest.mark.fault(19, 23)
def test_a_pipe_swapped_in_before_opening_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, regular = tmp_path / "fifo", write(tmp_path / "a.json", b"{}").stat()
    os.mkfifo(path)
    monkeypatch.setattr(files_module.os, "stat", lambda name: regular)
    signal.alarm(5)  # a blocked open would otherwise stop the whole run
    try:
        assert "was replaced by another file" in refusal(read_json, path)
    finally:
        signal.alarm(0)


# ---- read_header


def test_header_of_the_library_is_read_back(tmp_path: Path) -> None:
    arrays = {
        "b": np.zeros((3, 5), np.float16),
        "a": np.zeros((), np.int64),
        "c": np.zeros((0, 7), np.float32),
    }
    path = tmp_path / "m.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert {name: (i.dtype, i.shape, i.numel, i.nbytes) for name, i in infos.items()} == {
        "b": ("F16", (3, 5), 15, 30),
        "a": ("I64", (), 1, 8),
        "c": ("F32", (0, 7), 0, 0),
    }
    assert all(info.file == path and info.name == name for name, info in infos.items())
    assert max(info.start + info.nbytes for info in infos.values()) == path.stat().st_size


def test_byte_ranges_point_at_the_values(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32)
    save_file({"x": np.ones(3, np.uint8), "v": values}, tmp_path / "m.safetensors")
    info = read_header(tmp_path / "m.safetensors")["v"]
    raw = info.file.read_bytes()[info.start : info.start + info.nbytes]
    assert np.frombuffer(raw, np.float32).tolist() == values.tolist()


@pytest.mark.fault(6)
def test_sub_byte_dtypes_are_counted_in_bits(tmp_path: Path) -> None:
    path = write(tmp_path / "a", raw_safetensors({"a": entry("F4", [3, 2], [0, 3])}, b"123"))
    assert read_header(path)["a"].nbytes == 3


U64 = 2**64
BAD_HEADERS = {
    "unknown dtype": ({"a": entry("F33")}, "unknown dtype 'F33'; supported: BF16, BOOL, C64, F16, F32"),
    "big-endian dtype": ({"a": entry(">F4")}, "unknown dtype '>F4'"),
    "dtype a number": ({"a": entry(32)}, "unknown dtype '32'"),
    "sub-byte misaligned": ({"a": entry("F4", [3], [0, 2])}, "12 bits, not a whole number of bytes"),
    "size differs": ({"a": entry("F32", [3])}, "F32 of shape [3] needs 12 bytes, data_offsets [0, 8] give 8"),
    "product over u64": ({"a": entry("U8", [2**32, 2**32, 1])}, "more than 2^63-1 numbers (overflow)"),
    "product wraps to 8": ({"a": entry("U8", [2**61 + 1, 8])}, "more than 2^63-1 numbers (overflow)"),
    "overflow behind a zero": ({"a": entry("U8", [2**62, 4, 0], [0, 0])}, "overflow"),
    "dimension over i64": ({"a": entry("U8", [U64])}, "must be a list of whole numbers from 0 to 2^63-1"),
    "negative dimension": ({"a": entry("F32", [-2])}, "shape '[-2]' must be a list of whole numbers"),
    "fractional dimension": ({"a": entry("F32", [2.0])}, "shape '[2.0]' must be a list of whole numbers"),
    "boolean dimension": ({"a": entry("F32", [True, 2])}, "shape '[True, 2]' must be a list"),
    "shape a number": ({"a": entry("F32", 2)}, "shape '2' must be a list"),
    "rank 9": ({"a": entry("F32", [1] * 8 + [2])}, "9 dimensions, allowed 8"),
    "offsets reversed": ({"a": entry(offsets=[8, 0])}, "must be [begin, end] with 0 <= begin <= end"),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, "must be [begin, end]"),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, "must be [begin, end]"),
    "offsets over u64": ({"a": entry(offsets=[U64, U64 + 8])}, "must be [begin, end]"),
    "offsets null": ({"a": entry(offsets=None)}, "data_offsets 'None' must be [begin, end]"),
    "field missing": ({"a": {"dtype": "F32", "shape": [2]}}, "exactly the fields data_offsets, dtype, shape"),
    "field too many": ({"a": entry(extra=1)}, "must have exactly the fields"),
    "entry a list": ({"a": [1]}, "must have exactly the fields"),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__ must map text to text"),
    "metadata a list": ({"__metadata__": [], "a": entry()}, "__metadata__ must map text to text"),
    "hole at the start": (
        {"a": entry("U8", [4], [4, 8])},
        "a hole of 4 bytes between the header and tensor 'a'",
    ),
    "hole": (
        {"a": entry("U8", [2], [0, 2]), "b": entry("U8", [4], [4, 8])},
        "a hole of 2 bytes between tensor 'a' and tensor 'b'",
    ),
    "overlap": (
        {"a": entry("U8", [6], [0, 6]), "b": entry("U8", [4], [4, 8])},
        "an overlap of 2 bytes between tensor 'a' and tensor 'b'",
    ),
    "same bytes twice": (
        {"a": entry(), "b": entry()},
        "an overlap of 8 bytes between tensor 'a' and tensor 'b'",
    ),
    "surplus": ({"a": entry("U8", [6], [0, 6])}, "2 surplus bytes after tensor 'a'"),
    "no tensors, surplus": ({}, "8 surplus bytes after the header"),
    "empty name": ({"": entry()}, "tensor name '' has 0 bytes, allowed 1 to 512"),
    "long name": ({"x" * 513: entry()}, "has 513 bytes, allowed 1 to 512"),
    "1 MB name": ({"é" * 500_000: entry()}, "has 1,000,000 bytes, allowed 1 to 512"),
    "NUL in name": ({"a\0b": entry()}, "'a\\x00b' has characters that cannot be printed"),
    "newline in name": ({"a\nb": entry()}, "'a\\nb' has characters that cannot be printed"),
    "terminal escape in name": ({"\x1b[2Ja": entry()}, "'\\x1b[2Ja' has characters that cannot be printed"),
    "text direction override in name": ({"a\u202eb": entry()}, "'a\\u202eb' has characters"),
    "duplicate tensor": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "duplicate key 'a'",
    ),
    "nested 1e5 deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested 100,001 deep, allowed 64"),
    "not JSON": (b"{nonsense", "header: not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "header: not valid JSON: not UTF-8"),
    "starts with a space": (b' {"a": 1}', "header: starts with b' {\"a\": 1', not with '{'"),
    "a list at the top": (b"[]", "not with '{'"),
    "empty header": (b"", "header: starts with b'', not with '{'"),
}


@pytest.mark.fault(4, 5, 6, 7, 11)
@pytest.mark.parametrize(("header", "says"), BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_headers_are_refused_naming_file_and_tensor(tmp_path: Path, header: object, says: str) -> None:
    path = write(tmp_path / "m.safetensors", raw_safetensors(header, b"12345678"))
    message = refusal(read_header, path)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.fault(11)
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "C:\\x", "poids.é.重"])
def test_names_that_look_like_paths_are_only_names(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "m.safetensors", raw_safetensors({name: entry()}, b"12345678"))
    assert list(read_header(path)) == [name]
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.fault(1)
@pytest.mark.parametrize("length", [2**63, 2**64 - 1, HEADER_BYTES_MAX + 1])
def test_huge_header_length_is_refused_before_allocation(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "m.safetensors", raw_safetensors({}, length=length))
    message = refusal(read_header, path)
    assert f"header length {length:,} bytes, allowed 100,000,000, file has 10" in message


@pytest.mark.fault(1, 3)
def test_header_length_beyond_the_file_is_called_truncated(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", raw_safetensors({}, length=1000))
    assert refusal(read_header, path) == (f"{path}: truncated: expected 1008 bytes, found 10; download it again")


@pytest.mark.fault(2)
def test_too_many_tensors_are_refused_before_parsing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_module, "TENSORS_MAX", 3)
    monkeypatch.setattr(header_module, "parse_object", None)
    header = {str(i): entry("U8", [0], [0, 0]) for i in range(6)}
    message = refusal(read_header, write(tmp_path / "m", raw_safetensors(header)))
    assert "more than the 3 tensors that are allowed" in message


@pytest.mark.fault(2)
def test_too_many_tensors_in_a_real_header_are_refused_within_a_second(tmp_path: Path) -> None:
    one = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(one % i for i in range(1_700_000)) + b"}"
    assert len(text) < HEADER_BYTES_MAX
    path = write(tmp_path / "m", raw_safetensors(text))
    start = time.monotonic()
    message = refusal(read_header, path)
    seconds = time.monotonic() - start
    path.unlink()  # 100 MB that pytest would keep
    assert "1,000,000 tensors" in message
    assert seconds < 1


@pytest.mark.fault(12, 16)
@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n", "is a Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + b"\0" * 40, "is a GGUF file (llama.cpp)"),
        (b"PK\x03\x04\0\0\x08\x08" + b"\0" * 40, "is a zip archive, probably a pickled PyTorch checkpoint"),
        (b"\x80\x02}q\0X\x01\0\0" + b"\0" * 40, "is a pickle, which can run code"),
        (b"<!DOCTYPE html><html></html>", "is a web page; the download was refused"),
    ],
)
def test_other_formats_under_our_name_are_recognised(tmp_path: Path, head: bytes, says: str) -> None:
    assert says in refusal(read_header, write(tmp_path / "model.safetensors", head))


# ---- open_checkpoint


def test_the_embedded_model_opens() -> None:
    checkpoint = open_checkpoint(TINY)
    assert checkpoint.config["model_type"] == "llama"
    assert (checkpoint.numel, checkpoint.nbytes) == (8_425_728, 16_851_456)
    assert [shard.name for shard in checkpoint.shards] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert checkpoint.tensors["model.embed_tokens.weight"].shape == (8192, 256)
    assert not checkpoint.has_remote_code


def test_single_file_model_and_counts(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"a": (2, 3), "b": (5,)}))
    assert count_stored(checkpoint) == {"a": (6, 24), "b": (5, 20)}
    assert (checkpoint.numel, checkpoint.nbytes) == (11, 44)
    assert checkpoint.shards == (tmp_path / "m" / "model.safetensors",)


def test_path_with_space_and_umlaut_given_as_text(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "mein Modell ü", {"a": (1,)})
    assert list(open_checkpoint(str(folder)).tensors) == ["a"]


@pytest.mark.fault(14)
def test_remote_code_is_reported_and_not_run(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": (1,)})
    canary = tmp_path / "canary"
    (folder / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "modeling_x.M"}}))
    assert open_checkpoint(folder).has_remote_code
    assert not canary.exists()


@pytest.mark.fault(16)
def test_missing_empty_and_file_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such folder; check the path" in refusal(open_checkpoint, tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    assert "hf download meta-llama/Llama-3" in refusal(open_checkpoint, Path("meta-llama/Llama-3"))
    (tmp_path / "empty").mkdir()
    assert refusal(open_checkpoint, tmp_path / "empty") == (
        f"{tmp_path / 'empty'}: is empty; a model folder has config.json and model.safetensors "
        "(or model.safetensors.index.json)"
    )
    gguf = write(tmp_path / "m.gguf", b"GGUF\x03\0\0\0")
    assert "is a GGUF file (llama.cpp); use the safetensors folder" in refusal(open_checkpoint, gguf)
    other = write(tmp_path / "m.safetensors", raw_safetensors({}))
    assert f"is a file, not a folder; give the folder of config.json and the weights (perhaps {tmp_path})" in (
        refusal(open_checkpoint, other)
    )
    assert "no such folder" in refusal(open_checkpoint, Path("a\0b"))


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["pytorch_model.bin"], "only pickled weights ('pytorch_model.bin'). They can run code"),
        (["consolidated.00.pth", "a.pt"], "only pickled weights ('a.pt', 'consolidated.00.pth')"),
        (["a.bin", "b.bin", "c.bin", "d.bin"], "('a.bin', 'b.bin', 'c.bin', ...)"),
        (["q4.gguf"], "holds a GGUF model ('q4.gguf')"),
        (["model.onnx"], "holds an ONNX model ('model.onnx')"),
        (["tf_model.h5"], "holds TensorFlow or Flax weights ('tf_model.h5')"),
        (["adapter_model.safetensors"], "holds an adapter ('adapter_model.safetensors'); merge it"),
        (["weights.safetensors"], "safetensors under other names ('weights.safetensors')"),
        (["\x1b[2J.bin"], "('\\x1b[2J.bin')"),
        (["README.md"], "holds no weights; expected model.safetensors or model.safetensors.index.json"),
    ],
)
def test_folders_without_safetensors_are_explained(tmp_path: Path, names: list[str], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    assert says in refusal(open_checkpoint, tmp_path)


@pytest.mark.fault(12, 13)
def test_pickles_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    opened = record_opens(monkeypatch)
    assert "save_pretrained(folder)" in refusal(open_checkpoint, tmp_path)
    assert opened == []


def record_opens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    opened: list[str] = []
    real = os.open

    def open_and_note(path: object, *rest: int) -> int:
        opened.append(os.path.basename(str(path)))
        return real(path, *rest)

    monkeypatch.setattr(files_module.os, "open", open_and_note)
    return opened


@pytest.mark.fault(15)
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "config.json is missing"),
        (b"{", "config.json: not valid JSON"),
        (b"{}", "model_type must be the name of an architecture, found 'None'"),
        (b'{"model_type": 7}', "model_type must be the name of an architecture, found '7'"),
        (b'{"model_type": ""}', "model_type must be the name of an architecture, found ''"),
    ],
)
def test_bad_config(tmp_path: Path, config: bytes | None, says: str) -> None:
    folder = write_model(tmp_path / "m", {"a": (1,)})
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_bytes(config)
    assert says in refusal(open_checkpoint, folder)


@pytest.mark.fault(8)
def test_model_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": (1,)})
    write(folder / "model.safetensors", raw_safetensors({}))
    assert "holds no tensors" in refusal(open_checkpoint, folder)


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_index_and_shards_that_agree(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}, TWO: {"b": (3,)}}, {"a": ONE, "b": TWO})
    save_file({"z": np.zeros(1)}, folder / "consolidated.safetensors")  # Mistral's second copy
    checkpoint = open_checkpoint(folder)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {"a": ONE, "b": TWO}


BAD_PAIRS = {
    "missing tensor": (
        {"a": ONE, "b": TWO, "c": ONE},
        f"'c': model.safetensors.index.json says {ONE}, found in no",
    ),
    "extra tensor": ({"a": ONE, "b": TWO}, f"'x': in {TWO}, not in model.safetensors.index.json"),
    "other shard": (
        {"a": TWO, "b": TWO, "x": ONE},
        f"'a': model.safetensors.index.json says {TWO}, found in {ONE}",
    ),
}


@pytest.mark.fault(7, 8)
@pytest.mark.parametrize(("weight_map", "says"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_index_and_shards_that_disagree(tmp_path: Path, weight_map: dict, says: str) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}, TWO: {"b": (3,), "x": (1,)}}, weight_map)
    message = refusal(open_checkpoint, folder)
    assert says in message
    assert "index and shards disagree" in message


@pytest.mark.fault(7)
def test_tensor_in_two_shards_names_both(tmp_path: Path) -> None:
    shards = {ONE: {"a": (2,)}, TWO: {"a": (2,), "b": (3,)}}
    folder = write_shards(tmp_path / "m", shards, {"a": ONE, "b": TWO})
    assert f"tensor 'a': in {ONE} and again in {TWO}" in refusal(open_checkpoint, folder)


@pytest.mark.fault(7)
def test_only_five_disagreements_are_listed(tmp_path: Path) -> None:
    weight_map = {"a": ONE, **{f"gone{i}": ONE for i in range(20)}}
    message = refusal(open_checkpoint, write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, weight_map))
    assert message.count("gone") == 5
    assert message.endswith("and 15 more")


@pytest.mark.fault(8)
def test_missing_and_stray_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, {"a": ONE, "b": TWO})
    message = refusal(open_checkpoint, folder)
    assert "1 of 2 shards in model.safetensors.index.json are missing" in message
    assert TWO in message
    shards = {ONE: {"a": (2,)}, TWO: {"b": (2,)}}
    message = refusal(open_checkpoint, write_shards(tmp_path / "n", shards, {"a": ONE}))
    assert "1 shards are not named by model.safetensors.index.json" in message
    assert TWO in message


@pytest.mark.fault(7)
def test_single_file_and_index_together_are_ambiguous(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, {"a": ONE})
    write_model(folder, {"a": (2,)})
    assert "holds both model.safetensors and model.safetensors.index.json" in refusal(open_checkpoint, folder)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {"model.safetensors": {"a": (2,)}}, {"a": "model.safetensors"})
    assert list(open_checkpoint(folder).tensors) == ["a"]


HOSTILE_SHARDS = [
    "../../x.safetensors",
    "/etc/passwd",
    "/etc/x.safetensors",
    "C:\\x.safetensors",
    "",
    ".",
    "..",
    "sub/x.safetensors",
    "sub",
    "x.safetensors\n",
    "x\0.safetensors",
    "é.safetensors",
    "pytorch_model.bin",
    7,
    None,
    ["x.safetensors"],
]


@pytest.mark.fault(18)
@pytest.mark.parametrize("shard", HOSTILE_SHARDS, ids=repr)
def test_hostile_shard_names_are_refused_before_any_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: object
) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, {"a": ONE, "b": shard})
    (folder / "sub").mkdir()
    opened = record_opens(monkeypatch)
    message = refusal(open_checkpoint, folder)
    assert "tensor 'b': shard" in message
    assert "must be a plain file name" in message
    assert message.isprintable()
    assert opened == ["model.safetensors.index.json"]


@pytest.mark.fault(9, 18)
@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, weight_map)
    assert "weight_map must map tensor names to shards" in refusal(open_checkpoint, folder)


@pytest.mark.fault(11)
def test_index_with_a_hostile_tensor_name(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, {"a": ONE, "\x1b[2J": ONE})
    assert "tensor name '\\x1b[2J' has characters that cannot be printed" in refusal(open_checkpoint, folder)


# ---- links


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": (2,)})
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    assert list(open_checkpoint(folder).tensors) == ["a"]
    (tmp_path / "alias").symlink_to(folder)
    assert list(open_checkpoint(tmp_path / "alias").tensors) == ["a"]


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m", {"a": (2,)})
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    message = refusal(open_checkpoint, folder)
    assert message.startswith(f"{folder / name}: is a link to {tmp_path / 'outside'}, outside of the model folder")


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", [ONE, "model.safetensors.index.json"])
def test_shard_and_index_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_shards(tmp_path / "m", {ONE: {"a": (2,)}}, {"a": ONE})
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    message = refusal(open_checkpoint, folder)
    assert message.startswith(f"{folder / name}: is a link to {tmp_path / 'outside'}, outside of the model")


@pytest.mark.fault(19)
def test_dangling_and_circular_links(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"a": (2,)})
    weights = folder / "model.safetensors"
    weights.unlink()
    weights.symlink_to("nowhere")
    assert "No such file or directory (errno 2); check the path or download" in refusal(open_checkpoint, folder)
    weights.unlink()
    weights.symlink_to("model.safetensors")
    assert "links lead in a circle" in refusal(open_checkpoint, folder)


def hub_cache(root: Path) -> tuple[Path, Path]:
    """A snapshot as huggingface_hub lays it out: links into blobs."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / "abc", root / "models--o--n" / "blobs"
    write_model(snapshot, {"a": (2,)})
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    return snapshot, blobs


@pytest.mark.fault(19)
def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    snapshot, _ = hub_cache(tmp_path)
    assert list(open_checkpoint(snapshot).tensors) == ["a"]


@pytest.mark.fault(19)
def test_hub_cache_links_to_another_model_are_refused(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    (tmp_path / "secret").write_bytes((blobs / "hash-model.safetensors").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../secret")
    assert "outside of the model folder" in refusal(open_checkpoint, snapshot)


@pytest.mark.fault(19)
def test_blobs_that_are_themselves_a_link_open_no_door(tmp_path: Path) -> None:
    snapshot, blobs = hub_cache(tmp_path)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "outside of the model folder" in refusal(open_checkpoint, snapshot)


# ---- check_shapes


@pytest.mark.fault(8)
def test_check_shapes_returns_extra_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"a": (2, 3), "z": (1,), "y": (1,)}))
    assert check_shapes(checkpoint, {"a": (2, 3)}, tied=frozenset()) == ["y", "z"]
    expected = {"a": (2, 3), "head": (9, 9), "y": (1,), "z": (1,)}
    assert check_shapes(checkpoint, expected, tied=frozenset({"head"})) == []


@pytest.mark.fault(8, 15)
def test_check_shapes_lists_expected_and_found(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"a": (2, 3), "b": (1,)}))
    expected = {"a": (3, 2), "b": (1,), **{f"layer.{i}": (4,) for i in range(9)}}
    message = refusal(check_shapes, checkpoint, expected, tied=frozenset())
    assert "config.json and the weights disagree on 10 of 11 tensors" in message
    assert "'a': expected (3, 2), found (2, 3) in model.safetensors" in message
    assert "'layer.0': expected (4,), not in the files" in message
    assert message.endswith("and 5 more")


def test_a_tied_tensor_that_is_there_must_still_fit(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", {"head": (2, 3)}))
    message = refusal(check_shapes, checkpoint, {"head": (2, 4)}, tied=frozenset({"head"}))
    assert "'head': expected (2, 4), found (2, 3)" in message


# ---- fuzzing: only InputError may come out, and what we accept the library must accept too

_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_sizes = st.integers(0, 4) | st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64, 1.5, True])
_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "BF16", "F6_E2M3", "X"]),
        "shape": st.lists(_sizes, max_size=4) | _json_values,
        "data_offsets": st.lists(_sizes | st.integers(0, 40), min_size=2, max_size=2) | _json_values,
    }
)
_headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), _entries | _json_values, max_size=4)
_fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = raw_safetensors(
    {"__metadata__": {"a": "b"}, "w": entry("F16", [2, 2], [0, 8]), "v": entry("U8", [3], [8, 11])}, b"x" * 11
)


def check_against_library(path: Path) -> None:
    try:
        infos = read_header(path)
    except InputError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - both outcomes are allowed
        return
    assert sum(info.nbytes for info in infos.values()) <= path.stat().st_size
    try:
        theirs = dict(safetensors_deserialize(path.read_bytes()))
    except SafetensorError as error:  # pragma: no cover
        raise AssertionError(f"accepted what safetensors refuses: {error}") from error
    assert {name: tuple(view["shape"]) for name, view in theirs.items()} == {
        name: info.shape for name, info in infos.items()
    }


@pytest.mark.fault(1, 4, 5, 6)
@_fuzz
@given(header=_headers, data=st.binary(max_size=20), cut=st.integers(0, 30))
def test_fuzz_structured_headers(tmp_path: Path, header: dict, data: bytes, cut: int) -> None:
    raw = raw_safetensors(header, data)
    check_against_library(write(tmp_path / "m", raw[: len(raw) - cut] if cut < 10 else raw))


@pytest.mark.fault(1, 3, 4, 5)
@_fuzz
@given(position=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_fuzz_flipped_and_cut_headers(tmp_path: Path, position: int, value: int, cut: int) -> None:
    raw = GOOD[:position] + bytes([value]) + GOOD[position + 1 :]
    check_against_library(write(tmp_path / "m", raw))
    check_against_library(write(tmp_path / "m", raw[:cut]))


@pytest.mark.fault(1, 9)
@_fuzz
@given(raw=st.binary(max_size=60))
def test_fuzz_random_bytes(tmp_path: Path, raw: bytes) -> None:
    check_against_library(write(tmp_path / "m", raw))
    check_against_library(write(tmp_path / "m", raw_safetensors(b"{" + raw, b"")))


@pytest.mark.fault(9)
@_fuzz
@given(value=_json_values, flip=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255)))
def test_fuzz_json(tmp_path: Path, value: object, flip: tuple[int, int] | None) -> None:
    raw = bytearray(json.dumps({"a": value}, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if flip is not None and flip[0] < len(raw):
        raw[flip[0]] = flip[1]
    path = write(tmp_path / "a.json", bytes(raw))
    try:
        data = read_json(path, limit_bytes=10_000)
    except InputError as error:
        assert str(error).startswith(str(path))  # noqa: PT017 - both outcomes are allowed
        return
    assert data == json.loads(raw.decode("utf-8"))
    assert all(math.isfinite(leaf) for leaf in data.values() if isinstance(leaf, float))


# ---- boundaries


def test_store_imports_only_errors_and_the_standard_library() -> None:
    script = (
        "import sys, types\n"
        "package = types.ModuleType('spectrim'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['spectrim'] = package\n"
        "import spectrim.store\n"
        "print([n for n in ('torch', 'transformers', 'numpy', 'pickle') if n in sys.modules])\n"
        "print(sorted({n.split('.')[1] for n in sys.modules if n.startswith('spectrim.')}))\n"
    )
    source = str(Path(files_module.__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", script, source], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", "['errors', 'store']"]
