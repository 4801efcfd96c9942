"""Run every test that covers one of the 72 faults and write docs/reliability.md: fault, expectation, tests, outcome.

python benchmarks/faults_table.py --write           the default tests (minutes on one core)
python benchmarks/faults_table.py --write --slow    those marked `slow` too
"""

import argparse
import platform
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

from catalogue import FAULTS, KNOWN_GAPS, PARTLY, UNTESTABLE  # noqa: E402

BEGIN, END = "<!-- table: python benchmarks/faults_table.py --write -->", "<!-- end of table -->"


class Outcomes:
    """A pytest plugin: which tests carry which numbers, and how each ended."""

    def __init__(self) -> None:
        self.numbers: dict[str, set[int]] = {}
        self.ended: dict[str, str] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the numbers of every test that is left after choosing."""
        for item in session.items:
            marks = {number for mark in item.iter_markers("fault") for number in mark.args}
            if marks:
                self.numbers[item.nodeid] = marks

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of set-up, call and tear-down."""
        if report.outcome != "passed" or (report.when == "call" and report.nodeid not in self.ended):
            self.ended[report.nodeid] = report.outcome

    def of(self, number: int) -> dict[str, Counter[str]]:
        """Test function -> how often its cases ended how."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for test, numbers in self.numbers.items():
            if number in numbers:
                file, _, name = test.partition("::")
                found[f"{file}::{name.partition('[')[0].rpartition('::')[2]}"][self.ended.get(test, "not run")] += 1
        return found


def outcome_of(number: int, tests: dict[str, Counter[str]]) -> str:
    """One word and a count, or the reason why there is no test."""
    if number in UNTESTABLE:
        return f"not testable here. {UNTESTABLE[number]}"
    if not tests:
        return "**no test yet**" if number in KNOWN_GAPS else "**no test was run**"
    total = sum(tests.values(), Counter())
    passed, skipped = total["passed"], total["skipped"]
    bad = total.total() - passed - skipped
    word = "**failed**" if bad else "passed"
    text = f"{word}, {passed} of {total.total() - skipped} cases" + (f", {skipped} skipped" if skipped else "")
    return f"{text}. {PARTLY[number]}" if number in PARTLY else text


def table(outcomes: Outcomes) -> list[str]:
    """Markdown, one table a section."""
    lines: list[str] = []
    section = ""
    for fault in FAULTS:
        if fault.section != section:
            section = fault.section
            lines += ["", f"### {section}", "", "| # | fault | expected | outcome | tests |", "|---|---|---|---|---|"]
        tests = outcomes.of(fault.number)
        files: dict[str, list[str]] = defaultdict(list)
        for test in sorted(tests):
            file, _, name = test.rpartition("::")
            files[file].append(f"`{name}`")
        where = "; ".join(f"{file.removeprefix('tests/')}: {', '.join(names)}" for file, names in files.items())
        cells = [str(fault.number), fault.fault, fault.expect, outcome_of(fault.number, tests), where]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def summary(outcomes: Outcomes, seconds: float) -> list[str]:
    """What the run came to."""
    import torch  # not before pytest, which has to rewrite what they import
    import transformers

    numbers = {fault.number for fault in FAULTS}
    tested = {number for marks in outcomes.numbers.values() for number in marks}
    total = Counter(outcomes.ended.values())
    return [
        f"{len(tested & numbers)} of 72 faults have tests, {len(UNTESTABLE)} a reason why not, "
        f"{len(numbers - tested - UNTESTABLE.keys())} neither. {total['passed']} cases passed, {total['failed']} "
        f"failed, {total['skipped']} were skipped, in {seconds:.0f} s. Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, no GPU.",
    ]


def main() -> int:
    """Exit status of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md instead of printing the table")
    parser.add_argument("--slow", action="store_true", help="run the slow ones too")
    parser.add_argument("--list", action="store_true", help="collect only: which tests cover which fault")
    asked = parser.parse_args()
    outcomes, started = Outcomes(), time.monotonic()
    chosen = "fault and not gpu" + ("" if asked.slow else " and not slow")
    options = ["-q", "-p", "no:cacheprovider", "-m", chosen, *(["--collect-only"] if asked.list else [])]
    status = pytest.main([*options, str(ROOT / "tests")], plugins=[outcomes])
    lines = [BEGIN, "", *summary(outcomes, time.monotonic() - started), *table(outcomes), "", END]
    if asked.write:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(head + "\n".join(lines) + tail, encoding="utf-8")
        print(f"wrote {PAGE}")
    else:
        print("\n".join(lines))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
