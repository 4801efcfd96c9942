"""A mistake on the command line is told before anything that loads models is imported."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.fault(68)]

MOST_SECONDS = 2.0
"""Of processor time, from the start of the process to its end (docs/reliability.md)."""
WITHOUT_TORCH = {
    "compress": (
        ("compress", "builtin:tiny", "--out", "OUT", "--keep", "20", "--device", "gpu", "--calib-length", "1"),
        ("3 things are wrong", "did you mean 0.2?", "--device gpu: not a device", "calib_length must be at least 2"),
    ),
    "plan": (("plan", "builtin:tiny", "--method", "svd-lm", "--dtype", "half"), ("did you mean 'svd-llm'?", "--dtype")),
    "eval": (("eval", "builtin:tiny", "--task-limit", "3"), ("--task-limit applies to --tasks",)),
    "export": (("export", "builtin:tiny", "--out", "OUT", "--to", "gguf"), ("--to gguf: not supported",)),
}
OPTIONS_OF_A_METHOD = (
    ("compress", "builtin:tiny", "--out", "OUT", "--any-size", "--anchors", "0.4,0.9", "--set", "stepz=3"),
    ("2 things are wrong", "anchors must descend strictly between 1 and 0, got 0.4, 0.9", "did you mean 'steps'?"),
)
"""Methods are written with torch, so that it is imported to say this."""


def refuse(words: tuple[str, ...], out: Path, *python: str) -> str:
    """What the command says, in a process of its own."""
    given = [str(out) if word == "OUT" else word for word in words]
    command = [sys.executable, *python, "-m", "spectrim", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert not out.exists()
    return done.stderr


def refuse_and_list_imports(words: tuple[str, ...], out: Path) -> tuple[str, set[str]]:
    """What it says, and the modules that were imported until then."""
    told = refuse(words, out, "-X", "importtime").splitlines()
    imported = {line.rpartition("|")[2].strip() for line in told if line.startswith("import time:")}
    assert "spectrim.cli" in imported  # else the list would prove nothing
    return "\n".join(line for line in told if not line.startswith("import time:")), imported


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_a_mistake_is_told_before_torch_is_imported(name: str, tmp_path: Path) -> None:
    words, says = WITHOUT_TORCH[name]
    message, imported = refuse_and_list_imports(words, tmp_path / "out")
    assert not {"torch", "transformers", "safetensors", "numpy"} & imported
    for text in says:
        assert text in message


def test_a_mistake_in_a_method_is_told_before_models_are_imported(tmp_path: Path) -> None:
    words, says = OPTIONS_OF_A_METHOD
    message, imported = refuse_and_list_imports(words, tmp_path / "out")
    assert not {"transformers", "safetensors"} & imported
    for text in says:
        assert text in message


@pytest.mark.slow
def test_a_mistake_is_told_within_two_seconds(tmp_path: Path) -> None:
    assert cheapest(lambda: refuse(WITHOUT_TORCH["compress"][0], tmp_path / "out")) < MOST_SECONDS


@pytest.mark.slow
def test_a_mistake_in_a_method_costs_little_beside_the_import_of_torch(tmp_path: Path) -> None:
    torch = cheapest(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
    assert cheapest(lambda: refuse(OPTIONS_OF_A_METHOD[0], tmp_path / "out")) < torch + 0.5


def cheapest(run: Callable[[], object]) -> float:
    """Seconds of processor time of the cheapest of three runs: how long a person waits also depends on others' work."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = spent()
        run()
        times.append(spent() - before)
    return min(times)
