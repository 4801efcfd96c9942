"""Rules of the house that no linter knows: which folder may import which, file sizes, forbidden calls.

Read from the source by `ast`, so nothing is imported and imports inside functions count too.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from each_file import each

ROOT = Path(__file__).resolve().parents[2] / "src" / "spectrim"
FILES = sorted(ROOT.rglob("*.py"))
MOST_LINES = 350
FORBIDDEN_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "manager.py", "common.py", "misc.py"}
every_file = each(FILES)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[str]:
    """Absolute names of everything imported; `from a import b` gives `a.b`, and its top is enough to judge it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def foreign(path: Path, allowed: tuple[str, ...]) -> list[str]:
    """Imports that are neither of the standard library nor inside one of `allowed`."""
    return [
        name
        for name in imported(parse(path))
        if name.split(".")[0] not in sys.stdlib_module_names and not any(within(name, a) for a in allowed)
    ]


def files_in(folder: str) -> list[Path]:
    found = [path for path in FILES if path.is_relative_to(ROOT / folder)]
    assert found, f"src/spectrim/{folder} has no files: the rule would hold for nothing"
    return found


# ---------- which way imports run


def test_the_rules_see_imports_of_all_kinds(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        "import json\nfrom torch import nn\ndef f():\n    import spectrim.cli as c\n    from a.b import c\n"
    )
    assert list(imported(parse(source))) == ["json", "torch.nn", "spectrim.cli", "a.b.c"]
    assert foreign(source, ("torch",)) == ["spectrim.cli", "a.b.c"]


def test_linalg_imports_only_torch_and_itself():
    for path in files_in("linalg"):
        assert foreign(path, ("torch", "spectrim.linalg")) == [], path
        assert not [name for name in imported(parse(path)) if within(name, "torch.nn")], f"{path}: pure functions only"


def test_nn_imports_only_torch_linalg_and_itself():
    for path in files_in("nn"):
        kernels = ("triton",) if path.parent.name == "kernels" else ()
        assert foreign(path, ("torch", "spectrim.linalg", "spectrim.nn", *kernels)) == [], path


def test_the_contract_imports_only_torch_errors_and_linalg():
    allowed = ("torch", "spectrim.errors", "spectrim.linalg", "spectrim.replacement", "spectrim.stats")
    assert foreign(ROOT / "method.py", allowed) == []
    assert foreign(ROOT / "stats.py", ("torch",)) == []
    assert foreign(ROOT / "replacement.py", ("torch", "spectrim.linalg")) == []
    assert foreign(ROOT / "errors.py", ()) == []


def test_methods_import_only_the_contract_linalg_nn_and_their_own_folder():
    for path in files_in("methods"):
        folder = module_name(path.parent / "__init__.py")
        allowed = (
            "torch",
            "spectrim.method",
            "spectrim.stats",
            "spectrim.replacement",
            "spectrim.linalg",
            "spectrim.nn",
            "spectrim.errors",
        )
        own = (folder,) if path.parent != ROOT / "methods" else ()
        if makes_models(path):
            own += ("spectrim.model_method", "spectrim.engines", "spectrim.models", "transformers")
        assert foreign(path, allowed + own) == [], path


def makes_models(path: Path) -> bool:
    """Whether it holds methods that make the whole model, or their family's base."""
    bases = ("spectrim.model_method", "spectrim.methods.weights.packed")
    return any(within(name, base) for name in imported(parse(path)) for base in bases)


def test_store_knows_no_modules_and_no_transformers():
    for path in files_in("store"):
        names = list(imported(parse(path)))
        bad = ("torch.nn", "transformers", "spectrim.nn", "spectrim.methods", "spectrim.engines", "spectrim.models")
        assert not [name for name in names if any(within(name, b) for b in bad)], path
        attributes = [ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)]
        assert not [a for a in attributes if within(a, "torch.nn")], path


def test_lower_layers_do_not_import_engines():
    for folder in ("linalg", "nn", "methods", "models", "data", "store"):
        for path in files_in(folder):
            names = imported(parse(path))
            above = ("job", "api") if makes_models(path) else ("engines", "job", "api")
            assert not [n for n in names if any(within(n, f"spectrim.{up}") for up in above)], path


@every_file
def test_nothing_imports_the_command_line_but_main(path):
    if path.name == "__main__.py" and path.parent == ROOT:
        return
    assert not [name for name in imported(parse(path)) if within(name, "spectrim.cli")]


# ---------- files


@every_file
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(parse(path)), "no module docstring"


@every_file
def test_files_are_short_and_named_for_what_they_hold(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines < MOST_LINES, f"{lines} lines; split it by what it does"
    assert path.name not in FORBIDDEN_NAMES


# ---------- calls


@every_file
def test_no_pickle_no_torch_load_no_fixed_device(path):
    """Untrusted bytes are never unpickled or evaluated, and no device is assumed."""
    tree = parse(path)
    names = list(imported(tree))
    assert not [
        n for n in names if n.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal"}
    ]
    assert not {"torch.load", "torch.save"} & set(names)
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [f for f in called if isinstance(f, ast.Attribute) and f.attr == "cuda"], ".cuda(): pass a device"
    assert not [f for f in called if isinstance(f, ast.Name) and f.id in {"eval", "exec"}]
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.save", "torch.set_default_device", "torch.set_default_dtype"}


@every_file
def test_no_code_is_trusted_from_a_model_folder(path):
    given = [node for node in ast.walk(parse(path)) if isinstance(node, ast.keyword)]
    constants = {(k.arg, k.value.value) for k in given if isinstance(k.value, ast.Constant)}
    assert ("trust_remote_code", True) not in constants
    assert ("weights_only", False) not in constants
