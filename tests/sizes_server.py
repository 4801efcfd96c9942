"""The page of `spectrim ui` as a program of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from command_line import call


def all_sizes(where: Path) -> Path:
    """A folder that holds all sizes of the embedded model, with its tokenizer."""
    answer = call(
        *("compress", "builtin:tiny", "--any-size", "--method", "svd-llm", "--keep", "0.8", "--anchors", "0.8,0.5"),
        *("--calib-windows", "16", "--calib-length", "64", "--eval", "none", "--out", where / "all"),
    )
    assert answer.code == 0, answer.err
    return where / "all"


@contextmanager
def page_of_sizes(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running program and the address that it says; empty where it ended without one."""
    words = [sys.executable, "-m", "spectrim", "ui", str(folder), "--device", "cpu", "--json", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = "".join(process.stdout.readline() for _ in range(3))  # {"address": ...} takes three lines
        yield process, json.loads(said)["address"] if said else ""
    finally:
        process.terminate()
        process.wait(60)
