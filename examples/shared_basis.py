"""Basis sharing against separate factors at the same stored numbers: group sizes, and what coefficients are fitted on.

    python examples/shared_basis.py                        # builtin:tiny
    python examples/shared_basis.py --model FOLDER --device cuda

Perplexity is on held-out text; the rank is that of the first layer's query projection.
"""

import argparse
from typing import Any

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "svd-llm": ("svd-llm", {}),
    "pairs, as the paper": ("basis-sharing", {"fit": "pooled"}),
    "pairs": ("basis-sharing", {}),
    "pairs, on drifted inputs": ("basis-sharing", {"fit": "drifted"}),
    "groups of 4": ("basis-sharing", {"group_size": 4}),
    "pairs, o and down too": ("basis-sharing", {"share": "all"}),
}


def main() -> None:
    """One line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.4])
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    windows = {"length": args.length, "count": args.windows}
    held_out = evaluation_windows(load_texts(args.text, split="evaluation"), tokenizer, **windows).ids
    ids = calibration_windows(load_texts(args.text, split="calibration"), tokenizer, **windows, seed=0).ids
    print(f"{args.model}, {args.windows} windows of {args.length}; dense {evaluate(dense, held_out).perplexity:.2f}")
    for keep in args.keeps:
        for label, (name, options) in ROWS.items():
            outcome = compress_model(dense, make_method(name, options=options), keep, ids)
            first = next(iter(outcome.plan.targets.values()))
            print(f"keep {keep:<5} {label:26} rank {first.rank:4}  {outcome.plan.numbers_after:>10,} numbers  "
                  f"perplexity {evaluate(outcome.model, held_out).perplexity:9.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
