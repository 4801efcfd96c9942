"""Run a program that never imports spectrim, with compressed folders loading in it.

    python -m spectrim.run -m lm_eval --model hf --model_args pretrained=small --tasks arc_easy
    python -m spectrim.run train.py --model small

transformers asks no installed package for formats: one that was not imported does not exist for it. This registers the
format, then runs the module or script as `__main__` with its own arguments, as `python -m` or `python FILE` would. A
program that starts other Python processes needs it in front of theirs (`torchrun -m spectrim.run train.py`).
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from spectrim.errors import UsageError
from spectrim.integrations.transformers import register

USAGE = """usage: python -m spectrim.run -m MODULE [ARGUMENTS]
       python -m spectrim.run FILE.py [ARGUMENTS]"""
HELP = ("-h", "--help")


def main() -> None:
    """Run what `sys.argv` names; its exit status is ours. 2: nothing is named, or no such file or module."""
    given = sys.argv[1:]
    if given[:1] and given[0] in HELP:
        print(f"{__doc__}\n{USAGE}")
        return
    if not given or given == ["-m"] or (given[0].startswith("-") and given[0] != "-m"):
        _refuse(f"what to run comes first; got {' '.join(given) or 'nothing'}\n{USAGE}")
    register()
    if given[0] == "-m":
        _run_module(given[1], given[2:])
    else:
        _run_file(given[0], given[1:])


def _run_module(name: str, arguments: list[str]) -> None:
    """As `python -m NAME`: the current folder stays first in the search path, where `-m spectrim.run` has put it."""
    try:
        found = find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that is not there; a relative name
        found = False
    if not found:
        _refuse(f"no module named {name} can be found; install it here, or give the path of a file")
    sys.argv = [name, *arguments]  # run_module puts the module's file in the place of the name
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_file(path: str, arguments: list[str]) -> None:
    """As `python FILE`: its folder is first in the search path."""
    if not Path(path).is_file():
        _refuse(f"{path}: no such file; write -m before the name of a module")
    sys.argv = [path, *arguments]
    sys.path[0] = str(Path(path).resolve().parent)
    runpy.run_path(path, run_name="__main__")


def _refuse(message: str) -> NoReturn:
    print(f"spectrim.run: {message}", file=sys.stderr)
    sys.exit(UsageError.exit_code)


if __name__ == "__main__":
    main()
