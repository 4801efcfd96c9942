"""One run for all sizes against one run for each size, on the reference model, at equal stored numbers.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/any_size.py --data .carry --out results --device cuda
    python benchmarks/any_size.py --data .carry --out results --device cuda --runs soco:balanced acip acip,target=dense

The texts and windows are those of reference.py. For each of `--runs`, a METHOD[:PRESET][,NAME=VALUE...], `--any-size`
runs once, all at the same steps, and is measured at every anchor and every asked size; then (without --any-size-only)
one run is made for each asked size. Excess is perplexity above that of the dense model; the last column is the excess
of the any-size model over that of the run made for the size. Weights are rounded as stored (bf16). The JSON is
rewritten after every row, so that a run that is cut short keeps what it has.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from reference_data import CALIBRATION_WINDOWS, TEXTS, held_out, training_windows, unpack_model
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.cli_options import parse_options
from spectrim.engines.any_size import MIDDLES, compress_any_size
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.method import LayerMethod, TrainedMethod
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.options import ANCHORS, ANY_SIZE_STEPS
from spectrim.registry import make_method
from spectrim.report.facts import environment
from spectrim.report.plot import line_chart


class Run(NamedTuple):
    """A method as it is to be run, and what it was called on the command line."""

    label: str
    method: LayerMethod

    def with_steps(self, steps: int | None) -> LayerMethod:
        """With other training steps, where any are asked for and the method trains."""
        if steps is None or not isinstance(self.method, TrainedMethod) or not self.method.steps:
            return self.method
        return replace(self.method, steps=steps)


def parse_run(text: str) -> Run:
    """`soco:balanced`, `acip,target=dense`: a method, its preset, its options; argparse shows what is wrong."""
    head, *options = text.split(",")
    name, _, preset = head.partition(":")
    try:
        method = make_method(name, preset or None, parse_options(options))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not isinstance(method, LayerMethod):
        raise argparse.ArgumentTypeError(f"{name}: makes a model of one size")
    return Run(text, method)


def arguments() -> argparse.Namespace:
    """What to run, on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--model", default="ref-llama-24m")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--runs", type=parse_run, nargs="+", default=[parse_run("soco:fast"), parse_run("soco:balanced")]
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6, 0.5, 0.4])
    parser.add_argument("--anchors", type=float, nargs="+", default=list(ANCHORS))
    parser.add_argument("--steps", type=int, default=ANY_SIZE_STEPS, help="training steps of all anchors together")
    parser.add_argument("--middles", type=float, nargs="+", default=list(MIDDLES), help="sizes to measure again at")
    parser.add_argument("--any-size-only", action="store_true", help="no runs for one size")
    parser.add_argument("--single-steps", type=int, help="training steps of a run for one size (default: the method's)")
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--evaluation-windows", type=int, default=300)
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further run after this long")
    return parser.parse_args()


class Table:
    """Rows as they come: printed, and written to the JSON."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out / "any-size.json"
        self.data: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        """One model on all texts."""
        self.data["rows"].append(row)
        self.path.write_text(json.dumps(self.data, indent=1))
        figures = " / ".join(f"{row[name]:.2f}" for name in TEXTS)
        excess = " / ".join(f"{row['excess'][name]:.3f}" for name in TEXTS) if "excess" in row else ""
        print(
            f"{row['size']:<5} {row['label']:26} {figures:24} counted {row['counted']:.5f}  {row['seconds']:7.1f} s  "
            f"{excess}",
            flush=True,
        )

    def find(self, label: str, size: float) -> dict[str, Any] | None:
        """The row of a label at a size."""
        return next((r for r in self.data["rows"] if (r["label"], r["size"]) == (label, size)), None)


def judge(model: PreTrainedModel, dense: PreTrainedModel, texts: dict[str, Tensor], batch_size: int) -> dict[str, Any]:
    """Perplexity, KL and agreement on every text, of the weights as stored."""
    round_to(model, torch.bfloat16)
    row: dict[str, Any] = {}
    for name, ids in texts.items():
        quality = evaluate(model, ids, dense=dense, batch_size=batch_size)
        row |= {name: quality.perplexity, f"{name}.kl": quality.kl, f"{name}.agreement": quality.agreement}
    return row


def told(value: Any) -> Any:
    """A setting as JSON; runs with all their options."""
    if isinstance(value, list) and all(isinstance(run, Run) for run in value):
        return [{"label": run.label, **run.method.to_config()} for run in value]
    return str(value) if isinstance(value, Path) else value


def main() -> None:
    """All sizes from one run, then one run a size, for each method; then the curves."""
    args, started = arguments(), time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp())
    device = pick_device(args.device)
    folder = unpack_model(args.data, scratch)
    dense = load_dense(resolve(str(folder)), device)
    calibration, training = training_windows(args.data, folder, scratch / "training.npy")
    calibration = calibration[: args.calibration_windows]
    texts = {name: ids[: args.evaluation_windows] for name, ids in held_out(args.data).items()}
    table = Table(args.out, {name: told(value) for name, value in vars(args).items()})
    batch = 64 if device.type == "cuda" else 8
    base = {name: evaluate(dense, ids, batch_size=batch).perplexity for name, ids in texts.items()}
    table.add({"label": "dense", "size": 1.0, "counted": 1.0, "seconds": 0.0, **base})
    common = {"gradient_windows": args.gradient_windows, "seed": args.seed}
    for run in args.runs:
        clock = time.perf_counter()
        sizes = compress_any_size(
            dense, run.method, calibration, training, anchors=tuple(args.anchors), steps=args.steps,
            dtype=torch.bfloat16, middles=tuple(args.middles), **common,
        )  # fmt: skip
        seconds = time.perf_counter() - clock
        for size in sorted({*args.anchors, *args.sizes}, reverse=True):
            row = judge(sizes.at(size), dense, texts, batch)
            facts = {"label": f"{run.label}, any size", "size": size, "counted": sizes.plan(size).keep}
            table.add({**facts, "seconds": seconds, "warnings": sizes.warnings, "details": sizes.details, **row})
        del sizes
        for size in () if args.any_size_only else args.sizes:
            if time.time() - started > args.seconds:
                break
            clock = time.perf_counter()
            outcome = compress_model(dense, run.with_steps(args.single_steps), size, calibration, training, **common)
            seconds = time.perf_counter() - clock
            row = judge(outcome.model, dense, texts, batch)
            any_size = table.find(f"{run.label}, any size", size)
            assert any_size is not None
            excess = {name: (any_size[name] - base[name]) / (row[name] - base[name]) for name in TEXTS}
            facts = {"label": f"{run.label}, run for the size", "size": size, "counted": outcome.plan.keep}
            table.add({**facts, "seconds": seconds, **row, "excess": excess})
    for text in TEXTS:
        (args.out / f"any-size-{text}.svg").write_text(chart(table, text, base[text], args.model))


def chart(table: Table, text: str, dense: float, model: str) -> str:
    """Perplexity over size on one text, one line a label."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in table.data["rows"][1:]:
        series.setdefault(row["label"].replace("run for the size", "one run each"), []).append((row["size"], row[text]))
    return line_chart(
        series,
        title=f"{model} on {text}",
        x="size: share of the decoder linears' numbers",
        y="perplexity",
        references={"dense": dense},
        dots=[name for name in series if name.endswith("one run each")],
    )


if __name__ == "__main__":
    main()
