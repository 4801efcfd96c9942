"""From the flags of `compress` and `plan`, and a recipe under them, to one request.

What both commands take is written once, in `shared_flags`; `asks` gives it to a command beside the command's own.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import typer

from spectrim.cli_options import (
    ANCHORS,
    AllowNonfinite,
    Anchors,
    AnySize,
    AnySizeSteps,
    Bytes,
    Calib,
    CalibLength,
    CalibWindows,
    Device,
    Dtype,
    Eval,
    EvalWindows,
    FactorBits,
    FactorGroupSize,
    GradientWindows,
    KeepBytes,
    KeepOrNone,
    LowMemory,
    MethodOrNone,
    ModelArg,
    Preset,
    RankMultiple,
    Recipe,
    Recover,
    Set,
    Tokenizer,
    TrainWindows,
    parse_anchors,
    parse_options,
)
from spectrim.errors import UsageError
from spectrim.options import METHOD, METHOD_IN_BYTES, parse_bytes

if TYPE_CHECKING:
    from spectrim.request import Request

FIELDS = {"set_": "options", "bytes_": "model_bytes", "eval_": "eval"}
"""Flags whose field in the request has another name."""
CONVERT: Mapping[str, Callable[[Any], Any]] = {
    "options": parse_options,
    "recover": tuple,
    "anchors": parse_anchors,
    "model_bytes": parse_bytes,
}
BUDGETS = ("keep", "model_bytes", "keep_bytes")


def shared_flags(
    context: typer.Context,
    model: ModelArg,
    recipe: Recipe = None,
    keep: KeepOrNone = None,
    bytes_: Bytes = None,
    keep_bytes: KeepBytes = None,
    any_size: AnySize = False,
    anchors: Anchors = ANCHORS,
    any_size_steps: AnySizeSteps = 1600,
    method: MethodOrNone = None,
    preset: Preset = None,
    set_: Set = [],  # noqa: B006  typer reads the default, nobody changes it
    rank_multiple: RankMultiple = None,
    recover: Recover = [],  # noqa: B006
    factor_bits: FactorBits = None,
    factor_group_size: FactorGroupSize = 128,
    calib: Calib = "builtin:stdlib",
    calib_windows: CalibWindows = None,
    calib_length: CalibLength = 512,
    gradient_windows: GradientWindows = None,
    train_windows: TrainWindows = None,
    eval_: Eval = "builtin:stdlib",
    eval_windows: EvalWindows = 40,
    allow_nonfinite: AllowNonfinite = "refuse",
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    low_memory: LowMemory = False,
) -> None:
    """A signature: what a run may be asked for by `compress` and by `plan`. It is never called."""


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `shared_flags` before its own; it is called with the `request` made of all, and its own."""
    own = {name: p for name, p in inspect.signature(command).parameters.items() if name != "request"}
    parameters = {**inspect.signature(shared_flags).parameters, **own}

    @wraps(command)
    def asking(**flags: Any) -> None:
        request = request_from(flags["context"], flags)
        command(request, **{name: flags[name] for name in own})

    as_keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters.values()]
    as_keywords.sort(key=lambda p: p.default is not inspect.Parameter.empty)  # what is required is shown first
    asking.__signature__ = inspect.Signature(as_keywords)  # type: ignore[attr-defined]  what typer reads
    asking.__annotations__ = {name: p.annotation for name, p in parameters.items()}
    return asking


def request_from(context: typer.Context, flags: Mapping[str, Any]) -> "Request":
    """What is asked for: flags that were typed, then the recipe named by `recipe`, then the defaults of the flags.

    A budget that is typed takes the place of the recipe's, whatever its kind; another method than the recipe's drops
    the recipe's preset and options, which are the other method's. Options of one method are merged.
    """
    from spectrim.request import Request

    typed: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for flag, value in flags.items():
        name = FIELDS.get(flag, flag)
        if name not in Request.__dataclass_fields__:
            continue
        own = value if value is None else CONVERT.get(name, lambda given: given)(value)
        values[name] = own
        if was_typed(context, flag):
            typed[name] = own
    if flags.get("rank_multiple") is not None:
        typed["options"] = {**typed.get("options", {}), "rank_multiple": flags["rank_multiple"]}
    recipe = recipe_values(flags.get("recipe"))
    if any(typed.get(name) is not None for name in BUDGETS):
        recipe = {name: value for name, value in recipe.items() if name not in BUDGETS}
    if typed.get("method") not in (None, recipe.get("method")):
        recipe = {name: value for name, value in recipe.items() if name not in ("preset", "options")}
    options = {**recipe.get("options", {}), **typed.get("options", {})}
    return _completed({**values, **recipe, **typed, "options": options})


def was_typed(context: typer.Context, flag: str) -> bool:
    """Whether a parameter was given on the command line (or in the environment), not by its default."""
    source = context.get_parameter_source(flag)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def recipe_values(name: str | None) -> dict[str, Any]:
    """Fields of the request that a recipe sets."""
    if name is None:
        return {}
    from spectrim.recipe import load_recipe

    return load_recipe(name).values()


def _completed(values: dict[str, Any]) -> "Request":
    """The default budget, size and method, which depend on each other."""
    from spectrim.request import Request

    in_bytes = values.get("model_bytes") is not None or values.get("keep_bytes") is not None
    if in_bytes and values.get("keep") is not None:
        raise UsageError("--keep and a budget in bytes (--bytes, --keep-bytes) exclude each other; pass one of them")
    if values.get("keep") is None:
        values["keep"] = values["anchors"][0] if values.get("any_size") else 0.8
    if values.get("method") is None:
        values["method"] = METHOD_IN_BYTES if in_bytes else METHOD
    return Request(**values)
