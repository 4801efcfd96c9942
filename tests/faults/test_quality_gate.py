"""A result that fell apart although all steps went well: published, marked, and an exit code that says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import QUICK, call, small_model, small_text
from spectrim import any_size_job, job
from spectrim.any_size_job import gate_of_sizes
from spectrim.errors import UsageError
from spectrim.evaluate.gate import check_factor, judge_gate
from spectrim.evaluate.language import Quality

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def _quick_reload() -> Iterator[None]:
    with (
        mock.patch.object(job, "reload_difference", return_value=0.0),
        mock.patch.object(any_size_job, "reload_difference", return_value=0.0),
    ):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


@pytest.mark.fault(58)
def test_a_result_that_fell_apart_is_published_marked_and_exits_with_5(model: Path, tmp_path: Path) -> None:
    text = ("--eval", small_text(tmp_path / "text.txt"))
    options = ("--method", "svd", "--keep", "0.5", *QUICK, "--calib", text[1], *text)
    good = call("compress", model, "--out", tmp_path / "good", *options, "--json")
    assert good.code == 0, good.err
    verdict = good.json["quality_gate"]
    assert verdict["passed"] is True
    assert verdict["factor"] == 100
    assert json.loads((tmp_path / "good" / "manifest.json").read_text())["quality_gate"] == verdict
    real = job.evaluate

    def worse(model: Any, ids: Any, **given: Any) -> Any:
        found = real(model, ids, **given)
        return found if not given else type(found)(**{**found.__dict__, "perplexity": 1e7})

    with mock.patch.object(job, "evaluate", worse):
        bad = call("compress", model, "--out", tmp_path / "bad", *options, "--json")
    assert bad.code == 5
    assert f"{tmp_path / 'bad'}: published and marked as failed in manifest.json" in bad.message
    assert "allowed 100 times" in bad.message
    assert json.loads((tmp_path / "bad" / "manifest.json").read_text())["quality_gate"]["passed"] is False
    assert "quality gate failed" in (tmp_path / "bad" / "README.md").read_text()
    assert call("inspect", tmp_path / "bad", "--no-spectrum").code == 0
    assert call("export", tmp_path / "bad", "--to", "dense", "--out", tmp_path / "dense").code == 0
    assert json.loads((tmp_path / "dense" / "manifest.json").read_text())["quality_gate"]["passed"] is False
    with mock.patch.object(job, "evaluate", worse):
        off = call("compress", model, "--out", tmp_path / "off", *options, "--quality-gate", "0", "--json")
    assert (off.code, off.json["quality_gate"]["passed"]) == (0, None)


@pytest.mark.fault(58)
def test_what_the_gate_says() -> None:
    assert judge_gate(10.0, 999.0, 100.0)["passed"] is True
    assert judge_gate(10.0, 1001.0, 100.0)["passed"] is False
    assert judge_gate(None, None, 100.0)["passed"] is None
    assert judge_gate(10.0, 1e9, 0.0)["passed"] is None
    for factor in (0.0, 1.0, 1e6):
        check_factor(factor)
    for factor in (0.5, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"quality_gate must be 0 \(off\) or a finite factor of at least 1"):
            check_factor(factor)


@pytest.mark.fault(58)
def test_of_all_sizes_the_default_one_is_judged_or_the_next_smaller_that_was_measured() -> None:
    def quality(perplexity: float) -> Quality:
        return Quality(perplexity=perplexity, tokens=1, window=2)

    found: dict[float | str, Quality] = {"dense": quality(10), 0.9: quality(11), 0.5: quality(5000)}
    for size, measured, passed in ((0.9, 0.9, True), (1.0, 0.9, True), (0.7, 0.5, False), (0.5, 0.5, False)):
        verdict = gate_of_sizes(found, size, 100.0)
        assert (verdict["size"], verdict["passed"]) == (measured, passed)
    assert gate_of_sizes(None, 0.9, 100.0)["passed"] is None
    assert gate_of_sizes(found, 0.4, 100.0)["passed"] is None


@pytest.mark.fault(58)
def test_a_folder_of_all_sizes_is_marked_too(model: Path, tmp_path: Path) -> None:
    text = small_text(tmp_path / "text.txt")
    real = any_size_job.evaluate

    def worse(model: Any, ids: Any, **given: Any) -> Any:
        found = real(model, ids, **given)
        return found if not given else type(found)(**{**found.__dict__, "perplexity": 1e7})

    options = ("--any-size", "--anchors", "0.8,0.6", "--method", "svd", *QUICK, "--calib", text, "--eval", text)
    with mock.patch.object(any_size_job, "evaluate", worse):
        answer = call("compress", model, "--out", tmp_path / "out", *options, "--json")
    assert answer.code == 5, answer.err
    assert "quality gate failed at size 0.8" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quality_gate"]["passed"] is False
