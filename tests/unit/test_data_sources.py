"""Texts from files, the standard library and the hub: exact content, splits, limits and every refusal."""

import ast
import gc
import gzip
import hashlib
import json
import lzma
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.data import stdlib
from spectrim.data.files import SEPARATOR_LINE, read_file
from spectrim.data.hub import DatasetName, parse_dataset
from spectrim.data.sources import load_texts
from spectrim.errors import InputError, UsageError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"reference texts are not at {SHARED}")


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# ---------- builtin:stdlib


def paragraphs(documents: tuple[str, ...]) -> set[str]:
    """Longer paragraphs by an independent rule: runs of non-blank lines, white space normalised."""
    found, run = set(), []
    for line in [line for document in documents for line in [*document.split("\n"), ""]]:
        if line.strip():
            run.append(line)
        elif run:
            found.add(" ".join(" ".join(run).split()))
            run = []
    return {paragraph for paragraph in found if len(paragraph) > 40}


def test_stdlib_parts_share_no_document_and_no_paragraph():
    calibration = load_texts("builtin:stdlib", split="calibration")
    evaluation = load_texts("builtin:stdlib", split="evaluation")
    assert len(paragraphs(evaluation.documents)) > 1000
    assert paragraphs(calibration.documents) & paragraphs(evaluation.documents) == set()
    assert set(calibration.documents) & set(evaluation.documents) == set()
    assert calibration.sha256 != evaluation.sha256


def test_stdlib_is_large_enough_about_three_to_one_and_says_what_it_is():
    calibration = load_texts("builtin:stdlib", split="calibration")
    evaluation = load_texts("builtin:stdlib", split="evaluation")
    assert len(calibration.text) > 1_000_000
    assert 1.5 < len(calibration.text) / len(evaluation.text) < 6
    version = ".".join(map(str, sys.version_info[:3]))
    assert f"{version}:" in evaluation.note
    assert f"{len(evaluation.documents):,} documents" in evaluation.note
    num_chars = sum(map(len, evaluation.documents))
    assert f"{num_chars:,} characters" in evaluation.note
    assert re.search(r"\b\d+ modules\b", evaluation.note)


def test_stdlib_is_read_again_to_the_same_text_in_seconds_and_leaves_the_collector_on():
    first = load_texts("builtin:stdlib", split="evaluation")
    stdlib.read_library.cache_clear()
    started_s = time.process_time()
    again = load_texts("builtin:stdlib", split="evaluation")
    assert time.process_time() - started_s < 10  # 2 s on an idle machine; the rest is for a busy one
    assert again.sha256 == first.sha256
    assert gc.isenabled()


def test_stdlib_split_is_a_fixed_property_of_the_module_name():
    assert {name: stdlib.part_of(name) for name in ("asyncio", "email", "json", "typing", "pydoc_data")} == {
        name: "evaluation" if hashlib.sha256(name.encode()).digest()[0] % 4 == 0 else "calibration"
        for name in ("asyncio", "email", "json", "typing", "pydoc_data")
    }


def test_stdlib_reads_without_importing():
    before = "turtledemo.chaos" in sys.modules, "this" in sys.modules
    load_texts("builtin:stdlib", split="calibration")
    assert ("turtledemo.chaos" in sys.modules, "this" in sys.modules) == before
    names = {path.relative_to(stdlib.stdlib_root()).parts[0] for path in stdlib.source_files(stdlib.stdlib_root())}
    assert names & {"test", "idlelib", "lib2to3", "site-packages", "encodings", "tkinter"} == set()
    assert "json" in names


MODULE = '''"""Module text.

    Indented line.
"""
# A long comment that explains in three lines why something
# is done the way that it is done here, so that the reader
# of the module understands it without asking anyone at all.
TABLE = """
# This looks like a long comment block but it is the content
# of a string that is assigned to a name, so it is neither a
# docstring nor a comment, and it must not be taken as prose.
"""
# x = f(a[0], b[1]) + g(c[2], d[3]) * 12345 % 678 // 90
# y = f(a[0], b[1]) + g(c[2], d[3]) * 12345 % 678 // 90
# z = f(a[0], b[1]) + g(c[2], d[3]) * 12345 % 678 // 90
raise SystemExit("executed")
if TABLE:
    class Thing:
        """Class text."""

        async def act(self):
            "Function text."
            return "not a docstring"
'''


def test_prose_takes_docstrings_and_comment_blocks_in_order_and_nothing_else():
    comment = "\n".join(line[2:] for line in MODULE.split("\n")[4:7])
    assert stdlib.prose(MODULE) == [
        "Module text.\n\nIndented line.",
        comment,
        "Class text.",
        "Function text.",
    ]


def test_prose_finds_every_docstring_that_a_full_walk_finds():
    source = Path(ast.__file__).read_text(encoding="utf-8")
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    wanted = {text for text in map(ast.get_docstring, nodes) if text}
    assert wanted
    assert wanted <= set(stdlib.prose(source))


def test_drop_seen_removes_long_repeats_only():
    long = "This paragraph is certainly longer than forty characters."
    seen: set[str] = set()
    assert stdlib.drop_seen([f"{long}\n\nShort."], seen) == (f"{long}\n\nShort.",)
    spaced = long.replace(" ", "\n    ", 1)
    assert stdlib.drop_seen([f"Short.\n\n{spaced}\n\n    Kept margin.", long], seen) == ("Short.\n\n    Kept margin.",)


def test_stdlib_without_sources_names_the_folder(tmp_path: Path):
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path))} holds no readable Python sources"):
        stdlib.read_library(tmp_path)


def test_stdlib_stops_at_max_chars():
    whole = load_texts("builtin:stdlib", split="calibration")
    short = load_texts("builtin:stdlib", split="calibration", max_chars=5000)
    assert "".join(short.documents) == "".join(whole.documents)[:5000]
    assert "stopped at the limit of 5,000" in short.note


def test_unknown_builtin_suggests_the_known_one():
    with pytest.raises(UsageError, match="unknown built-in text 'builtin:stdlb'; did you mean 'builtin:stdlib'"):
        load_texts("builtin:stdlb", split="calibration")


# ---------- files


def test_a_file_without_separators_is_one_document(tmp_path: Path):
    texts = load_texts(write(tmp_path / "a.txt", "one\r\n\n two \n"), split="evaluation")
    assert texts.documents == ("one\n\n two \n",)
    assert texts.text == "one\n\n two \n"
    assert texts.sha256 == hashlib.sha256(b"one\n\n two \n").hexdigest()
    assert texts.note == "a.txt: 1 documents, 11 characters"


def test_separator_lines_split_and_the_text_stays_exact(tmp_path: Path):
    content = "one\n<|endoftext|>\ntwo <|endoftext|> inside\n<|endoftext|>\n\nthree"
    texts = load_texts(write(tmp_path / "a.txt", content), split="calibration")
    assert texts.documents == ("one\n", "two <|endoftext|> inside\n", "\nthree")
    assert texts.text == content


@given(lines=st.lists(st.sampled_from(["<|endoftext|>", "", "a", " <|endoftext|>", "é"]), min_size=1, max_size=12))
def test_text_is_the_file_for_any_arrangement_of_separators(tmp_path_factory: pytest.TempPathFactory, lines):
    content = "a\n" + "\n".join(lines)
    path = tmp_path_factory.mktemp("any") / "a.txt"
    assert load_texts(write(path, content), split="evaluation").text == content


@pytest.mark.parametrize(("suffix", "pack"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str, pack):
    path = tmp_path / f"a.txt{suffix}"
    assert load_texts(write(path, pack("text é\n".encode())), split="evaluation").text == "text é\n"
    rows = tmp_path / f"a.jsonl{suffix}"
    assert load_texts(write(rows, pack(b'{"text": "x"}\n')), split="evaluation").documents == ("x",)


@pytest.mark.fault(69)
@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_damaged_compression_is_an_input_error(tmp_path: Path, suffix: str):
    with pytest.raises(InputError, match=f"damaged or not {suffix} data"):
        load_texts(write(tmp_path / f"a.txt{suffix}", b"this is not compressed"), split="evaluation")
    pack = lzma.compress if suffix == ".xz" else gzip.compress
    cut = pack(b"text of some length, long enough to be cut")[:-12]
    with pytest.raises(InputError, match="damaged"):
        load_texts(write(tmp_path / f"b.txt{suffix}", cut), split="evaluation")


@pytest.mark.fault(69)
def test_max_chars_reads_only_the_beginning_of_a_stream(tmp_path: Path):
    # The stream is cut off: reading it to its end fails, so success shows that the end was not read.
    stream = lzma.compress("".join(f"line {i}\n" for i in range(400_000)).encode(), preset=0)
    path = write(tmp_path / "a.txt.xz", stream[: len(stream) // 2])
    texts = load_texts(path, split="calibration", max_chars=12)
    assert texts.text == "line 0\nline "
    assert texts.note == "a.txt.xz: 1 documents, 12 characters (stopped at the limit of 12)"
    with pytest.raises(InputError, match="damaged"):
        load_texts(path, split="calibration")


def test_json_lines_take_the_text_field(tmp_path: Path):
    rows = [{"text": "one", "id": 1}, {"text": "two\n\nparts"}]
    path = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert load_texts(path, split="evaluation").documents == ("one", "two\n\nparts")
    assert load_texts(path, split="evaluation").text == "one\n\ntwo\n\nparts"
    assert load_texts(path, split="evaluation", max_chars=5).documents == ("one", "tw")


@pytest.mark.fault(69)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 1}', r"a\.jsonl, line 2: no field 'text'; keys found: 'body', 'id'"),
        ("{}", "line 2: no field 'text'; keys found: none"),
        ("[1]", "line 2: a JSON list; each line must be an object"),
        ('{"text": 3}', "line 2: field 'text' is int, it must be a string"),
        ('{"text": "cut', "line 2: not JSON"),
        (r'{"text": "a\ud800"}', "line 2: character 1 of 'text' is a lone surrogate"),
        ("\0", "binary, not text .NUL at line 2, character 0"),
    ],
)
def test_json_lines_refusals_name_the_line(tmp_path: Path, line: str, message: str):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        load_texts(path, split="evaluation")


@pytest.mark.fault(69)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: no text in it \(0 characters"),
        ("a.txt", b" \n", r"no text in it \(2 characters, all white space\)"),
        ("a.jsonl", b"\n", r"no text in it \(0 characters"),
        ("a.txt", b"<|endoftext|>\n\n", "no text in it"),
        ("a.txt", b"abc\0def", "binary, not text .NUL at character 3"),
        ("a.txt", b"caf\xe9 noir", "not UTF-8 .byte 0xe9"),
        ("a.parquet", b"PAR1", "cannot tell how to read this file from its name; allowed endings: .txt,"),
    ],
)
def test_file_refusals(tmp_path: Path, name: str, content: bytes, message: str):
    with pytest.raises(InputError, match=message):
        load_texts(write(tmp_path / name, content), split="evaluation")


@pytest.mark.fault(69)
@pytest.mark.parametrize("missing", ["nothing-here", "folder/nothing-here.txt", "./a/b", "/nowhere/a.txt"])
def test_a_missing_file_says_so(missing: str):
    with pytest.raises(InputError, match=f"{re.escape(missing)}: no such file or folder"):
        load_texts(missing, split="evaluation")


def test_a_byte_order_mark_is_not_text(tmp_path: Path):
    assert load_texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc"), split="evaluation").text == "abc"


def test_a_folder_gives_its_text_files_by_name(tmp_path: Path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a.jsonl", '{"text": "first"}')
    write(tmp_path / "notes.md", "ignored")
    texts = load_texts(str(tmp_path), split="evaluation")
    assert texts.documents == ("first", "second")
    assert texts.note == "a.jsonl: 1 documents, 5 characters; b.txt: 1 documents, 6 characters"


def test_a_folder_without_text_names_what_it_holds(tmp_path: Path):
    write(tmp_path / "notes.md", "ignored")
    with pytest.raises(InputError, match=r"no text file among the 1 entries of this folder \(notes\.md\)"):
        load_texts(str(tmp_path), split="evaluation")


def test_several_sources_by_comma_or_list(tmp_path: Path):
    one, two = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two")
    joined = load_texts(f"{one}, {two}", split="evaluation")
    assert joined.text == "one\n\ntwo"
    assert joined.source == f"{one},{two}"
    assert load_texts([one, two], split="evaluation") == joined


def test_a_path_that_holds_a_comma_is_one_path(tmp_path: Path):
    assert load_texts(write(tmp_path / "a,b.txt", "one"), split="evaluation").documents == ("one",)


def test_sources_with_and_without_separators_mix_on_lines_of_their_own(tmp_path: Path):
    one, two = write(tmp_path / "1.txt", "one"), write(tmp_path / "2.txt", "two\n<|endoftext|>\nthree")
    texts = load_texts([one, two], split="evaluation")
    assert texts.documents == ("one\n", "two\n", "three\n")
    assert texts.text == f"one\n{SEPARATOR_LINE}two\n{SEPARATOR_LINE}three\n"


def test_max_chars_counts_over_all_sources_and_names_the_unread(tmp_path: Path):
    one, two, three = (write(tmp_path / f"{i}.txt", "abcd") for i in (1, 2, 3))
    texts = load_texts([one, two, three], split="evaluation", max_chars=6)
    assert texts.documents == ("abcd", "ab")
    assert texts.note.endswith(f"not read, for the limit of 6 characters was met: {three}")


@pytest.mark.parametrize("spec", ["", " , ", []])
def test_no_text_named(spec):
    with pytest.raises(UsageError, match="no text named"):
        load_texts(spec, split="evaluation")


def test_max_chars_must_be_positive():
    with pytest.raises(UsageError, match="max_chars is 0; it must be at least 1"):
        load_texts("builtin:stdlib", split="evaluation", max_chars=0)


# ---------- hub


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows) -> list[tuple]:
    calls: list[tuple] = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("spec", "split", "expected"),
    [
        ("hub:wikitext", "calibration", DatasetName("wikitext", None, "train")),
        (
            "hub:wikitext:wikitext-2-raw-v1",
            "evaluation",
            DatasetName("wikitext", "wikitext-2-raw-v1", "test"),
        ),
        ("hub:a/b:c:validation", "evaluation", DatasetName("a/b", "c", "validation")),
        ("hub:a/b::validation", "calibration", DatasetName("a/b", None, "validation")),
        ("owner/name", "calibration", DatasetName("owner/name", None, "train")),
    ],
)
def test_dataset_specs(spec: str, split, expected: DatasetName):
    assert parse_dataset(spec, split=split) == expected


@pytest.mark.parametrize("spec", ["hub:", "hub:a:b:c:d"])
def test_malformed_dataset_specs(spec: str):
    with pytest.raises(UsageError, match="not a dataset; write hub:NAME"):
        load_texts(spec, split="calibration")


def test_a_dataset_is_streamed_to_the_limit(monkeypatch: pytest.MonkeyPatch):
    def endless():
        while True:
            yield {"text": "abcd"}

    calls = fake_datasets(monkeypatch, endless())
    texts = load_texts("owner/name", split="calibration", max_chars=10)
    assert calls == [("owner/name", None, "train", True)]
    assert texts.documents == ("abcd", "abcd", "ab")
    assert texts.note == "hub:owner/name::train: 3 documents, 10 characters (stopped at the limit of 10)"


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ConnectionError("Couldn't reach the Hub"), "no network, or the hub did not answer"),
        (RuntimeError("httpx.ConnectError: name resolution"), "no network"),
        (FileNotFoundError("Dataset 'owner/name' doesn't exist"), "the dataset cannot be read"),
        ([{"sentence": "x"}], "row 0: no field 'text'; keys found: 'sentence'"),
        ([{"text": None}], "row 0: field 'text' is NoneType"),
        ([{"text": ""}], "no text in 1 rows"),
    ],
)
def test_dataset_refusals(monkeypatch: pytest.MonkeyPatch, rows, message: str):
    fake_datasets(monkeypatch, rows)
    with pytest.raises(InputError, match=message):
        load_texts("owner/name", split="calibration")


def test_a_dataset_without_the_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"install spectrim\[hub\]"):
        load_texts("hub:wikitext", split="calibration")


# ---------- shared texts


@pytest.mark.shared
@needs_shared
@pytest.mark.parametrize(
    ("name", "num_documents"),
    [("valid.novels.txt", 10), ("valid.wiki.txt", 22), ("wikitext2.test.raw.txt", 1)],
)
def test_reference_texts_come_back_exactly(name: str, num_documents: int):
    texts = load_texts(str(SHARED / name), split="evaluation")
    assert len(texts.documents) == num_documents
    assert texts.text == (SHARED / name).read_text(encoding="utf-8")


@pytest.mark.shared
@needs_shared
def test_the_large_archive_is_not_read_whole():
    started_s = time.process_time()
    part = read_file(SHARED / "train.txt.xz", max_chars=100_000)
    assert time.process_time() - started_s < 1  # the whole takes more than ten seconds
    assert part.num_chars + (len(part.documents) - 1) * len(SEPARATOR_LINE) == 100_000
