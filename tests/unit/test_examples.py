"""The examples and benchmarks import what exists; running them is `make demo` and the machines of the benchmarks."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_imports_what_there_is(script: Path, monkeypatch: pytest.MonkeyPatch):
    """Found: the demo imported a function that had moved, and no test ran it."""
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    assert callable(runpy.run_path(str(script), run_name="imported").get("main", print))
