"""Options that several commands share, and what their text means."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.errors import UsageError
from spectrim.terminal import stderr, stdout

ANCHORS = "0.95,0.9,0.8,0.7,0.6,0.5,0.4,0.35"

ModelArg = Annotated[str, typer.Argument(help="hub id, local folder, or builtin:tiny")]
Keep = Annotated[float, typer.Option(help="share of the decoder linears' stored numbers that remains, in (0, 1]")]
KeepOrNone = Annotated[
    float | None,
    typer.Option(help="share of the decoder linears' stored numbers that remains, in (0, 1]; default 0.8"),
]
Bytes = Annotated[
    str | None,
    typer.Option("--bytes", help="bytes of the whole model (4GB, 3.5GiB) in place of --keep; method trellis"),
]
KeepBytes = Annotated[float | None, typer.Option(help="the same as a share of the dense model's bytes in 16 bits")]
Size = Annotated[float | None, typer.Option(help="the size to take from a folder that holds all sizes")]
AnySize = Annotated[bool, typer.Option("--any-size", help="one folder for all sizes; --keep is then the default one")]
Anchors = Annotated[str, typer.Option(help="sizes at which --any-size learns and measures, descending")]
AnySizeSteps = Annotated[int, typer.Option(help="training steps of all anchors together")]
Method = Annotated[str, typer.Option(help="see `spectrim methods`")]
MethodOrNone = Annotated[
    str | None, typer.Option(help="see `spectrim methods`; default soco, of a budget in bytes trellis")
]
Preset = Annotated[str | None, typer.Option(help="fast, balanced or best, for methods that train")]
Recover = Annotated[
    list[str],
    typer.Option(
        help="step after the method: refit, reconstruct, block or kl, the last two also NAME:STEPS; may be repeated"
    ),
]
FactorBits = Annotated[
    int | None,
    typer.Option(help="8, 4 or 3: quantise factors, pivot parts and dense layers after all steps (docs/quantise.md)"),
]
FactorGroupSize = Annotated[
    int, typer.Option(help="inputs that share a grid with --factor-bits; divides those of all layers, or 0", min=0)
]
Set = Annotated[list[str], typer.Option("--set", help="NAME=VALUE, a field of the method; may be repeated")]
RankMultiple = Annotated[
    int | None,
    typer.Option(
        help="ranks are multiples of it (1: any; default: 8 in layers of at least 512 x 512, as measured)",
        min=1,
    ),
]
Calib = Annotated[str, typer.Option(help="hub data set, .txt/.jsonl files, builtin:stdlib, or self")]
CalibWindows = Annotated[
    int | None, typer.Option(help="windows that feed the statistics (default: 256 of text, 512 of self)")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")]
Dtype = Annotated[
    str, typer.Option(help="dtype of the stored result: auto (as the source), float32, bfloat16, float16")
]
Tokenizer = Annotated[str | None, typer.Option(help="tokenizer folder, if the model has none")]
Seed = Annotated[int, typer.Option(help="seeds everything that is random", min=0)]
TakeLock = Annotated[
    bool, typer.Option("--take-lock", help="go on although a process of another host may still work on OUT")
]
AllowNonfinite = Annotated[
    str, typer.Option(help="layers that hold NaN or Inf: refuse, or skip (they are copied unchanged)")
]
QualityGate = Annotated[
    float,
    typer.Option(help="mark the result as failed (exit 5) if its perplexity is this many times the dense; 0: off"),
]
Recipe = Annotated[
    str | None, typer.Option("--recipe", help="a name of `spectrim recipe list` or a YAML file; flags override it")
]
CalibLength = Annotated[int, typer.Option(help="tokens in a window")]
GradientWindows = Annotated[
    int | None, typer.Option(help="windows that give gradients (default: all on a GPU, a quarter on a CPU)")
]
TrainWindows = Annotated[
    int | None, typer.Option(help="windows for learned steps, at most (default: as many as the steps go through)")
]
Eval = Annotated[str, typer.Option("--eval", help="evaluation text, as for --calib, or none")]
EvalWindows = Annotated[int, typer.Option(help="evaluation windows")]
ShardWeights = Annotated[
    bool | None,
    typer.Option(
        "--shard-weights/--no-shard-weights",
        help="of several processes, each holds a part of all frozen weights while scores are learned; if neither is "
        "given, where one GPU should not hold all",
        show_default=False,
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="one block of the model at a time, from its files: at most 24 GB of a GPU"),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="only algorithms that give the same bits every time; slower on a GPU")
]
Track = Annotated[
    list[str], typer.Option(help="log losses and figures to tensorboard, wandb, mlflow, ...; off by default")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable result on stdout, logs on stderr")]


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """`["rank=8", "basis=svd"]` to values: JSON where it parses (8, 0.5, true), else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UsageError(f"--set {pair}: expected NAME=VALUE, e.g. --set steps=100")
        try:
            options[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            options[name.replace("-", "_")] = value
    return options


def given_command(name: str) -> tuple[str, ...]:
    """The words after `spectrim` as they were typed, if they are those of the command `name`."""
    words = tuple(word for word in sys.argv[1:] if word != "--restart")
    return words if words[:1] == (name,) else ()


def parse_anchors(text: str) -> tuple[float, ...]:
    """`"0.9,0.5"` to numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--anchors {text}: expected sizes with commas between them, e.g. --anchors 0.9,0.6,0.4"
        ) from error


def say_written(out: Path, report: Mapping[str, Any], options: str = "") -> None:
    """Warnings, where the result is, and the three lines of Python that load it."""
    for taken_up in report.get("resumed", []):
        stderr.print(f"resumed at step {taken_up['step']} of {taken_up['stage']}")
    for warning in report["warnings"]:
        stderr.print(f"warning: {warning}")
    stdout.print(f"\nwritten to {out} in {report['seconds']['total']:.0f} s. Load it with\n", soft_wrap=True)
    stdout.print(load_lines(out, options, plain=report["stored"].get("format") == "plain"), soft_wrap=True)


def load_lines(folder: Path, options: str = "", *, plain: bool = False) -> str:
    """The lines of Python that load a folder; a `plain` one needs nothing of ours."""
    lines = [
        *([] if plain else ["import spectrim"]),
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(str(folder))}{options})",
    ]
    return "".join(f"    {line}\n" for line in lines)
