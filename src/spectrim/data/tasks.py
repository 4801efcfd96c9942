"""Task files: JSON lines with questions whose right answer is known, checked line by line before any model is loaded.

The keys of the first line tell the format, every line must then have them:

    choice      id, ctx, choices, gold           which choice follows the context
    winogrande  id, ctxs, cont, gold             after which context the same text follows
    lambada     ctx, target                      the last word
    blimp       uid, field, term, good, bad      which of two sentences is grammatical

All of them become (context, continuation) pairs, spaced as lm-evaluation-harness spaces them: choices and targets carry
their own leading space, and a BLiMP sentence gets one.
"""

import hashlib
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from spectrim.data.sources import split_specs
from spectrim.errors import InputError, UsageError
from spectrim.store.files import open_regular, shown
from spectrim.store.strict_json import parse_object

SUFFIXES = (".jsonl", ".jsonl.xz")
LINE_BYTES_MAX = 2**20
FILE_BYTES_MAX = 2**30  # unpacked: an .xz of a few kB can hold terabytes
ITEMS_MAX = 1_000_000
CHOICES_MAX = 64


class Query(NamedTuple):
    """A text and what may follow it."""

    context: str
    continuation: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `lengths` are the choices' characters, for acc_norm; `group` is what a mean is taken over first."""

    line: int
    queries: tuple[Query, ...]
    gold: int
    lengths: tuple[int, ...] = ()
    group: str = ""
    field: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The items of one file that are asked, out of `total`; `seed` says which draw when it is not all of them."""

    name: str
    path: str
    format: str
    items: tuple[Item, ...] = field(repr=False)
    total: int
    sha256: str
    seed: int | None = None


class Loaded(NamedTuple):
    """Tasks, and the files of a folder that are none, each with the reason."""

    tasks: list[Task]
    skipped: list[dict[str, str]]


class _UnknownFormat(InputError):
    """The first line has the keys of no format: an error for a file, a remark for one file of a folder."""


def load_tasks(spec: str | Path | Sequence[str | Path], *, limit: int | None = None, seed: int = 0) -> Loaded:
    """The tasks in files (.jsonl, .jsonl.xz), or directly inside folders; `spec` as one path, several, or with commas.

    With `limit` at most so many items of each file, drawn with `seed` evenly over the groups (BLiMP's uids).
    Raises InputError with file and line for anything that cannot be scored.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"task limit is {limit}; it must be at least 1, or left out for all items")
    given = [spec] if isinstance(spec, str | Path) else list(spec)
    tasks: list[Task] = []
    skipped: list[dict[str, str]] = []
    for path, in_folder in _files(split_specs([str(s) for s in given])):
        try:
            tasks.append(sample(read_task(path), limit, seed))
        except _UnknownFormat as error:
            if not in_folder:
                raise
            skipped.append({"file": str(path), "why": str(error)})
    if not tasks:
        raise InputError(f"no task in {spec}: {'; '.join(s['why'] for s in skipped)}")
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--tasks: {', '.join(twice)} given more than once; give each task one file")
    return Loaded(tasks, skipped)


def sample(task: Task, limit: int | None, seed: int) -> Task:
    """At most `limit` items in the order of the file: the first of each group's shuffled items, then the second, ..."""
    if limit is None or limit >= len(task.items):
        return task
    generator = random.Random(seed)
    ranks: dict[str, int] = {}
    keys: list[tuple[int, float, int]] = []
    for i in generator.sample(range(len(task.items)), len(task.items)):
        rank = ranks[task.items[i].group] = ranks.get(task.items[i].group, -1) + 1
        keys.append((rank, generator.random(), i))
    chosen = sorted(i for _, _, i in sorted(keys)[:limit])
    return Task(
        name=task.name, path=task.path, format=task.format, items=tuple(task.items[i] for i in chosen),
        total=task.total, sha256=task.sha256, seed=seed,
    )  # fmt: skip


def read_task(path: Path) -> Task:
    """All items of one file."""
    items: list[Item] = []
    digest = hashlib.sha256()
    kind = ""
    for number, line in _lines(path):
        digest.update(line)
        where = f"{path}, line {number}"
        row = parse_object(line, where=where)
        kind = kind or _format_of(row, where)
        missing = [key for key in FORMATS[kind].keys if key not in row]
        if missing:
            raise InputError(f"{where}: no field {missing[0]!r}, which every line of a {kind} file must have")
        if len(items) == ITEMS_MAX:
            raise InputError(f"{where}: more than {ITEMS_MAX:,} items, the most that is read; split the file")
        items.append(FORMATS[kind].parse(row, number, where))
    if not items:
        raise InputError(f"{path}: no items in it; give a task file, one JSON object a line")
    return Task(
        name=path.name.partition(".jsonl")[0], path=str(path), format=kind, items=tuple(items), total=len(items),
        sha256=digest.hexdigest(),
    )  # fmt: skip


# ---------- lines


def _files(specs: Sequence[str]) -> Iterator[tuple[Path, bool]]:
    for spec in specs:
        path = Path(spec).expanduser() if spec == "~" or spec.startswith("~/") else Path(spec)
        if not path.exists():
            raise InputError(f"{spec}: no such file or folder (looked in {Path.cwd()}); give a .jsonl file or a folder")
        if not path.is_dir():
            if not path.name.endswith(SUFFIXES):
                raise InputError(f"{path}: not a task file by its name; allowed endings: {', '.join(SUFFIXES)}")
            yield path, False
            continue
        found = sorted(entry for entry in path.iterdir() if entry.is_file() and entry.name.endswith(SUFFIXES))
        if not found:
            raise InputError(f"{path}: no task file in this folder; allowed endings: {', '.join(SUFFIXES)}")
        yield from ((entry, True) for entry in found)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line that is not blank."""
    read = number = 0
    with open_regular(path) as (file, _):
        packed = path.suffix == ".xz"
        stream = cast(IO[bytes], lzma.open(file)) if packed else file  # noqa: SIM115  `file` is what is closed
        while line := _next_line(stream, path, number):
            number += 1
            read += len(line)
            if len(line) > LINE_BYTES_MAX:
                raise InputError(f"{path}, line {number}: longer than the {LINE_BYTES_MAX:,} bytes that are read")
            if read > FILE_BYTES_MAX:
                raise InputError(f"{path}, line {number}: more than {FILE_BYTES_MAX:,} bytes of text; split the file")
            if line.strip():
                yield number, line


def _next_line(stream: IO[bytes], path: Path, number: int) -> bytes:
    try:
        return stream.readline(LINE_BYTES_MAX + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: damaged or not .xz data after line {number} ({error}); copy it again") from error


# ---------- formats


def _format_of(row: dict[str, Any], where: str) -> str:
    for name, form in FORMATS.items():
        if row.keys() >= set(form.keys):
            return name
    known = "; ".join(f"{name}: {', '.join(form.keys)}" for name, form in FORMATS.items())
    raise _UnknownFormat(f"{where}: the keys {', '.join(map(shown, row)) or 'none'} are of no known format ({known})")


def _string(row: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    return _text(row[key], repr(key), where, may_be_empty=may_be_empty)


def _text(value: Any, name: str, where: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} is {type(value).__name__}, it must be a string")
    if not may_be_empty and not value.strip():
        raise InputError(f"{where}: {name} is empty; there is nothing to score")
    return value


def _texts(row: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
    values = row[key]
    if not isinstance(values, list) or not 2 <= len(values) <= CHOICES_MAX:
        found = f"a list of {len(values)}" if isinstance(values, list) else type(values).__name__
        raise InputError(f"{where}: {key!r} is {found}; it must be a list of 2 to {CHOICES_MAX} strings")
    named = ((value, f"{key}[{i}]") for i, value in enumerate(values))
    return tuple(_text(value, name, where, may_be_empty=may_be_empty) for value, name in named)


def _gold(row: dict[str, Any], num_choices: int, where: str) -> int:
    gold = row["gold"]
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < num_choices:
        raise InputError(
            f"{where}: 'gold' is {ascii(gold)[:80]}; it must be a whole number from 0 to {num_choices - 1}"
        )
    return gold


def _choice(row: dict[str, Any], line: int, where: str) -> Item:
    context, choices = _string(row, "ctx", where, may_be_empty=True), _texts(row, "choices", where)
    return Item(
        line=line,
        queries=tuple(Query(context, choice) for choice in choices),
        gold=_gold(row, len(choices), where),
        # The harness's own choices have no leading space: it puts one between, and does not count it.
        lengths=tuple(len(choice.removeprefix(" ")) for choice in choices),
    )


def _winogrande(row: dict[str, Any], line: int, where: str) -> Item:
    contexts, continuation = _texts(row, "ctxs", where), _string(row, "cont", where)
    queries = tuple(Query(context, continuation) for context in contexts)
    return Item(line=line, queries=queries, gold=_gold(row, len(contexts), where))


def _lambada(row: dict[str, Any], line: int, where: str) -> Item:
    context, target = _string(row, "ctx", where, may_be_empty=True), _string(row, "target", where)
    return Item(line=line, queries=(Query(context, target),), gold=0)


def _blimp(row: dict[str, Any], line: int, where: str) -> Item:
    good, bad = _string(row, "good", where), _string(row, "bad", where)
    return Item(
        line=line,
        queries=(Query("", f" {good}"), Query("", f" {bad}")),
        gold=0,
        group=_string(row, "uid", where),
        field=_string(row, "field", where).replace("/", "_"),  # BLiMP's files spell one of the fields in two ways
    )


class _Format(NamedTuple):
    keys: tuple[str, ...]
    parse: Callable[[dict[str, Any], int, str], Item]


FORMATS = {
    "choice": _Format(("ctx", "choices", "gold"), _choice),
    "winogrande": _Format(("ctxs", "cont", "gold"), _winogrande),
    "lambada": _Format(("ctx", "target"), _lambada),
    "blimp": _Format(("uid", "field", "term", "good", "bad"), _blimp),
}
