"""The commands and the Python of the documents, run page by page on small folders under the names used there.

A page is run from its first block to its last, in one folder, in which `MODEL`, `Qwen/Qwen3-0.6B` and `small` exist: a
random Llama of two blocks, and that model compressed. Commands are run as they are written, with the options of `BRIEF`
behind them, which cut windows and steps. What needs a hub, a GPU, another program or hours is only parsed
(`test_docs_snippets.py`): commands of `NOT_RUN`, scripts of benchmarks/ and examples/, blocks marked `not run`.
"""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer

import task_files
from command_line import QUICK, call, small_model
from snippets import PAGES, Snippet, read_snippets
from spectrim import any_size_job, job
from spectrim.cli import app
from spectrim.cli_request import request_from
from spectrim.registry import make_method

pytestmark = pytest.mark.slow

NOT_RUN = {"push": "writes to the hub", "ui": "serves until it is stopped"}
BRIEF = {
    "compress": (*QUICK, "--gradient-windows", "4", "--train-windows", "8", "--quality-gate", "0", "--overwrite"),
    "eval": ("--windows", "2", "--length", "64"),
    "generate": ("--max-new-tokens", "4"),
    "export": ("--overwrite",),
    "report": ("--overwrite",),
    "doctor": ("--no-hub",),
}
FEW = {"steps": 2, "distil_steps": 2, "prune_steps": 2, "mixed_steps": 2, "batch_size": 2, "adapter_rank": 8}
STEPS = re.compile(r"^(kl|block):\d+$")
NEEDS = {
    "--lm-eval": "lm_eval", "lm_eval": "lm_eval", "onnx": "onnxruntime", "executorch": "executorch", "lq-lora": "scipy",
}  # fmt: skip
"""Words of a command that work only where this module is installed."""
TRAIN = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[2])).__name__)
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders and files that the pages speak of."""
    here = tmp_path_factory.mktemp("shelf")
    model = small_model(
        here / "MODEL", hidden_size=128, intermediate_size=256, max_position_embeddings=512, num_hidden_layers=2
    )
    shutil.copytree(model, here / "Qwen" / "Qwen3-0.6B")
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        for name, method in (("small", "svd-llm"), ("other", "svd")):
            assert call("compress", model, "--out", here / name, *QUICK, "--method", method).code == 0
    shutil.copytree(here / "small", here / "all-sizes")
    (here / "tasks").mkdir()
    for name in ("arc_easy", "arc_challenge"):
        (here / "tasks" / f"{name}.jsonl").write_text("".join(f"{json.dumps(i)}\n" for i in task_files.CHOICE))
    (here / "facts.jsonl").write_text(
        '{"question": "What do bees make?", "answers": ["honey"], "evidence": "Honey."}\n'
    )
    (here / "train.py").write_text(TRAIN)
    code = [Path(json.__file__).with_name(f"{name}.py").read_text() for name in ("decoder", "encoder", "scanner")]
    (here / "code.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in code))
    return here


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with (
        mock.patch.object(job, "reload_difference", return_value=0.0),
        mock.patch.object(any_size_job, "reload_difference", return_value=0.0),
    ):
        yield tmp_path


def brief(words: list[str]) -> list[str]:
    """A command of spectrim with fewer windows and steps."""
    name = words[0]
    short = [STEPS.sub(r"\1:2", word) for word in words] + list(BRIEF.get(name, ()))
    if name != "compress":
        return short
    group: Any = typer.main.get_command(app)
    context = group.commands[name].make_context(name, words[1:])
    request = request_from(context, context.params)
    method = make_method(request.method, request.preset, request.options)
    if "--recover" not in words:  # steps that a recipe names
        for step in request.recover:
            short += ["--recover", STEPS.sub(r"\1:2", step)]
    for field, few in FEW.items():
        if getattr(method, field, 0) > few:
            short += ["--set", f"{field}={few}"]
    return [*short, *(["--any-size-steps", "8"] if request.any_size else [])]


def missing(words: list[str]) -> str | None:
    """The module that a command needs and that is not installed."""
    needed = [NEEDS[word] for word in words if word in NEEDS]
    return next((name for name in needed if importlib.util.find_spec(name) is None), None)


def run_command(words: list[str], where: str) -> bool:
    """Whether it was run; a command that fails fails the test."""
    said = f"{where}: {' '.join(words)}"
    if missing(words) is not None:
        return False
    if words[0] == "spectrim" and words[1] not in NOT_RUN:
        answer = call(*brief(words[1:]))
        assert answer.code == 0, f"{said}\n{answer.err}"
        return True
    if words[:3] == ["python", "-m", "spectrim.run"]:
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{said}\n{done.stderr}"
        return True
    return False


def run_python(snippet: Snippet, names: dict[str, Any]) -> bool:
    """Whether it was run, in the page's own names. Python that needs an extra which is not installed is not."""
    tops = re.findall(r"^(?:import|from) (\w+)", snippet.text, flags=re.MULTILINE)
    if any(importlib.util.find_spec(top) is None for top in tops):
        return False
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(snippet.text, snippet.where, "exec"), names)
    return True


def run_page(snippets: list[Snippet], folder: Path) -> int:
    """How many commands and blocks of Python were run."""
    for snippet in snippets:
        if snippet.file is not None:
            (folder / snippet.file).write_text(snippet.text)
    count, names = 0, {"__name__": "page"}
    for snippet in snippets:
        if snippet.not_run is not None:
            continue
        if snippet.language == "bash":
            count += sum(run_command(words, snippet.where) for words in snippet.commands())
        elif snippet.language == "python":
            count += run_python(snippet, names)
    return count


def runnable(page: Path) -> bool:
    """Whether a page has a block of Python, or a command of ours, that is not marked."""
    return any(
        snippet.not_run is None and (snippet.language == "python" or re.search(r"^spectrim ", snippet.text, re.M))
        for snippet in read_snippets(page)
        if snippet.language in ("bash", "python")
    )


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_what_a_page_says_works(page: Path, folder: Path) -> None:
    assert run_page(read_snippets(page), folder) > 0


def test_a_command_that_fails_is_seen(folder: Path) -> None:
    page = PAGES[0]
    with pytest.raises(AssertionError, match="no-such-folder"):
        run_page([Snippet(page, 1, "bash", "spectrim inspect no-such-folder")], folder)
    with pytest.raises(NameError):
        run_page([Snippet(page, 1, "python", "no_such_name")], folder)
