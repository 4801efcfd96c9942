"""The benchmark of all methods: which rows are on the front, what the table and the chart show, rows that fail."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.registry import all_methods, make_method

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def compare() -> dict[str, Any]:
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "compare.py"), run_name="imported")
    finally:
        sys.path.remove(str(FOLDER))


def row(label: str, keep: float, counted: float, perplexity: float) -> dict[str, Any]:
    return {
        "label": label, "keep": keep, "counted": counted, "bytes": 1234, "seconds": 1.0, "news": perplexity,
        "news.kl": 0.5, "news.agreement": 0.7,
    }  # fmt: skip


DENSE = {"label": "dense", "keep": 1.0, "counted": 1.0, "seconds": 0.0, "news": 10.0}
ROWS = [DENSE, row("a", 0.8, 0.8, 14.0), row("b", 0.8, 0.79, 13.0), row("a", 0.4, 0.4, 30.0), row("b", 0.4, 0.4, 900.0)]


def test_the_front_holds_what_nothing_else_beats_in_both(compare):
    assert compare["front"]([(0.8, 14.0), (0.79, 13.0), (0.4, 30.0), (0.4, 900.0)]) == [(0.4, 30.0), (0.79, 13.0)]


def test_the_table_has_every_row_the_best_first(compare):
    lines = compare["table"](ROWS, ["news"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["dense", "b", "a", "a", "b"]
    assert "| 900.00 | 0.5000, 0.700 | 0.40000 | 1,234 |" in lines[-1]


def test_the_chart_leaves_out_what_would_flatten_it(compare):
    chart = compare["pareto"](ROWS, "news", 4.0)
    assert chart.startswith("<svg")
    assert chart.count("<circle") == 3 + 2  # three rows within 40, two of them on the front
    assert compare["pareto"]([DENSE, ROWS[-1]], "news", 4.0) is None


def test_every_method_of_the_registry_has_a_row_and_every_row_can_be_made(compare):
    rows = [row for group in compare["GROUPS"].values() for row in group]
    assert {row.method for row in rows} == set(all_methods())
    for row_ in rows:
        make_method(row_.method, row_.preset, dict(row_.options))
    assert len({row_.label for row_ in rows}) == len(rows)


def test_runs_put_together_keep_where_each_row_was_made_and_the_last_of_two(compare, tmp_path, monkeypatch, capsys):
    def run(name: str, gpu: str, rows: list[dict[str, Any]], missing: list[float]) -> str:
        failed = [{"label": "a", "keep": keep, "error": "not started"} for keep in missing]
        facts = {"environment": {"gpu": gpu}, "settings": {"seed": 0, "out": name}, "rows": rows, "failed": failed}
        (tmp_path / name).write_text(json.dumps(facts))
        return str(tmp_path / name)

    first = run("1.json", "old card", [DENSE, row("a", 0.8, 0.8, 14.0)], [0.6, 0.4])
    second = run("2.json", "new card", [DENSE, row("a", 0.8, 0.8, 13.0), row("a", 0.6, 0.6, 20.0)], [])

    def merged(*parts: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["compare.py", "--out", str(tmp_path / "all"), "--merge", *parts])
        compare["main"]()
        return json.loads((tmp_path / "all" / "compare.json").read_text())

    found = merged(first, second)
    assert [(r["keep"], r["news"], r["device"]) for r in found["rows"][1:]] == [
        (0.8, 13.0, "new card"), (0.6, 20.0, "new card"),
    ]  # fmt: skip
    assert [f["keep"] for f in found["failed"]] == [0.4]
    assert found["environments"] == [{"gpu": "old card"}, {"gpu": "new card"}]
    assert found["settings"] == [{"seed": 0}]
    (tmp_path / "all" / "compare.json").rename(tmp_path / "3.json")
    again = merged(str(tmp_path / "3.json"), first)  # what was put together can be put together again
    assert [(r["keep"], r["news"], r["device"]) for r in again["rows"][1:]] == [
        (0.8, 14.0, "old card"), (0.6, 20.0, "new card"),
    ]  # fmt: skip
    assert len(again["environments"]) == 2


def test_a_row_that_fails_leaves_the_others(compare, tmp_path, monkeypatch, capsys):
    class Bench:
        def __init__(self, *_: Any) -> None:
            self.texts = {"news": None}

        def dense_row(self) -> dict[str, Any]:
            return DENSE

        def row(self, asked: Any, keep: float) -> dict[str, Any]:
            if asked.method == "asvd":
                raise RuntimeError("out of memory")
            return row(asked.label, keep, keep, 20.0)

    monkeypatch.setitem(compare["main"].__globals__, "Bench", Bench)
    monkeypatch.setattr(
        sys, "argv", ["compare.py", "--out", str(tmp_path), "--rows", "svd", "asvd", "fwsvd", "--keeps", "0.8", "0.6"]
    )
    with pytest.raises(SystemExit, match=r"2 rows are missing: asvd at 0\.8; asvd at 0\.6"):
        compare["main"]()
    found = json.loads((tmp_path / "compare.json").read_text())
    assert [r["label"] for r in found["rows"]] == ["dense", "svd", "fwsvd", "svd", "fwsvd"]
    assert [f["error"] for f in found["failed"]] == ["RuntimeError: out of memory"] * 2
    assert "asvd" in capsys.readouterr().out
    assert (tmp_path / "compare.md").exists()
    assert (tmp_path / "compare-news.svg").exists()
