"""Every command and every line of Python in the documents is one that this version takes.

Nothing is run here: commands go through the real parsers (of the command line and of the scripts) and stop there,
Python is compiled, its imports are looked up and its calls of spectrim are bound to the functions' signatures.
`test_docs_run.py` runs what a small machine can run.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import spectrim
from snippets import PAGES, ROOT, Snippet, inline_code, read_snippets
from spectrim.cli import app
from spectrim.cli_request import request_from
from spectrim.recipe import parse_recipe

SNIPPETS = [snippet for page in PAGES for snippet in read_snippets(page)]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOREIGN = {"vllm", "source", "torchrun"}
"""Programs of others: what stands behind them is theirs, and is not checked."""
PATH = re.compile(r"(?:src|tests|benchmarks|examples|docs)/[\w./-]+\.\w+")


def of(*languages: str) -> Any:
    chosen = [snippet for snippet in SNIPPETS if snippet.language in languages]
    assert chosen, f"no block of {languages}"
    return pytest.mark.parametrize("snippet", chosen, ids=lambda snippet: snippet.where)


# ---------- shell


class Parsed(BaseException):
    """Raised in a script in the place of its work."""


def check_spectrim(words: list[str], files: Path) -> None:
    """`spectrim WORDS`: the command and its options exist, values convert, and a request passes its own checks."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("spectrim", list(words), resilient_parsing=False)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, context._protected_args + context.args)
        context = command.make_context(name, rest, parent=context)
    if "recipe" in context.params and "set_" in context.params:
        flags = dict(context.params)
        own = files / str(flags["recipe"])
        request_from(context, {**flags, "recipe": str(own)} if own.is_file() else flags).check()


def check_python(words: list[str]) -> None:
    """`python ...`: one of our scripts with arguments that its parser takes, or one of the modules named below."""
    if words[:1] == ["-m"]:
        assert words[1] in {"spectrim.run", "pytest"}, f"python -m {words[1]}: neither ours nor known"
        return check_pytest(words[2:]) if words[1] == "pytest" else None
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]}: no such script"
    if "parse_args" in script.read_text():
        parse_with(script, words[1:])
    else:
        missing = [word for word in words[1:] if PATH.fullmatch(word) and not (ROOT / word).exists()]
        assert not missing, f"{words[0]}: no {missing}"


def parse_with(script: Path, words: list[str]) -> None:
    """Run a script up to its own `parse_args`, which takes the words or says what is wrong with them."""
    real: Callable[..., argparse.Namespace] = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        real(parser, *given, **named)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            runpy.run_path(str(script), run_name="__main__")


def check_pytest(words: list[str]) -> None:
    """Paths exist, marks are declared in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = {re.split(r"[:(]", line)[0] for line in settings["markers"]}
    for place, word in enumerate(words):
        if word == "-m":
            used = set(re.findall(r"\w+", words[place + 1])) - {"not", "and", "or"}
            assert used <= marks, f"pytest -m: {used - marks} not declared"
        if word.startswith("tests/"):
            assert (ROOT / word).exists(), f"{word}: no such test"


def check_pip(words: list[str]) -> None:
    """`pip install ...`: an extra of spectrim that is named is declared."""
    for extra in re.findall(r"spectrim\[([\w,]+)\]|\.\[([\w,]+)\]", " ".join(words)):
        for name in "".join(extra).split(","):
            assert name in PROJECT["optional-dependencies"], f"extra {name!r} is not declared in pyproject.toml"


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(words) <= targets, f"make {set(words) - targets}: no such target"


def check_command(words: list[str], files: Path) -> None:
    """One command of a block of shell, by its first word."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "spectrim":
        check_spectrim(rest, files)
    elif program == "python":
        check_python(rest)
    elif program == "torchrun":
        assert "-m" in rest, "torchrun"
    elif program == "pre-commit":
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    else:
        known = {"pip": check_pip, "pytest": check_pytest, "make": check_make}
        assert program in known or program in FOREIGN, f"{program}: a program that no test knows"
        if program in known:
            known[program](rest)


@of("bash")
def test_commands_are_taken_by_their_parsers(snippet: Snippet, tmp_path: Path) -> None:
    for other in read_snippets(snippet.page):
        if other.file is not None:
            target = tmp_path / other.file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(other.text)
    commands = snippet.commands()
    assert commands, "no command in it"
    for words in commands:
        try:
            check_command(words, tmp_path)
        except (Exception, SystemExit) as error:
            told = getattr(error, "message", None) or str(error)
            pytest.fail(f"{snippet.where}: {' '.join(words)}\n{type(error).__name__}: {told}", pytrace=False)


def inline_commands() -> list[tuple[str, str]]:
    found = [(str(page.relative_to(ROOT)), code) for page in PAGES for code in inline_code(page)]
    return [(page, code) for page, code in found if code.startswith("spectrim ")]


def test_commands_inside_sentences_exist_with_their_options() -> None:
    """Such commands are often cut short (`spectrim eval ...`), so only names are looked up."""
    wrong = []
    for page, code in inline_commands():
        names = code.replace(",", " ").split()[1:]
        command: Any = typer.main.get_command(app)
        while names and hasattr(command, "commands") and names[0] in command.commands:
            command = command.commands[names.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        unknown = [name for name in names if name.startswith("--") and name.split("=")[0] not in {*options, "--help"}]
        if hasattr(command, "commands") and names and "..." not in names[0] and "|" not in names[0]:
            unknown.append(names[0])
        wrong += [f"{page}: `{code}`: {name}" for name in unknown]
    assert inline_commands()
    assert wrong == []


def test_files_of_the_repository_that_are_named_exist() -> None:
    named = {(page, path) for page in PAGES for code in inline_code(page) for path in PATH.findall(code)}
    named = {(page, path) for page, path in named if "NAME" not in path}  # a name to be put in
    assert named
    missing = sorted(f"{page.relative_to(ROOT)}: {path}" for page, path in named if not (ROOT / path).exists())
    assert missing == []


# ---------- Python


def modules_of_extras() -> set[str]:
    """Top modules that the extras of pyproject.toml bring; they need not be here."""
    lines = [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    return {re.split(r"[\[<>=~! ]", line)[0].replace("-", "_") for line in lines}


def check_import(name: str, attributes: list[str]) -> None:
    """A module that can be found, and the names that are imported from it if it is ours."""
    top = name.split(".")[0]
    if top in modules_of_extras() and importlib.util.find_spec(top) is None:
        return
    assert importlib.util.find_spec(top) is not None, f"import {name}: not found"
    if top == "spectrim":
        module = importlib.import_module(name)
        missing = [attribute for attribute in attributes if not hasattr(module, attribute)]
        assert not missing, f"from {name} import {missing}: not there"


def check_call(call: ast.Call) -> None:
    """A call `spectrim.NAME(...)` gives arguments that the function takes."""
    if not (isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "spectrim"):
        return
    function = getattr(spectrim, call.func.attr)
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    inspect.signature(function).bind(*call.args, **named)
    if function is spectrim.compress:
        known = {*inspect.signature(function).parameters, *spectrim.job.Request.__dataclass_fields__}
        assert set(named) <= known, f"compress(): no {set(named) - known}"


def check_text(text: str, where: str) -> None:
    tree = ast.parse(text, filename=where)
    compile(tree, where, "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                check_import(alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            check_import(node.module or "", [alias.name for alias in node.names])
        elif isinstance(node, ast.Call):
            check_call(node)


@of("python")
def test_python_compiles_and_names_what_there_is(snippet: Snippet) -> None:
    check_text(snippet.text, snippet.where)


# ---------- data


@of("json")
def test_json_is_json(snippet: Snippet) -> None:
    text = snippet.text if snippet.text.startswith("{") else "{" + snippet.text + "}"
    assert json.loads(text)


@of("yaml")
def test_yaml_is_yaml_and_a_recipe_is_a_recipe(snippet: Snippet) -> None:
    values = yaml.safe_load(snippet.text)
    if "request" in values:
        parse_recipe(snippet.text, snippet.where)


# ---------- the checks themselves


def test_every_block_says_its_language() -> None:
    """A block without one escapes all checks. Blocks of plain output are `text`."""
    assert [
        snippet.where for snippet in SNIPPETS if snippet.language not in {"bash", "python", "json", "yaml", "text"}
    ] == []


@pytest.mark.parametrize(
    "command",
    [
        "spectrim compres MODEL --out OUT",
        "spectrim compress MODEL --out OUT --kep 0.5",
        "spectrim compress MODEL --out OUT --keep much",
        "spectrim compress MODEL --out OUT --keep 1.5",
        "spectrim compress MODEL --out OUT --method svd --set nothing=1",
        "spectrim compress MODEL --out OUT --recipe no-such",
        "spectrim recipe shown best",
        "python benchmarks/none.py",
        "python benchmarks/compare.py --no-such-flag",
        "python benchmarks/compare.py --keeps much",
        "python -m pytest tests/none",
        "pytest -m slwo",
        "pip install 'spectrim[none]'",
        "make nothing",
        "no-such-program",
    ],
)
def test_the_checks_bite(command: str, tmp_path: Path) -> None:
    [words] = Snippet(ROOT / "README.md", 1, "bash", command).commands()
    with pytest.raises((Exception, SystemExit)):
        check_command(words, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "import no_such_module",
        "import spectrim.none",
        "from spectrim.method import none",
        "spectrim.none()",
        "spectrim.load('m', kep=1)",
        "spectrim.compress('m', kep=1)",
    ],
)
def test_the_checks_of_python_bite(text: str) -> None:
    with pytest.raises((AssertionError, AttributeError, ImportError, TypeError)):
        check_text(text, "text")
