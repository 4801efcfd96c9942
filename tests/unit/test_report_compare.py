"""`spectrim report`: folders as a page, a table, or JSON; what cannot be compared is said, what is newer refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from html_page import Page, assert_safe_and_whole
from spectrim.report.compare import share_at_16_bits
from spectrim.report.reading import Facts

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
KINDS = ("factor", "pivot", "all-sizes")


def evaluated(folder: Path, where: Path, perplexity: float, sha256: str = "a" * 64, **stored: Any) -> Path:
    """A copy of an older folder, as if it had been evaluated."""
    shutil.copytree(folder, where)
    path = where / "report.json"
    report = json.loads(path.read_text())
    small = {"perplexity": perplexity, "kl": 0.125, "agreement": 0.75, "tokens": 10, "window": 5}
    report["quality"] = {"dense": {"perplexity": 29.5, "tokens": 10, "window": 5}, "compressed": small}
    report["text"]["evaluation"] = {"source": "x", "note": "", "windows": 2, "length": 5, "sha256": sha256}
    report["stored"] |= stored
    path.write_text(json.dumps(report))
    return where


def change(folder: Path, where: Path, name: str, *keys: str, value: Any) -> Path:
    """A copy with one value of one of its JSON files changed."""
    shutil.copytree(folder, where)
    data = json.loads((where / name).read_text())
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (where / name).write_text(json.dumps(data))
    return where


def test_older_folders_of_all_kinds_on_one_page(tmp_path: Path) -> None:
    folders = [GOLDEN / kind for kind in KINDS]
    assert not any((folder / "report.html").exists() for folder in folders)
    answer = call("report", *folders, "--out", tmp_path / "page.html", "--json")
    assert answer.code == 0, answer.err
    points = answer.json["points"]
    assert [point["label"] for point in points] == ["1", "2", "3", "3"]
    for point, kind in zip(points, KINDS, strict=False):
        report = json.loads((GOLDEN / kind / "report.json").read_text())
        if kind != "all-sizes":
            assert point["keep"] == report["stored"]["keep"]
            assert point["model_bytes"] == report["stored"]["model_bytes"]
    page = Page((tmp_path / "page.html").read_text())
    assert_safe_and_whole(page)
    assert "Nothing was evaluated in 1, 2, 3." in page.text
    for layer in json.loads((GOLDEN / "factor" / "report.json").read_text())["layers"]:
        assert layer["name"] in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_figures_and_points_are_those_of_the_reports(tmp_path: Path) -> None:
    one = evaluated(GOLDEN / "factor", tmp_path / "one", 31.25)
    two = evaluated(GOLDEN / "pivot", tmp_path / "two", 33.5)
    answer = call("report", one, two, "--out", tmp_path / "page.html", "--json")
    assert [point["perplexity"] for point in answer.json["points"]] == [31.25, 33.5]
    assert answer.json["warnings"] == []
    page = Page((tmp_path / "page.html").read_text())
    assert {31.25, 33.5, 0.125, 0.75} <= page.numbers()
    charts = [given["aria-label"] for tag, given in page.elements if tag == "svg"]
    assert len(charts) == 2
    assert "1: 31.25 at" in str(charts[0])
    assert "dense" in page.text
    table = call("report", one, two)
    assert "31.25" in table.out
    assert "two" in table.out


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = evaluated(GOLDEN / "factor", tmp_path / "one", 31.25)
    two = evaluated(GOLDEN / "pivot", tmp_path / "two", 33.5, sha256="b" * 64)
    three = change(two, tmp_path / "three", "report.json", "source", "name", value="another")
    answer = call("report", one, two, three, "--json")
    assert answer.json["warnings"] == [
        "The folders were evaluated on 2 different texts: their figures cannot be compared.",
        "The folders come from different models (another, golden-source).",
    ]
    assert "2 different texts" in call("report", one, two).err


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("report.json", ("format_version",)),
        ("config.json", ("quantization_config", "format_version")),
        ("manifest.json", ("format_version",)),
    ],
)
def test_a_newer_folder_is_refused(tmp_path: Path, name: str, keys: tuple[str, ...]) -> None:
    newer = change(GOLDEN / "factor", tmp_path / "newer", name, *keys, value=2)
    answer = call("report", GOLDEN / "pivot", newer, "--out", tmp_path / "page.html")
    assert answer.code == 3
    assert f"{newer / name}: format_version is 2, this installation of spectrim reads up to 1" in answer.message
    assert "upgrade spectrim" in answer.message
    assert not (tmp_path / "page.html").exists()


def test_folders_without_a_report(tmp_path: Path) -> None:
    answer = call("report", tmp_path)
    assert (answer.code, "has no report.json" in answer.message) == (3, True)
    answer = call("report", tmp_path / "nowhere")
    assert (answer.code, "no such folder" in answer.message) == (3, True)
    assert call("report").code == 2


def test_a_report_of_another_kind(tmp_path: Path) -> None:
    bad = change(GOLDEN / "factor", tmp_path / "bad", "report.json", "stored", "keep", value=["x"])
    answer = call("report", bad)
    assert answer.code == 3
    assert "stored.keep is" in answer.message
    assert "expected a finite number" in answer.message


def test_a_page_is_replaced_only_when_asked(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("mine")
    answer = call("report", GOLDEN / "factor", "--out", page)
    assert (answer.code, page.read_text()) == (2, "mine")
    assert call("report", GOLDEN / "factor", "--out", page, "--overwrite").code == 0
    assert page.read_text().startswith("<!DOCTYPE html>")
    answer = call("report", GOLDEN / "factor", "--out", tmp_path / "none" / "page.html")
    assert answer.code == 4
    assert "cannot be written" in answer.message


def test_the_share_of_the_whole_model_by_hand() -> None:
    stored = {"linear_numbers_dense": 100, "linear_numbers": 60, "model_numbers": 90, "linear_bytes_counted": 50}
    source = {"numbers": 150, "bytes": 300}
    assert share_at_16_bits(Facts({"source": source, "stored": stored})) == (50 + 2 * 50) / 300
    del stored["linear_bytes_counted"]
    assert share_at_16_bits(Facts({"source": source, "stored": stored})) == (120 + 2 * 50) / 300
    narrower = {**stored, "format": "plain"}
    assert share_at_16_bits(Facts({"source": source, "stored": narrower})) == 180 / 300
    assert share_at_16_bits(Facts({})) is None
