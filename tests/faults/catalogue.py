"""The 72 faults, which tests cover each, and why some cannot be tested here; docs/reliability.md is made from this."""

import ast
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """One row: how it is made, and what a user may demand."""

    number: int
    section: str
    fault: str
    expect: str


FAULTS = tuple(Fault(**row) for row in json.loads(Path(__file__).with_name("faults.json").read_text(encoding="utf-8")))

UNTESTABLE = {
    52: "Needs a GPU whose solver leaves its context broken. No worker process restarts the block: the run ends with "
    "an error, the target is what it was before, and a run that trains goes on from its last state.",
    61: "Needs a GPU that fails. Runs use one process and one device, so no rank can wait for another; a lost device "
    "ends the run with an error, the target is what it was before.",
    67: "spectrim uploads nothing; `hf upload OUT` is the user's own step, and OUT is complete when it exists.",
}
"""Number -> why no test covers it on a machine without a GPU and a model hub."""

PARTLY = {
    8: "Extra tensors inside a layer that is compressed (scales of its old weight) are reported and left out.",
    10: "A flip in a weight that no checksum covers shows only where it makes NaN or Inf; there are no norm checks.",
    12: "There is no `convert`: pickles are refused, with advice.",
    13: "Nothing is ever passed to `torch.load`.",
    22: "Names that differ only by case need a disk that ignores it; folders are compared by device and inode.",
    25: "In the slow tests, and 200 kills by benchmarks/random_kills.py.",
    40: "Read errors are injected; no real network mount was used.",
    51: "On a CPU; failures are injected into torch.linalg. The rungs on a GPU are the same code with other arguments.",
    55: "Same seed, other batch sizes and order. One device only: there are no runs over several GPUs.",
    59: "On a CPU, with torch's out-of-memory errors injected. After batches of one window the run ends with exit 4 "
    "and advice; it never moves to the CPU without a word, where it would take many times as long. Solvers do, said.",
    62: "GPUs that are missing are simulated; wrong drivers and mixed GPUs are not.",
    64: "The hub's client is replaced by one that raises; its own retries are not tested here.",
    65: "By headers, which must fit the size of the file; the hash of a blob is not compared.",
    66: "huggingface_hub's `snapshot_download` resolves the commit once; tested with a replaced client.",
    68: "transformers is never imported first, torch only for what depends on a method (--set, --preset, --recover, "
    "--any-size): its import is most of the time of those (the slow tests measure both).",
    69: "The language of a text is not looked at.",
    71: "transformers without spectrim; vLLM and llama.cpp are not installed here.",
}
"""Number -> what the tests leave out."""

KNOWN_GAPS: frozenset[int] = frozenset()
"""Numbers that neither a test nor a reason covers yet. Must be empty in a release."""


def covering(*, slow: bool = True) -> dict[int, list[str]]:
    """Fault number -> `file::function` of the tests that carry its number, read from the source."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for name, numbers in marked(ast.parse(path.read_text(encoding="utf-8")), slow=slow):
            for number in sorted(numbers):
                found[number].append(f"{path.relative_to(TESTS.parent).as_posix()}::{name}")
    return dict(found)


def marked(tree: ast.Module, *, slow: bool = True) -> Iterator[tuple[str, set[int]]]:
    """Every test function with the numbers that its decorators, its class or its module give it.

    Without `slow`, functions that carry that mark as a whole are left out.
    """
    module = {
        number
        for node in tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets)
        for number in numbers_in(node.value)
    }
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            own = module | {number for decorator in node.decorator_list for number in numbers_in(decorator)}
            functions = [(f"{node.name}::", inner, own) for inner in node.body]
        else:
            functions = [("", node, module)]
        for prefix, function, outer in functions:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                numbers = outer | {n for decorator in function.decorator_list for n in numbers_in(decorator)}
                if numbers and (slow or "pytest.mark.slow" not in map(ast.unparse, function.decorator_list)):
                    yield prefix + function.name, numbers


def numbers_in(node: ast.AST) -> set[int]:
    """Arguments of all `pytest.mark.fault(...)` inside an expression."""
    calls = [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fault"
    ]
    return {ast.literal_eval(argument) for call in calls for argument in call.args}
