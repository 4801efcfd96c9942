"""Every one of the 72 faults has a test or a written reason, and the page that says so is up to date."""

import ast

from catalogue import FAULTS, KNOWN_GAPS, PARTLY, TESTS, UNTESTABLE, covering, marked


def test_the_faults_are_72_in_order():
    assert [fault.number for fault in FAULTS] == list(range(1, 73))
    assert all(fault.fault and fault.expect and fault.section for fault in FAULTS)


def test_every_fault_has_a_test_or_a_reason():
    covered = covering()
    missing = {fault.number for fault in FAULTS} - covered.keys() - UNTESTABLE.keys()
    assert missing == set(KNOWN_GAPS), "faults without a test or a reason (or gaps that were closed)"


def test_marks_name_faults_that_there_are_and_reasons_only_those_without_a_test():
    covered = covering()
    assert covered.keys() <= {fault.number for fault in FAULTS}
    assert not covered.keys() & UNTESTABLE.keys(), "has a test now: take the reason away"
    assert covered.keys() >= PARTLY.keys(), "says what tests leave out, but there is no test"


def test_the_page_lists_the_tests_that_there_are():
    page = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    command = "python benchmarks/faults_table.py --write"
    for number, tests in covering(slow=False).items():
        for test in tests:
            name = test.rpartition("::")[2]
            assert f"`{name}`" in page, f"fault {number}: {test} is not in docs/reliability.md; run {command}"


def test_marks_are_read_from_decorators_classes_and_modules():
    source = (
        "import pytest\npytestmark = [pytest.mark.x, pytest.mark.fault(1)]\n"
        "@pytest.mark.fault(2, 3)\ndef test_a(): ...\n"
        "@pytest.mark.fault(4)\nclass TestB:\n"
        "    @pytest.mark.parametrize('v', [pytest.param(1, marks=pytest.mark.fault(5))])\n"
        "    def test_c(self, v): ...\n"
        "def helper(): ...\n"
    )
    source += "@pytest.mark.slow\n@pytest.mark.fault(6)\ndef test_s(): ...\n"
    assert dict(marked(ast.parse(source)))["test_s"] == {1, 6}
    assert dict(marked(ast.parse(source), slow=False)) == {"test_a": {1, 2, 3}, "TestB::test_c": {1, 4, 5}}
