"""`python -m spectrim.run`: programs that never import spectrim load compressed folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spectrim
from tiny_models import tiny, token_ids

PROGRAM = """import sys
assert __name__ == "__main__"
import beside
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__, sys.argv, __file__, beside.WORD)
sys.exit(7)
"""


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "spectrim.run", *map(str, arguments)]
    source = str(Path(spectrim.__file__).parents[1])  # `-m` puts cwd first; spectrim may be found by PYTHONPATH alone
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A script beside a module of its own, the same as a package's `__main__`, and a compressed folder."""
    where = tmp_path_factory.mktemp("programs")
    (where / "package").mkdir()
    for file in (where / "script.py", where / "package" / "__main__.py"):
        file.write_text(PROGRAM)
    (where / "beside.py").write_text("WORD = 'found'\n")
    small = spectrim.compress(tiny("llama"), keep=0.5, method="svd", calibration=token_ids(2))
    small.save_pretrained(where / "small")
    return where


@pytest.mark.fault(71)
def test_a_script_loads_the_format_and_has_its_own_arguments_path_and_exit_status(programs, tmp_path):
    script, folder = programs / "script.py", programs / "small"
    done = run(script, folder, "-m", "--json", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == f"LowRankLinear {[str(script), str(folder), '-m', '--json']} {script} found"


def test_a_module_runs_as_python_m_would_run_it(programs):
    done = run("-m", "package", "small", "--help", cwd=programs)
    assert done.returncode == 7, done.stderr
    main = programs / "package" / "__main__.py"
    assert done.stdout.strip() == f"LowRankLinear {[str(main), 'small', '--help']} {main} found"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "got nothing"),
        (["-m"], "what to run comes first"),
        (["--json", "x.py"], "got --json x.py"),
        (["absent.py"], "absent.py: no such file"),
        (["-m", "no_such_module"], "no module named no_such_module"),
        (["-m", "no_such_module.part"], "no module named no_such_module.part"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused(arguments, said, monkeypatch, capsys):
    from spectrim.run import main

    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_help(monkeypatch, capsys):
    from spectrim.run import main

    monkeypatch.setattr(sys, "argv", ["run.py", "--help"])
    main()
    assert "python -m spectrim.run -m MODULE" in capsys.readouterr().out
