"""FWSVD and TFWSVD: does weighing every entry lower the weighted error, and does that help the model?

    python examples/fisher_weighted.py                       # builtin:tiny, two minutes on one core
    python examples/fisher_weighted.py --model FOLDER --keep 0.8

Prints the weighted error of each solver over all layers, relative to FWSVD's, and the perplexity that goes with it. The
error is sum_ij (I_ij + 0.1 mean(I)) (W - W')_ij^2, added up over layers in units of each layer's error under FWSVD.
"""

import argparse
import time
from typing import Any

import torch

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.evaluate.language import evaluate
from spectrim.linalg.factor import Factors
from spectrim.linalg.weighted import damped, weighted_error
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from spectrim.stats import Stat

DAMPING = 0.1
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("svd", "svd", {}),
    ("fwsvd", "fwsvd", {}),
    ("fwsvd, outputs weighed", "fwsvd", {"weigh": "outputs"}),
    ("tfwsvd, als", "tfwsvd", {"solver": "als", "iterations": 4}),
    ("tfwsvd, adam", "tfwsvd", {"solver": "adam", "iterations": 60}),
    ("tfwsvd, adam-sgd", "tfwsvd", {"solver": "adam-sgd", "iterations": 60}),
]


def main() -> None:
    """Measure, compress in every way, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on and to judge by")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    size = {"length": args.length, "count": args.windows}
    ids = calibration_windows(load_texts(args.text, split="calibration"), tokenizer, seed=0, **size).ids
    held_out = evaluation_windows(load_texts(args.text, split="evaluation"), tokenizer, **size).ids
    weights = fisher_weights(dense, ids)
    print(f"{args.model}, keep {args.keep}, {args.windows} windows of {args.length} tokens; dense perplexity "
          f"{evaluate(dense, held_out).perplexity:.2f}")  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for label, name, options in ROWS:
        start = time.perf_counter()
        outcome = compress_model(dense, make_method(name, options=options), args.keep, ids, gradient_windows=len(ids))
        seconds = time.perf_counter() - start
        found[label] = errors(dense, outcome, weights)
        base = found.get("fwsvd", found[label])
        relative = sum(error / base[layer] for layer, error in found[label].items()) / len(base)
        share = f"{relative:.3f}" if "fwsvd" in found else "     "
        print(f"{label:24} weighted error {share}  perplexity {evaluate(outcome.model, held_out).perplexity:9.2f}  "
              f"{seconds:6.1f} s", flush=True)  # fmt: skip


def fisher_weights(dense: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The damped Fisher information of every layer."""
    stats = measure(dense, find_layers(dense), ids, frozenset({Stat.FISHER}))
    return {name: damped(own.get(Stat.FISHER), DAMPING) for name, own in stats.items()}


def errors(dense: Any, outcome: Outcome, weights: dict[str, torch.Tensor]) -> dict[str, float]:
    """Weighted error of every low-rank layer."""
    found = {}
    for name, placed in outcome.placed.items():
        if placed.codec != "dense":
            factors = Factors(placed.tensors["U.weight"].double(), placed.tensors["V.weight"].double())
            found[name] = weighted_error(weight_of(dense.get_submodule(name)).detach().double(), weights[name], factors)
    return found


if __name__ == "__main__":
    main()
