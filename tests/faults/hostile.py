"""Hostile bytes for every reader: a corpus of files made by hand, ways to change them, and the readers themselves."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from spectrim.data.files import read_file
from spectrim.data.tasks import read_task
from spectrim.errors import SpectrimError
from spectrim.integrations.transformers import SpectrimConfig
from spectrim.linalg.ladder import are_levels
from spectrim.store import open_checkpoint, read_header, read_json, verify_manifest, write_manifest
from spectrim.store.state import read_state, write_state
from spectrim.store.work import FINGERPRINT, FORMAT_VERSION, WorkFolder


def header(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file of a header (JSON-ready, or raw bytes) and data."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ONE = {"w": entry()}
DEEP = b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

HEADERS: dict[str, bytes] = {
    "good": header({"__metadata__": {"a": "b"}, "w": entry("F16", [2, 2]), "v": entry("U8", [3], [8, 11])}, bytes(11)),
    "empty": b"",
    "seven bytes": b"\x02\0\0\0\0\0\0",
    "length 2^63": header(ONE, bytes(8), length=2**63),
    "length 2^64-1": header(ONE, bytes(8), length=2**64 - 1),
    "length beyond the file": header(ONE, bytes(8), length=10_000),
    "length zero": header(b"", bytes(8)),
    "length cuts the JSON": header(ONE, bytes(8), length=20),
    "not an object": header(b"[1, 2]"),
    "not JSON": header(b"{w: 1}"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "byte order mark": header(b"\xef\xbb\xbf{}"),
    "nested": header(DEEP),
    "NaN": header(b'{"w": NaN}'),
    "5,000 digits": header(b'{"w": ' + b"9" * 5000 + b"}"),
    "duplicate names": header(
        b'{"w": ' + json.dumps(entry()).encode() + b', "w": ' + json.dumps(entry()).encode() + b"}"
    ),
    "surplus": header(ONE, bytes(9)),
    "too little data": header(ONE, bytes(7)),
    "hole": header({"w": entry(), "v": entry(offsets=[12, 20])}, bytes(20)),
    "overlap": header({"w": entry(), "v": entry(offsets=[4, 12])}, bytes(12)),
    "reversed offsets": header({"w": entry(offsets=[8, 0])}, bytes(8)),
    "negative offsets": header({"w": entry(offsets=[-8, 0])}, bytes(8)),
    "shape overflows": header({"w": entry(shape=[2**32, 2**32])}, bytes(8)),
    "shape overflows past a zero": header({"w": entry(shape=[2**63, 2**63, 0], offsets=[0, 0])}),
    "negative shape": header({"w": entry(shape=[-2, -1])}, bytes(8)),
    "fractional shape": header({"w": entry(shape=[1.5, 2])}, bytes(8)),
    "boolean shape": header({"w": entry(shape=[True, 2])}, bytes(8)),
    "shape and range disagree": header({"w": entry(shape=[3])}, bytes(8)),
    "65 dimensions": header({"w": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)),
    "unknown dtype": header({"w": entry("F33")}, bytes(8)),
    "dtype is a list": header({"w": entry(["F32"])}, bytes(8)),
    "half a byte": header({"w": entry("F4", [3], [0, 1])}, bytes(1)),
    "empty name": header({"": entry()}, bytes(8)),
    "name of a megabyte": header({"w" * 2**20: entry()}, bytes(8)),
    "terminal escape": header({"\x1b[2J": entry()}, bytes(8)),
    "path as a name": header({"../../etc/passwd": entry()}, bytes(8)),
    "half a character": header(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}", bytes(8)),
    "metadata is a number": header({"__metadata__": 1, **ONE}, bytes(8)),
    "extra field": header({"w": {**entry(), "x": 1}}, bytes(8)),
    "GGUF": b"GGUF\x03\0\0\0" + bytes(40),
    "zip": b"PK\x03\x04" + bytes(40),
    "pickle": b"\x80\x04\x95" + bytes(40),
}
SHARD = header(ONE, bytes(8))
NAMES = (
    "model-00001-of-00001.safetensors",
    "../../x",
    "/etc/passwd",
    "C:\\x",
    "",
    ".",
    "..",
    "a/b.safetensors",
    "\0",
    "x.bin",
)
INDEXES: dict[str, Any] = {
    "good": {"metadata": {"total_size": 8}, "weight_map": {"w": NAMES[0]}},
    **{f"shard {name!r}": {"weight_map": {"w": name}} for name in NAMES[1:]},
    "no map": {"metadata": {}},
    "map is a list": {"weight_map": [["w", NAMES[0]]]},
    "shard is a number": {"weight_map": {"w": 7}},
    "missing tensor": {"weight_map": {"w": NAMES[0], "v": NAMES[0]}},
    "no tensor": {"weight_map": {}},
}
LAYER = "model.layers.0.mlp.up_proj"
CONFIGS: dict[str, Any] = {
    "good": {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "spectrim",
            "format_version": 1,
            "modules": {LAYER: {"codec": "pivot", "rank": 4, "bias": False}},
        },
    },
    "all sizes": {
        "model_type": "llama",
        "size_ratio": 0.5,
        "quantization_config": {
            "quant_method": "spectrim",
            "format_version": 1,
            "any_size": {"storage": "factor", "anchors": [1.0, 0.9, 0.5]},
            "modules": {LAYER: {"codec": "nested", "rank": 4, "bias": True}},
        },
    },
    "later version": {"model_type": "llama", "quantization_config": {"format_version": 99}},
    "type is a list": {"model_type": ["llama"]},
    "modules is a list": {"model_type": "llama", "quantization_config": {"modules": [1]}},
    "negative rank": {"model_type": "x", "quantization_config": {"modules": {"a": {"codec": "factor", "rank": -1}}}},
}
TASKS: dict[str, bytes] = {
    "choice": b'{"id": 1, "ctx": "a", "choices": [" b", " c"], "gold": 0}\n' * 2,
    "lambada": b'{"ctx": "a b", "target": " c"}\n',
    "winogrande": b'{"id": 1, "ctxs": ["a", "b"], "cont": " c", "gold": 1}\n',
    "blimp": b'{"uid": "u", "field": "f", "term": "t", "good": "a", "bad": "b"}\n',
}
TEXTS: dict[str, bytes] = {"lines": b'{"text": "a b c"}\n\n{"text": "d"}\n', "broken": b'{"text": }\n', "null": b"\0\0"}

# ---------- ways to change things

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**40, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "w", "../../x", "/dev/zero", "\0", "\u202e", "\ud800", "x" * 2000, "F32", "F4", [], [[]], {}, {"": {}}, [0, 8],
    [8, 0], [2**32, 2**32], {"codec": "factor"}, "spectrim",
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\\",
    b"\xef\xbb\xbf",
    b"NaN",
    b"-",
    b"1e999",
    b"\n",
)


def changed_tree(tree: Any, random: Random, depth: int = 0) -> Any:
    """A copy of a JSON value in which one place is another value, gone, doubled or renamed."""
    if depth > 6 or not isinstance(tree, dict | list) or not tree or random.random() < 0.15:
        return random.choice(VALUES)
    if isinstance(tree, dict):
        key = random.choice(list(tree))
        copy = dict(tree)
        kind = random.randrange(10)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[str(random.choice(VALUES))[:3000]] = copy.pop(key)
        elif kind == 2:
            copy[str(random.choice(VALUES))[:3000]] = tree[key]
        else:
            copy[key] = changed_tree(tree[key], random, depth + 1)
        return copy
    place, copy = random.randrange(len(tree)), list(tree)
    kind = random.randrange(6)
    if kind == 0:
        del copy[place]
    elif kind == 1:
        copy *= random.randrange(2, 50)
    else:
        copy[place] = changed_tree(tree[place], random, depth + 1)
    return copy


def as_json(tree: Any) -> bytes:
    """As a careless or hostile program would write it: NaN and half characters allowed."""
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


def changed_bytes(raw: bytes, random: Random) -> bytes:
    """One to four flips, cuts, insertions, doublings or swaps."""
    data = bytearray(raw)
    for _ in range(random.randrange(1, 5)):
        place = random.randrange(len(data) + 1)
        end = min(len(data), place + random.randrange(1, 40))
        kind = random.randrange(6)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[place:end]
        elif kind == 2:
            data[place:place] = random.choice(BYTES) * random.choice((1, 1, 1, 200))
        elif kind == 3:
            data[place:place] = data[place:end]
        elif kind == 4:
            del data[place:]
        elif len(data) >= 8:
            data[:8] = struct.pack(
                "<Q", random.choice((0, 1, len(data) - 8, len(data), 2**31, 2**63, random.randrange(200)))
            )
    return bytes(data)


def header_case(random: Random) -> bytes:
    """A changed header: its JSON as a tree, its bytes, or both; data that fits or not."""
    raw = random.choice(list(HEADERS.values()))
    if random.random() < 0.6:
        tree = {f"t{i}": entry("F32", [2], [8 * i, 8 * i + 8]) for i in range(random.randrange(1, 4))}
        raw = header(as_json(changed_tree(tree, random)), bytes(random.choice((0, 8, 16, 24))))
    return raw if random.random() < 0.4 else changed_bytes(raw, random)


def json_case(corpus: dict[str, Any], random: Random) -> bytes:
    """A changed JSON file."""
    tree = random.choice(list(corpus.values()))
    for _ in range(random.randrange(3)):
        tree = changed_tree(tree, random)
    raw = as_json(tree)
    return raw if random.random() < 0.6 else changed_bytes(raw, random)


def bytes_case(corpus: dict[str, bytes], random: Random) -> bytes:
    """A changed file of any other format."""
    return changed_bytes(random.choice(list(corpus.values())), random)


# ---------- the readers


class Readers:
    """Every reader of untrusted bytes, each given one hostile file in `folder`; only our own errors may come out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.model.mkdir(parents=True)
        (self.model / NAMES[0]).write_bytes(SHARD)
        (self.model / "config.json").write_bytes(as_json(CONFIGS["good"]))
        self.result = folder / "result"
        self.result.mkdir()
        (self.result / "a.txt").write_text("a")
        write_manifest(self.result, facts={"tool": "spectrim"})
        self.manifest = json.loads((self.result / "manifest.json").read_bytes())
        self.state = folder / "state.safetensors"
        write_state(self.state, 3, {"w": torch.zeros(4)}, {"a": [1]})
        self.state_bytes = self.state.read_bytes()
        self.work = folder / "work"
        self.work.mkdir()

    def kinds(self) -> dict[str, Callable[[Random], None]]:
        """Name -> one case of that reader."""
        return {
            "header": self.header, "index": self.index, "config": self.config, "json": self.json,
            "manifest": self.read_manifest, "state": self.read_state, "fingerprint": self.fingerprint,
            "ladder": self.ladder, "task": self.task, "text": self.text,
        }  # fmt: skip

    def header(self, random: Random) -> None:
        path = self.folder / "h.safetensors"
        path.write_bytes(header_case(random))
        read_header(path)

    def index(self, random: Random) -> None:
        (self.model / "model.safetensors.index.json").write_bytes(json_case(INDEXES, random))
        open_checkpoint(self.model)

    def config(self, random: Random) -> None:
        path = self.folder / "config.json"
        path.write_bytes(json_case(CONFIGS, random))
        found = read_json(path).get("quantization_config")
        if isinstance(found, dict) and all(isinstance(key, str) for key in found):
            SpectrimConfig(**found).to_dict()

    def json(self, random: Random) -> None:
        path = self.folder / "any.json"
        path.write_bytes(json_case({**INDEXES, **CONFIGS}, random))
        read_json(path)

    def read_manifest(self, random: Random) -> None:
        (self.result / "manifest.json").write_bytes(json_case({"good": self.manifest}, random))
        verify_manifest(self.result)

    def read_state(self, random: Random) -> None:
        raw = bytes_case({"state": self.state_bytes}, random)
        self.state.write_bytes(raw)
        read_state(self.state)
        assert raw == self.state_bytes, "a state that was changed was taken for the one that was saved"

    def fingerprint(self, random: Random) -> None:
        good = {"format_version": FORMAT_VERSION, "fields": {"a.b": 1, "c": [1, "x"]}}
        (self.work / FINGERPRINT).write_bytes(json_case({"good": good}, random))
        WorkFolder(self.work).claim({"a": {"b": 1}, "c": [1, "x"]})

    def ladder(self, random: Random) -> None:
        levels = [
            torch.tensor(
                [random.choice((-1, 0, 1, 2, 3, 4, 2**31 - 1)) for _ in range(random.randrange(4))], dtype=torch.int32
            )
            for _ in range(random.randrange(1, 4))
        ]
        together = sorted(int(x) for level in levels for x in level)
        ascending = all(list(level) == sorted(set(level.tolist())) for level in levels)
        assert are_levels(levels) == (ascending and together == list(range(len(together))))

    def task(self, random: Random) -> None:
        path = self.folder / "task.jsonl"
        path.write_bytes(bytes_case(TASKS, random))
        read_task(path)

    def text(self, random: Random) -> None:
        path = self.folder / "text.jsonl"
        path.write_bytes(bytes_case(TEXTS, random))
        read_file(path, max_chars=None)

    def close(self) -> None:
        shutil.rmtree(self.folder)


def run_case(case: Callable[[Random], None], random: Random) -> str:
    """What became of it: accepted, or the class of ours that refused it; anything else is raised and is a finding."""
    try:
        case(random)
    except SpectrimError as error:
        return type(error).__name__
    return "accepted"


def corpus_files() -> Iterator[tuple[str, bytes]]:
    """Every hand-made file with its name."""
    yield from HEADERS.items()
    for corpus in (INDEXES, CONFIGS):
        yield from ((name, as_json(tree)) for name, tree in corpus.items())
    yield from TASKS.items()
    yield from TEXTS.items()
