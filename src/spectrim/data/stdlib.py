"""`builtin:stdlib`: the prose of the running interpreter's own standard library, read and never imported.

1. List the `.py` sources by top-level module or package; leave out tests, data tables and foreign code.
2. Take docstrings (ast), long comment blocks (a lexer of strings and comments) and pydoc's help topics.
3. Split by a stable hash of the top-level name, about three parts for calibration to one for evaluation.
4. Drop every longer paragraph that was seen before: within a part, and from evaluation what calibration has.

The text differs between Python versions, so `note` names the version and `Texts.sha256` pins the content.
"""

import ast
import functools
import gc
import hashlib
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import decode_source
from pathlib import Path
from typing import Literal, NamedTuple

from spectrim.data.part import BLANK_LINE, Part, counted, first_chars
from spectrim.errors import InputError

SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "__pycache__"}
    # Packaged apart by several systems: with them the text would differ between installs of one version.
    | {"distutils", "ensurepip", "tkinter", "turtledemo"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "lib-dynload", "config-")
TOPICS = "pydoc_data/topics.py"  # the language reference as one dict of strings: the best prose there is
MIN_COMMENT_LINES = 3
MIN_PROSE_CHARS = 120
MIN_LETTER_RATIO = 0.75  # below it a comment block is mostly disabled code, tables or rulers
LONG_PARAGRAPH_CHARS = 40  # shorter ones ("Return True.") may repeat: removing them only breaks the prose

# Strings come first in importance: a line that starts with "#" inside a string is not a comment.
_STRING = (
    r'[rRbBuUfF]{0,2}(?:"""(?:[^"\\]|\\.|"(?!""))*"""'
    r"|'''(?:[^'\\]|\\.|'(?!''))*'''"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'(?:[^'\\\n]|\\.)*')"
)
_BLOCK_OR_STRING = re.compile(rf"(?P<block>^[ \t]*\#[^\n]*(?:\n[ \t]*\#[^\n]*)*)|{_STRING}|\#[^\n]*", re.S | re.M)
_COMPOUND = (
    *(ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef),
    *(ast.If, ast.For, ast.While, ast.With, ast.Try, ast.ExceptHandler),
)
_PARAGRAPH_BREAK = re.compile(r"\n(?:[ \t]*\n)+")


class Library(NamedTuple):
    """Both parts, one document a source file, and what was left out."""

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    num_modules: dict[str, int]
    unreadable: tuple[str, ...]


def read_stdlib(*, split: Literal["calibration", "evaluation"], max_chars: int | None) -> Part:
    """The calibration or the evaluation part of the standard library's prose."""
    library = read_library(stdlib_root())
    documents = first_chars(library.calibration if split == "calibration" else library.evaluation, max_chars)
    note = (
        f"{split} part of the standard library of {platform.python_implementation()} "
        f"{platform.python_version()}: {library.num_modules[split]} modules, "
        f"{counted(documents, limit=max_chars)}"
    )
    if library.unreadable:
        note += f"; {len(library.unreadable)} files not parsed: {', '.join(library.unreadable[:5])}"
    return Part(documents, BLANK_LINE, note)


def stdlib_root() -> Path:
    """Where the running interpreter keeps its own `.py` sources."""
    return Path(sysconfig.get_path("stdlib"))


def part_of(module: str) -> Literal["calibration", "evaluation"]:
    """The part a top-level module belongs to, the same on every machine and in every release."""
    return "evaluation" if hashlib.sha256(module.encode()).digest()[0] % 4 == 0 else "calibration"


@contextmanager
def _collector_paused() -> Iterator[None]:
    # Syntax trees are millions of short-lived objects; collecting among them doubles the time (4 s for 2 s).
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@functools.lru_cache(maxsize=2)
@_collector_paused()
def read_library(root: Path) -> Library:
    """Every source below `root`, split and freed of repeats; cached, for a run asks for both parts."""
    documents: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    modules: dict[str, set[str]] = {"calibration": set(), "evaluation": set()}
    unreadable: list[str] = []
    for path in source_files(root):
        name = path.relative_to(root).as_posix()
        module = name.split("/")[0].removesuffix(".py")
        try:
            source = decode_source(path.read_bytes())
            pieces = topics(source) if name == TOPICS else prose(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            unreadable.append(name)  # counted and named in the note
            continue
        if pieces:
            documents[part_of(module)].append(BLANK_LINE.join(pieces))
            modules[part_of(module)].add(module)
    seen: set[str] = set()
    calibration = drop_seen(documents["calibration"], seen)
    evaluation = drop_seen(documents["evaluation"], seen)
    if not calibration or not evaluation:
        raise InputError(
            f"builtin:stdlib: {root} holds no readable Python sources ({len(unreadable)} files failed), "
            "as in a zipped or stripped interpreter; pass a text file, a folder or hub:NAME instead"
        )
    counts = {part: len(names) for part, names in modules.items()}
    return Library(calibration, evaluation, counts, tuple(unreadable))


def source_files(root: Path) -> Iterator[Path]:
    """Sources in a fixed order, without tests, tables and third-party code."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(
            name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(SKIPPED_PREFIXES)
        )
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                yield Path(folder, name)


def prose(source: str) -> list[str]:
    """Docstrings and long comment blocks of one module, cleaned, in the order of the file."""
    found = [*_docstrings(source), *_comment_blocks(source)]
    return [text for _, text in sorted(found)]


def topics(source: str) -> list[str]:
    """The long strings of pydoc's table of help topics."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [inspect.cleandoc(text) for text in strings if isinstance(text, str) and len(text) >= MIN_PROSE_CHARS]


def drop_seen(documents: Sequence[str], seen: set[str]) -> tuple[str, ...]:
    """The documents without long paragraphs that are in `seen`; what they hold is added to `seen`."""
    kept = []
    for document in documents:
        fresh = []
        for paragraph in _PARAGRAPH_BREAK.split(document):
            key = " ".join(paragraph.split())
            if key and not (key in seen and len(paragraph) > LONG_PARAGRAPH_CHARS):
                fresh.append(paragraph.rstrip())
            seen.add(key)
        if fresh:
            kept.append(BLANK_LINE.join(fresh))
    return tuple(kept)


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old modules hold invalid escapes; they are not ours to report
        bodies: list[ast.AST] = [ast.parse(source)]
    while bodies:
        node = bodies.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
        # Only compound statements are followed: expressions hold no docstring and are most of the tree.
        for field in ("body", "orelse", "handlers", "finalbody"):
            children = getattr(node, field, ())
            bodies += [child for child in children if isinstance(child, _COMPOUND)]


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    for match in _BLOCK_OR_STRING.finditer(source):
        block = match["block"]
        if block is None or block.count("\n") + 1 < MIN_COMMENT_LINES:
            continue
        lines = (line.lstrip().lstrip("#!") for line in block.split("\n"))
        # cleandoc treats its first line apart; an empty one makes it strip the same margin from all.
        text = inspect.cleandoc("\n" + "\n".join(lines))
        if is_prose(text):
            yield source.count("\n", 0, match.start()) + 1, text


def is_prose(text: str) -> bool:
    """Whether a comment reads like sentences: long enough, and mostly letters and spaces."""
    letters = sum(1 for char in text if char.isalpha() or char == " ")
    return len(text) >= MIN_PROSE_CHARS and letters >= MIN_LETTER_RATIO * len(text)
