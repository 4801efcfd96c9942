"""EoRA against plain SVD and diagonal scaling: what equal bytes give back of a rounded or pruned model.

    python examples/compensation.py                       # builtin:tiny
    python examples/compensation.py --model FOLDER --text CALIBRATION --judge TEXT TEXT --group-size 128 --rank 16

Every row of a base stores the same bytes: those of the base and of a correction of rank `--rank` in all layers. Shares
are of the bytes that the decoder's linear layers take in 16 bits, everything counted.
"""

import argparse
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.measure import measure
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.linalg.bits import PER_NUMBER, budget_in
from spectrim.methods.weights.eora import METRICS, EoRA, correction_costs
from spectrim.model_method import Job
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import Walk, find_layers
from spectrim.stats import Stats

BASES = ("2:4", "rtn2", "rtn3", "rtn4")


def share_of(method: EoRA, walk: Walk, rank: int) -> float:
    """Of the bytes in 16 bits: the base and a correction of that rank everywhere."""
    corrections = sum(int(correction_costs(layer)[rank]) for layer in walk.layers)
    return (method.bases(walk).total + corrections) / (PER_NUMBER["bytes"] * walk.numbers)


def job_at(dense: Any, walk: Walk, share: float, stats: Mapping[str, Stats], ids: Tensor) -> Job:
    """What `compress_model` would give the method, with statistics that are measured once for all rows."""
    return Job(
        dense=dense, walk=walk, keep=share, budget=budget_in("bytes", walk.numbers, share), stats=stats,
        calibration=ids, training=ids, gradient_windows=0, seed=0, warnings=[], timed=lambda _: nullcontext(),
    )  # fmt: skip


def main() -> None:
    """One line for each base and metric."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on")
    parser.add_argument("--judge", nargs="+", default=["builtin:stdlib"], help="texts to judge by")
    parser.add_argument("--bases", nargs="+", default=list(BASES))
    parser.add_argument("--metrics", nargs="*", choices=METRICS, default=["svd", "diagonal", "eora"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--set", dest="options", nargs="*", default=[], help="options of eora: symmetric=false ...")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on")
    parser.add_argument("--eval-windows", type=int, default=32, help="of each text")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    walk, size = find_layers(dense), {"length": args.length}
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, seed=0, count=args.windows, **size
    ).ids
    texts = [
        evaluation_windows(load_texts(spec, split="evaluation"), tokenizer, count=args.eval_windows, **size).ids
        for spec in args.judge
    ]

    def say(label: str, share: float, model: Any, seconds: float) -> None:
        figures = " / ".join(f"{evaluate(model, held).perplexity:.2f}" for held in texts)
        print(f"{label:20} bytes {share:.4f}  {figures:28} {seconds:6.1f} s", flush=True)

    print(
        f"{args.model}, {args.windows} windows of {args.length} tokens; {', '.join(Path(t).name for t in args.judge)}"
    )
    say("dense", 1.0, dense, 0.0)
    extra = dict(option.split("=", 1) for option in args.options)
    choices = {"true": True, "false": False}
    options = {"group_size": args.group_size, **{name: choices.get(value, value) for name, value in extra.items()}}
    stats = measure(dense, walk, ids, EoRA.needs)  # once for all rows
    for base in args.bases:
        for metric, rank in [("none", 0), *((metric, args.rank) for metric in args.metrics)]:
            method = EoRA.from_config(options | {"base": base} | ({"metric": metric} if rank else {}))
            share = share_of(method, walk, rank)
            start = time.perf_counter()
            model = method.compress(job_at(dense, walk, share, stats, ids))
            seconds = time.perf_counter() - start
            round_to(model, source.dtype)
            say(f"{base}, {metric}", share, model, seconds)


if __name__ == "__main__":
    main()
