"""Recipes: what is shipped is sound, mistakes are told with the nearest right word, flags override."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from command_line import PLAIN, call, small_model
from spectrim import any_size_job, job
from spectrim.errors import InputError, UsageError
from spectrim.recipe import Recipe, load_recipe, parse_recipe, recipe_names, request_model, resolved_yaml
from spectrim.request import Request

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    with (
        mock.patch.object(job, "reload_difference", return_value=0.0),
        mock.patch.object(any_size_job, "reload_difference", return_value=0.0),
    ):
        yield small_model(tmp_path / "model", num_hidden_layers=1)


def write(path: Path, **recipe: Any) -> Path:
    path.write_text(yaml.safe_dump({"name": "own", "about": "for a test", **recipe}))
    return path


# ---- what is shipped


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_request_that_passes_its_checks(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    values = recipe.values()
    if "keep" not in values:  # as the command line completes it
        values["keep"] = Request(model="m", keep=0.5).anchors[0]
    Request(model="m", **values).check()


@pytest.mark.parametrize("name", recipe_names())
def test_figures_of_a_recipe_are_those_of_the_file_that_it_names(name: str) -> None:
    """No number is typed twice without a check: perplexities are found again, as they are rounded there."""
    for measured in load_recipe(name).expected:
        source = ROOT / measured.source.split(",")[0]
        perplexities = [v for k, v in measured.figures.items() if k.endswith("novels") and isinstance(v, list)]
        assert perplexities, measured
        for figures in perplexities:
            assert isinstance(figures, list)
            if source.suffix == ".json":
                rows = [[row[text] for text in ("wikitext2", "valid.wiki", "novels")] for row in rows_of(source)]
                assert any(all(round(a, 2) == b for a, b in zip(row, figures, strict=True)) for row in rows)
            else:
                assert " / ".join(f"{value:.2f}" for value in figures) in source.read_text()


def rows_of(path: Path) -> list[dict[str, float]]:
    return [row for row in json.loads(path.read_text())["rows"] if "novels" in row]


# ---- reading


def test_the_model_of_a_request_has_its_fields_and_no_other() -> None:
    assert set(request_model().model_fields) == {f.name for f in dataclasses.fields(Request)} - {"model"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nabout: b\nrequest: {kep: 0.5}", "request.kep: unknown key; did you mean 'keep'?"),
        ("name: a\nabuot: b\nrequest: {}", "abuot: unknown key; did you mean 'about'?"),
        ("name: a\nabout: b\nrequest: {keep: much}", "request.keep: Input should be a valid number"),
        ("name: a\nabout: b\nrequest: {recover: kl}", "request.recover: Input should be a valid list"),
        ("name: a\nabout: b", "request: Field required"),
        (
            "name: a\nabout: b\nrequest: {}\nexpected: [{model: m, device: d, command: c, source: s, figurs: {}}]",
            "unknown key; did you mean 'figures'?",
        ),
    ],
)
def test_mistakes_are_told_with_their_place(text: str, says: str) -> None:
    with pytest.raises(UsageError, match="mistake") as caught:
        parse_recipe(text, "here")
    assert says in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(UsageError, match="3 mistakes") as caught:
        parse_recipe("nam: a\nabout: b\nrequest: {kep: 0.5, keep: 0.5}", "here")
    assert "nam: unknown key" in str(caught.value)
    assert "request.kep" in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "!!python/object/apply:os.system ['true']", "7"])
def test_what_is_no_recipe_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="here"):
        parse_recipe(text, "here")


def test_an_unknown_name_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'fast'"):
        load_recipe("fats")
    with pytest.raises(InputError, match="no such file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_what_is_written_is_read_back_the_same() -> None:
    request = Request(model="m", keep=0.5, recover=("kl:3",), options={"steps": 7}, anchors=(0.9, 0.5))
    back = parse_recipe(resolved_yaml(dataclasses.asdict(request)), "here")
    assert isinstance(back, Recipe)
    assert Request(model="m", **back.values()) == request


def test_a_settled_budget_in_bytes_is_asked_for_again_as_bytes() -> None:
    request = dataclasses.asdict(Request(model="m", keep=0.123, method="trellis", keep_bytes=0.4))
    values = parse_recipe(resolved_yaml(request), "here").values()
    assert values["keep_bytes"] == 0.4
    assert "keep" not in values


# ---- on the command line


def test_flags_override_a_recipe_and_the_result_says_what_was_used(model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "own.yaml", request={"method": "svd-llm", "keep": 0.5, "options": {"storage": "pivot"}})
    out = tmp_path / "out"
    answer = call("compress", model, "--out", out, *PLAIN, "--json", "--recipe", recipe, "--keep", "0.9")
    assert answer.code == 0, answer.err
    request = answer.json["request"]
    assert (request["keep"], request["method"], request["options"]) == (0.9, "svd-llm", {"storage": "pivot"})
    saved = load_recipe(str(out / "recipe.yaml"))
    assert saved.model == str(model)
    again = call("compress", model, "--out", tmp_path / "again", "--json", "--recipe", out / "recipe.yaml")
    assert again.code == 0, again.err
    assert again.json["request"] == request
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert call("verify", out).code == 0


def test_another_method_drops_what_is_the_recipes_methods_own(model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "own.yaml", request={"method": "soco", "preset": "fast", "keep": 0.5})
    facts = call("plan", model, "--json", "--recipe", recipe, "--method", "svd").json
    assert facts["method"]["method"] == "svd"
    assert facts["keep"] == 0.5


def test_a_typed_budget_takes_the_place_of_the_recipes(model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "own.yaml", request={"method": "trellis", "keep_bytes": 0.8})
    words = ("plan", model, "--json", "--dtype", "bfloat16", "--recipe", recipe)
    assert call(*words, "--keep", "0.2").json["keep"] == 0.2
    assert 0 < call(*words).json["keep"] < 0.8  # embeddings take their part of the bytes


def test_options_of_one_method_are_merged(model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "own.yaml", request={"method": "svd-llm", "options": {"storage": "pivot", "rounds": 0}})
    words = ("--recipe", recipe, "--set", "rounds=1")
    options = call("plan", model, "--json", *words).json["method"]
    assert (options["storage"], options["rounds"]) == ("pivot", 1)


def test_recipes_are_listed_and_shown() -> None:
    rows = call("recipe", "list", "--json").json
    assert [row["name"] for row in rows] == recipe_names()
    shown = call("recipe", "show", "fast")
    assert shown.code == 0
    assert "benchmarks/reference.py" in shown.out
    assert call("recipe", "show", "fats").code == 2
