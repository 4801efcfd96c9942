"""report.html: well formed, loads nothing, says what report.json says, for every kind of folder and hostile text."""

import copy
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import spectrim
from command_line import call, small_model, small_text
from html_page import Page, assert_safe_and_whole
from spectrim import any_size_job, job
from spectrim.errors import InputError
from spectrim.evaluate.samples import compare_samples, greedy, same_at_first
from spectrim.report import sections
from spectrim.report.figures import Line, chart
from spectrim.report.page import report_page
from spectrim.report.reading import Facts
from spectrim.report.record import places, points_for, spectrum_of
from spectrim.store import verify_manifest
from tiny_models import tiny, token_ids

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7*7 }}</style></title>&lt;"""


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run that learns scores, distils and evaluates, made by the command."""
    where = tmp_path_factory.mktemp("learned")
    model = small_model(where / "model")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\ntags: [x]\n---\n# A model\n")
    text = small_text(where / "text.txt")
    fields = ("steps=6", "distil_steps=4", "batch_size=2", "rounds=0", "project_every=2")
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        answer = call(
            *("compress", model, "--out", where / "out", "--keep", "0.7", "--calib", text, "--eval", text),
            *("--calib-windows", "4", "--calib-length", "32", "--train-windows", "8", "--eval-windows", "3"),
            *(word for field in fields for word in ("--set", field)),
        )
    assert answer.code == 0, answer.err
    return where / "out"


@pytest.fixture(scope="module")
def any_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("any")
    text = small_text(where / "text.txt")
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        answer = call(
            *("compress", small_model(where / "model", num_hidden_layers=1), "--out", where / "out", "--any-size"),
            *("--method", "svd-llm", "--keep", "0.8", "--anchors", "0.8,0.5", "--calib", text, "--eval", text),
            *("--calib-windows", "4", "--calib-length", "32", "--eval-windows", "2", "--quality-gate", "0"),
        )
    assert answer.code == 0, answer.err
    return where / "out"


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item)
    else:
        yield value


# ---- what a run writes


def test_the_page_is_part_of_the_folder_and_safe(learned: Path, any_size: Path) -> None:
    for folder in (learned, any_size):
        verify_manifest(folder)
        assert "report.html" in json.loads((folder / "manifest.json").read_text())["files"]
        page, report = page_of(folder), report_of(folder)
        assert_safe_and_whole(page)
        assert all(layer["name"] in page.text for layer in report["layers"])
        assert all(warning in page.text for warning in report["warnings"])


def test_the_figures_are_those_of_the_report(learned: Path) -> None:
    page, report = page_of(learned), report_of(learned)
    quality, stored, source = report["quality"], report["stored"], report["source"]
    expected = {
        quality["dense"]["perplexity"], quality["compressed"]["perplexity"], quality["compressed"]["kl"],
        quality["compressed"]["agreement"], stored["keep"], stored["linear_numbers"], stored["model_bytes"],
        source["bytes"], source["numbers"], stored["linear_bytes_counted"], report["seconds"]["total"],
        report["peak_memory_bytes"]["host"],
    }  # fmt: skip
    assert expected <= page.numbers()
    # nothing else is shown as a figure but what the report has, or what follows from it by one sum or product
    known = {float(x) for x in leaves(report) if type(x) in (int, float)} | {0.0, 1.0}
    known |= {2.0 * stored["linear_numbers_dense"]}
    stages = sum(s for name, s in report["seconds"].items() if name != "total")
    others = page.numbers() - known
    assert all(other == pytest.approx(report["seconds"]["total"] - stages) for other in others)
    for layer in report["layers"]:
        assert f"{layer['numbers']:,}" in page.text
    assert {value for row in report["forms"] for key, value in row.items() if key != "form"} <= page.numbers()
    assert f"{report['environment']['torch']}" in page.text


def test_the_report_holds_what_the_page_needs_in_little(learned: Path) -> None:
    report, page = report_of(learned), page_of(learned)
    for layer in report["layers"]:
        spectrum = layer["spectrum"]
        assert spectrum["components"] == min(layer["shape"])
        assert spectrum["kept"] == layer["rank"]
        assert 0 < spectrum["energy_kept"] <= 1
        assert spectrum["singular_values"] == sorted(spectrum["singular_values"], reverse=True)
    assert report["command"][0] == "compress"
    assert "spectrim compress " in page.text
    assert "--keep 0.7" in page.text
    path = report["learning"]["score_path"]
    assert [point[0] for point in path] == [0, 1, 2, 3, 4, 5, 6]
    assert path[0][1:] == [1.0, 1.0, 1.0]
    assert all(low <= middle <= high for _, low, middle, high in path)
    minis = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "mini"]
    assert len(minis) == len(report["layers"])
    assert len(report["samples"]) == 2
    for sample in report["samples"]:
        assert sample["dense"] in page.text
        assert sample["compressed"] in page.text


def test_sizes_of_a_folder_with_all_of_them(any_size: Path) -> None:
    page, report = page_of(any_size), report_of(any_size)
    assert {row["quality"]["perplexity"] for row in report["sizes"]} <= page.numbers()
    assert report["dense"]["perplexity"] in page.numbers()
    names = [attributes for tag, attributes in page.elements if tag == "svg" and attributes.get("class") == "chart"]
    assert any("Perplexity over size" in str(attributes["aria-label"]) for attributes in names)
    for layer in report["layers"]:
        codec, rank = layer["sizes"]["0.8"]
        assert layer["spectrum"]["kept"] == (min(layer["shape"]) if codec == "dense" else rank)


def test_licence_and_languages_are_carried_over(learned: Path) -> None:
    card = (learned / "README.md").read_text()
    head = card.split("---")[1]
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: text-generation", "- en"):
        assert line in head
    assert "base_model" not in head  # a folder is none that the hub knows
    report = report_of(learned)
    assert f"value: {report['quality']['compressed']['perplexity']}" in head


# ---- every kind of storage


STORAGES = [
    ("svd", {"storage": "factor"}, 0.6),
    ("svd", {"storage": "pivot"}, 0.6),
    ("rtn", {"bits": 4, "group_size": 16}, 0.4),
    ("basis-sharing", {}, 0.6),
    ("dsformer", {}, 0.6),
    ("slicegpt", {}, 0.7),
    ("modegpt", {}, 0.7),
    ("compactifai", {}, 0.5),
]


@pytest.mark.parametrize(
    ("method", "options", "keep"), STORAGES, ids=[f"{m}-{o.get('storage', '')}" for m, o, _ in STORAGES]
)
def test_every_storage_has_a_page(method: str, options: dict[str, Any], keep: float, tmp_path: Path) -> None:
    made = spectrim.compress(tiny("llama"), keep=keep, method=method, options=options, calibration=token_ids())
    made.save_pretrained(tmp_path / "out")
    page, report = page_of(tmp_path / "out"), report_of(tmp_path / "out")
    assert_safe_and_whole(page)
    assert len(report["layers"]) == 14
    assert all(layer["name"] in page.text for layer in report["layers"])
    assert "Nothing was evaluated" in page.text
    assert sum(row["layers"] for row in report["forms"]) == 14
    assert all(row["form"] in page.text for row in report["forms"])
    assert ("No spectrum is recorded" in page.text) == (report["layers"][0]["spectrum"] is None)


def test_a_budget_that_was_chosen_by_predicted_losses_shows_the_others(tmp_path: Path) -> None:
    made = spectrim.compress(tiny("llama"), keep=0.3, method="trellis", options={"window": 8}, calibration=token_ids())
    made.save_pretrained(tmp_path / "out")
    page, report = page_of(tmp_path / "out"), report_of(tmp_path / "out")
    assert_safe_and_whole(page)
    assert "What other budgets would lose" in page.text
    assert f"{report['frontier'][0]['keep']:.4f}" in page.text
    (part,) = sections.frontier(Facts(report))
    assert part["figure"].count(">this run</text>") == 1  # where this run lies
    report["frontier"] = report["frontier"][:1]
    assert sections.frontier(Facts(report)) == []


def test_between_two_points_is_the_line_of_the_logarithm() -> None:
    assert sections.between([(0.1, 100.0), (0.3, 1.0)], 0.2) == pytest.approx(10.0)
    assert sections.between([(0.1, 100.0), (0.3, 1.0)], 0.3) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["factor", "pivot", "all-sizes"])
def test_reports_of_older_versions_have_pages(name: str) -> None:
    page = Page(report_page(report_of(GOLDEN / name)))
    assert_safe_and_whole(page)
    assert "No spectrum is recorded" in page.text
    assert "No command is recorded" in page.text
    assert "by form" not in page.text
    assert all(layer["name"] in page.text for layer in report_of(GOLDEN / name)["layers"])


def test_the_report_of_an_exported_size_has_a_page() -> None:
    stored = {"linear_numbers_dense": 100, "linear_numbers": 60, "keep": 0.6, "model_numbers": 90, "model_bytes": 180}
    report = {
        "tool": "spectrim",
        "exported_from": "all",
        "size_ratio": 0.6,
        "method": {"method": "svd"},
        "stored": stored,
    }
    page = Page(report_page(report))
    assert_safe_and_whole(page)
    assert "all at keep 0.6000" in page.text


# ---- what strangers write


def hostile(value: Any) -> Any:
    """The same report with every text replaced, and every key of tables that the page shows."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return {key: hostile(item) for key, item in value.items()} if isinstance(value, dict) else value


def test_hostile_texts_are_shown_as_text(learned: Path, any_size: Path) -> None:
    for folder in (learned, any_size):
        report = hostile(report_of(folder))
        for part in ("environment", "seconds", "text"):
            report[part] |= {HOSTILE: report[part][next(iter(report[part]))]}
        page = Page(report_page(report))
        assert_safe_and_whole(page)
        assert HOSTILE in page.text
        assert "49" not in page.text.replace(HOSTILE, "")[:200]


@pytest.mark.parametrize("replacement", ["x", -1, None, [[]], {}, 10**60, 1e304])
def test_a_report_of_wrong_kinds_is_a_page_or_an_input_error(learned: Path, replacement: Any) -> None:
    original = report_of(learned)
    original["layers"] = original["layers"][:1]
    paths = [(key,) for key in original]
    paths += [(key, inner) for key in original if isinstance(original[key], dict) for inner in original[key]]
    paths += [("layers", 0, key) for key in original["layers"][0]]
    paths += [("layers", 0, "spectrum", key) for key in original["layers"][0]["spectrum"]]
    refused = []
    for path in paths:
        changed = copy.copy(original)
        place: Any = changed
        for key in path[:-1]:
            place[key] = copy.copy(place[key])
            place = place[key]
        place[path[-1]] = replacement
        try:
            Page(report_page(changed))
        except InputError as error:
            refused.append(str(error))
    assert all("expected" in message for message in refused)
    assert refused or replacement is None


# ---- small things


numbers = st.floats(-1e305, 1e305) | st.floats(0.999, 1.001) | st.sampled_from([0.0, 5e-324, 1e16, 1e16 + 2])


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_chart_of_any_numbers_is_drawn_inside_its_frame(
    points: list[tuple[float, float]], dots: bool, log: bool
) -> None:
    drawn = Page(chart([Line("a", points, dots=dots)], label="all", x="x", y="y", references=[("r", 1.0)], log=log))
    places = [(found["cx"], found["cy"]) for tag, found in drawn.elements if tag == "circle"]
    assert len(places) == len(points)
    assert all(0 <= float(x or "nan") <= 420 and 0 <= float(y or "nan") <= 250 for x, y in places)


def test_points_stand_where_the_ticks_say() -> None:
    root = ET.fromstring(chart([Line("", [(0.25, 10.0), (1.0, 1000.0)])], label="l", x="x", y="y", log=True))
    ticks = {t.text: t for t in root.iter("text") if t.get("class") == "tick"}
    first, last = ((float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter("circle"))
    assert float(ticks["10"].get("y", "")) - 4 == pytest.approx(first[1], abs=0.2)
    assert float(ticks["1000"].get("y", "")) - 4 == pytest.approx(last[1], abs=0.2)
    assert float(ticks["1"].get("x", "")) == pytest.approx(last[0], abs=0.2)
    with pytest.raises(ValueError, match="at least one"):
        chart([], label="l", x="x", y="y")
    with pytest.raises(ValueError, match="finite"):
        chart([Line("", [(0.0, float("nan"))])], label="l", x="x", y="y")


def test_a_large_model_has_a_small_report_and_a_small_page() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for block in range(32):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            energy = torch.rand(4096, generator=generator, dtype=torch.float64).sort(descending=True).values
            kept = torch.rand(4096, generator=generator) < 0.6
            layers.append({
                "name": f"model.layers.{block}.mlp.{name}", "shape": [4096, 4096], "codec": "factor", "rank": 1200,
                "numbers": 9_830_400, "spectrum": spectrum_of(energy, kept, None, most=points_for(224)),
            })  # fmt: skip
    report = {
        "layers": layers,
        "source": {"name": "large"},
        "learning": {"losses": [1.0 / (i + 1) for i in range(5000)]},
    }
    assert len(json.dumps(report, indent=2)) < 2_000_000
    page = report_page(report)
    assert len(page) < 2_000_000
    assert_safe_and_whole(Page(page))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65, 300, 4096, 100_000])
@pytest.mark.parametrize("most", [8, 16, 64])
def test_places_are_few_and_reach_both_ends(count: int, most: int) -> None:
    found = places(count, most)
    assert len(found) <= most
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, count - 1)
    if count <= most:
        assert found == list(range(count))


def test_a_spectrum_by_hand() -> None:
    energy = torch.tensor([4.0, 16.0, 1.0, 0.0])
    first = spectrum_of(energy, None, 2, most=64)
    assert first == {
        "components": 4, "places": [0, 1, 2, 3], "singular_values": [4.0, 2.0, 1.0, 0.0], "kept": 2,
        "energy_kept": 0.95238,
    }  # fmt: skip
    chosen = spectrum_of(energy, torch.tensor([False, True, True, False]), 2, most=64)
    assert (chosen["kept"], chosen["energy_kept"]) == (2, 0.80952)
    assert chosen["kept_shares"] == [1.0, 0.0, 1.0, 0.0]
    assert "kept" not in spectrum_of(energy, None, None, most=64)
    assert spectrum_of(torch.zeros(3), None, 1, most=64)["energy_kept"] == 1.0


def test_samples_are_what_generate_gives() -> None:
    model, ids = tiny("llama"), token_ids(4, 12)
    model.generation_config.pad_token_id = 0
    ours = greedy(model, ids, 5)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(ours, theirs[:, 12:])
    rows = compare_samples(model, tiny("llama", seed=3), ids, None, prompts=2, prompt_tokens=8, new_tokens=5)
    assert [row["prompt"] for row in rows] == [" ".join(map(str, ids[i, :8].tolist())) for i in (0, 3)]
    assert not rows[0]["decoded"]
    same = compare_samples(model, model, ids, None, new_tokens=5)
    assert [row["same_tokens"] for row in same] == [5, 5]
    assert same_at_first(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 5, 4])) == 2
