"""Recipes: requests under a name, in YAML, each with the figures it gave and the command they come from.

    name: balanced
    about: one sentence
    request: {method: soco, preset: balanced, keep: 0.8}     fields of request.Request, but for the model
    expected:                                                what was measured with it, if anything was
      - {model: ..., device: ..., command: ..., figures: {...}, source: ...}

Read with `yaml.safe_load` and checked by pydantic, whose model of `request` is made from the dataclass itself: a field
has one place. Unknown keys are errors that name the nearest known one. What the values mean is checked by the request,
as for flags.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from spectrim.errors import InputError, UsageError, did_you_mean
from spectrim.request import Request

MOST_BYTES = 1_000_000
"""A recipe is a page of text; a larger file is none."""
RESOLVED = "recipe.yaml"
"""The recipe in an output folder, with every field."""


class Expected(BaseModel):
    """One measurement: on which model and machine, by which command, and where the row stands."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    device: str
    command: str
    source: str
    figures: dict[str, float | list[float]]
    note: str | None = None


class Recipe(BaseModel):
    """A checked recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str
    about: str
    model: str | None = None
    request: dict[str, Any]
    expected: list[Expected] = []

    def values(self) -> dict[str, Any]:
        """Fields of the request that are set, with the types that it has."""
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.request.items()
            if value is not None
        }


@functools.cache
def request_model() -> type[BaseModel]:
    """A pydantic model of the fields of a request, all optional, but for the model."""
    hints = get_type_hints(Request)
    fields: dict[str, Any] = {
        field.name: (_plain(hints[field.name]) | None, None)
        for field in dataclasses.fields(Request)
        if field.name != "model"
    }
    return create_model("RequestFields", __config__=ConfigDict(extra="forbid"), **fields)


def _plain(hint: Any) -> Any:
    """The same type for values that come from YAML: a mapping is a dict, a tuple a list; unions part by part."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return functools.reduce(lambda a, b: a | b, (_plain(part) for part in inside))
    if origin is tuple:
        return list[inside[0]]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return dict[str, Any]
    return hint


def recipe_names() -> list[str]:
    """Names of the recipes that come with spectrim."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("spectrim.recipes").iterdir()
                  if entry.name.endswith(".yaml"))  # fmt: skip


def load_recipe(name: str) -> Recipe:
    """A recipe by its name or from a YAML (or JSON) file; UsageError for an unknown name, InputError for a bad file."""
    if name in recipe_names():
        return parse_recipe(files("spectrim.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UsageError(f"unknown recipe {name!r}{did_you_mean(name, recipe_names())}; a file ends in .yaml or .json")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes, a recipe has at most {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (looked in {Path.cwd()}); `spectrim recipe list` has names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a recipe: {error}") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """The recipe in YAML `text`; every mistake in it is told at once, with the place of each."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{where}: is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: a recipe is a mapping with name, about and request, this is {type(found).__name__}")
    wrong: list[str] = []
    for model, part, place in ((Recipe, found, ""), (request_model(), found.get("request"), "request.")):
        try:
            model.model_validate(part)
        except ValidationError as error:
            wrong += [_said(one, model, place) for one in error.errors()]
    if wrong:
        raise UsageError(f"{where}: {len(wrong)} mistake{'s' if len(wrong) > 1 else ''}:\n  " + "\n  ".join(wrong))
    checked = request_model().model_validate(found["request"])
    return Recipe.model_validate({**found, "request": checked.model_dump(exclude_unset=True)})


def _said(error: Mapping[str, Any], model: type[BaseModel], place: str) -> str:
    """What pydantic found, in our words where a key is unknown."""
    at = place + ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        known = Expected.model_fields if error["loc"][0] == "expected" else model.model_fields
        return f"{at}: unknown key{did_you_mean(str(error['loc'][-1]), known)}"
    return f"{at}: {error['msg']}"


def resolved_yaml(request: Mapping[str, Any]) -> str:
    """What a run was asked for, every field, as a recipe that `--recipe` takes."""
    in_bytes = request.get("model_bytes") is not None or request.get("keep_bytes") is not None
    left_out = {"model", "keep"} if in_bytes else {"model"}  # `keep` then follows from the budget in bytes
    fields = {name: _yaml_value(value) for name, value in request.items() if name not in left_out}
    recipe = {
        "name": "resolved",
        "about": "Every field of the request that made this folder, flags and recipe together.",
        "model": str(request["model"]),
        "request": fields,
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def _yaml_value(value: Any) -> Any:
    """Tuples as lists, mappings as dicts."""
    if isinstance(value, Mapping):
        return {key: _yaml_value(own) for key, own in value.items()}
    return [_yaml_value(own) for own in value] if isinstance(value, tuple | list) else value
