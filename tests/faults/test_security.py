"""The rules of SECURITY.md: read from the source, and watched by an audit hook while a model is compressed."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import PLAIN, small_model, small_text
from each_file import each

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "src").rglob("*.py"))
ALL = [*PACKAGE, *sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "examples").glob("*.py"))]
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub"}
MAY_READ_YAML = {"src/spectrim/recipe.py", "src/spectrim/report/licence.py"}
"""By `yaml.safe_load`, which makes nothing but plain values; other loaders are refused here too."""
MAY_REACH_THE_NETWORK = {
    "src/spectrim/models/load.py": {"huggingface_hub"},
    "src/spectrim/integrations/hub_push.py": {"huggingface_hub"},  # asked for by `push` and --push-to alone
    "src/spectrim/report/card.py": {"huggingface_hub"},  # the form of a model card; nothing is asked for
    "src/spectrim/integrations/streamed_folder.py": {"huggingface_hub"},  # how tensors are split into files; as above
    "src/spectrim/processes.py": {"socket"},  # the name of this machine; processes meet where torchrun says
    "src/spectrim/meeting.py": {"socket"},  # this machine's name, and whether the store is there where torchrun says
    "src/spectrim/peers.py": {"socket"},  # a pair within this process, by which a signal wakes the watch
    "src/spectrim/doctor.py": {"socket", "urllib"},  # whether the hub can be reached, unless --no-hub
    "src/spectrim/data/hub.py": set(),
    "src/spectrim/store/work.py": {"socket"},  # the name of this machine, for the lock
}
every_file = each(ALL)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def violations(tree: ast.AST, *, yaml: bool = False) -> list[str]:
    """What rules 1 to 4 forbid, anywhere in a file, which may read `yaml` or not."""
    found = []
    banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "telnetlib"}
    banned |= set() if yaml else {"yaml"}
    found += [name for name in imports_of(tree) if name.split(".")[0] in banned or name in {"os.system", "os.popen"}]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load"}:
                found.append(called)
            if called.startswith(("os.exec", "os.spawn")):
                found.append(called)
            if "yaml" in called and "load" in called and called != "yaml.safe_load":
                found.append(called)
        if isinstance(node, ast.keyword) and node.arg is not None:
            value = node.value.value if isinstance(node.value, ast.Constant) else "computed"
            if node.arg in {"shell", "allow_pickle", "trust_remote_code"} and value is not False:
                found.append(f"{node.arg}={value}")
            if node.arg == "weights_only" and value is not True:
                found.append(f"{node.arg}={value}")
    return found


@pytest.mark.fault(12, 13, 14)
@every_file
def test_nothing_that_rules_1_to_4_forbid(path: Path) -> None:
    assert violations(tree_of(path), yaml=path.relative_to(ROOT).as_posix() in MAY_READ_YAML) == []


@pytest.mark.fault(12, 13, 14)
@pytest.mark.parametrize(
    "line", ["yaml.load(x)", "yaml.unsafe_load(x)", "yaml.full_load_all(x)", "import pickle, yaml"]
)
def test_reading_yaml_means_plain_values(line: str) -> None:
    assert violations(ast.parse(line), yaml=True)
    assert not violations(ast.parse("import yaml\nyaml.safe_load(x)"), yaml=True)


@pytest.mark.fault(12, 13, 14)
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load\nimport marshal",
        "import yaml",
        "eval('1')",
        "exec('1')",
        "os.system('x')",
        "os.execv('x', [])",
        "torch.load(f, weights_only=True)",
        "load(x, weights_only=False)",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', shell=flag)",
        "np.load(f, allow_pickle=True)",
        "from_pretrained(x, trust_remote_code=True)",
        "from_pretrained(x, trust_remote_code=options.trust)",
    ],
)
def test_the_rules_bite(line: str) -> None:
    assert violations(ast.parse(line))


@pytest.mark.fault(64)
@each(PACKAGE)
def test_only_named_files_reach_the_network(path: Path) -> None:
    used = {name.split(".")[0] for name in imports_of(tree_of(path))} & NETWORK
    assert used <= MAY_REACH_THE_NETWORK.get(path.relative_to(ROOT).as_posix(), set())


def test_every_process_that_is_started_is_this_python_with_a_list() -> None:
    started = [
        (path.name, ast.unparse(node))
        for path in PACKAGE
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("subprocess.")
    ]
    assert [name for name, _ in started] == ["reloaded.py"]
    source = (ROOT / "src" / "spectrim" / "reloaded.py").read_text()
    assert 'command = [sys.executable, "-m", "spectrim.integrations.reload"' in source


def test_the_page_names_what_enforces_it() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for name in (
        "tests/unit/test_architecture_rules.py",
        "tests/faults/test_security.py",
        "benchmarks/fuzz_readers.py",
    ):
        assert name in text
        assert (ROOT / name).is_file()


WATCHED = """
import json, os, sys
import spectrim, spectrim.job, spectrim.any_size_job, spectrim.cli
import transformers.models.llama.modeling_llama

seen = {"read": set(), "write": set(), "bad": []}
FORBIDDEN = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "os.system",
             "os.exec", "os.posix_spawn", "os.spawn", "urllib.Request", "ctypes.dlopen:never", "ftplib", "smtplib")

def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path, mode, flags = os.fsdecode(args[0]), args[1], args[2]
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else "r" not in (mode or "r")
        seen["write" if writes else "read"].add(os.path.abspath(path))
    elif event == "subprocess.Popen":
        seen["bad"].append([event, [str(a) for a in args[1]]])
    elif event.startswith(FORBIDDEN):
        seen["bad"].append([event, [repr(a)[:200] for a in args]])

sys.addaudithook(hook)
report = sys.argv[1]
sys.argv = ["spectrim", *sys.argv[2:]]
code = 0
try:
    spectrim.cli.main()
except SystemExit as stop:
    code = stop.code or 0
result = {"code": code, "read": sorted(seen["read"]), "write": sorted(seen["write"]), "bad": seen["bad"]}
with open(report, "w") as file:
    json.dump(result, file)
"""


@pytest.mark.fault(14, 17, 18, 64)
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "two-sided"),
        pytest.param(("--method", "svd", "--any-size"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_compressing_a_local_folder_opens_nothing_else(options: tuple[str, ...], tmp_path: Path) -> None:
    """No connection, no foreign process, nothing unpickled, nothing read or written outside the allowed roots."""
    model, text = small_model(tmp_path / "model"), small_text(tmp_path / "text.txt")
    (model / "modeling_evil.py").write_text("raise SystemExit('run')")
    (tmp_path / "secret").write_text("secret")
    out, report = tmp_path / "out", tmp_path / "report.json"
    command = ("compress", model, "--out", out, *PLAIN, "--calib", text, "--json", *options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", WATCHED, str(report), *map(str, command)],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    seen = json.loads(report.read_text())
    assert seen["code"] == 0, run.stderr[-3000:]
    processes = [args for event, args in seen["bad"] if event == "subprocess.Popen"]
    assert [event for event, _ in seen["bad"] if event != "subprocess.Popen"] == []
    assert [args[1:3] for args in processes] == [["-m", "spectrim.integrations.reload"]]
    scratch = str(tmp_path / "scratch")
    written = [p for p in seen["write"] if not p.startswith((f"{out}.", str(out), scratch, "/dev/null"))]
    assert [p for p in written if "__pycache__" not in p] == []
    system = ["/proc", "/sys", "/usr", "/lib", "/etc", "/dev/null", "/dev/urandom"]
    python = [sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), str(ROOT / "src")]
    roots = (*system, *python, str(model), str(text), str(out), scratch)
    parent_is_synced = {str(tmp_path)}
    assert {p for p in seen["read"] if not p.startswith(roots)} <= parent_is_synced
    assert not [p for p in seen["read"] if p.endswith(("modeling_evil.py", "/etc/passwd", "/etc/shadow"))]
    names = {Path(p).name for p in seen["read"] if p.startswith(str(model))}
    assert "config.json" in names
    assert "modeling_evil.py" not in names


def test_actions_are_pinned_to_commits_and_may_only_read():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        used = re.findall(r"uses:\s*(\S+)", text)
        assert used, path
        assert [action for action in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action)] == []
        assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE), f"{path}: the token may only read"
