"""SliceGPT and MoDeGPT: models with fewer columns and rows, against cutting without a rotation, by magnitude, and SVD.

    python examples/narrower.py                     # builtin:tiny, under two minutes on one core
    python examples/narrower.py --model FOLDER --device cuda --windows 100 --length 512

First a rotation alone, which must leave the logits; then every method at the same keep. Stored is what the decoder's
linear layers hold, counted by the engine; perplexity is on held-out text. Nothing is trained.
"""

import argparse
from typing import Any

import torch

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.pipeline import compress_model
from spectrim.engines.residual import normalised_gram
from spectrim.evaluate.language import evaluate
from spectrim.linalg.slicing import principal_basis
from spectrim.methods.weights.slicegpt import sliced
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers
from spectrim.registry import make_method

ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("svd", "svd", {}),
    ("svd-llm", "svd-llm", {}),
    ("slicegpt", "slicegpt", {}),
    ("slicegpt, not turned", "slicegpt", {"basis": "variance"}),
    ("slicegpt, random turn", "slicegpt", {"basis": "random"}),
    ("modegpt", "modegpt", {}),
    ("modegpt, equal blocks", "modegpt", {"allocation": "uniform"}),
    ("magnitude, same parts", "modegpt", {"allocation": "uniform", "rule": "magnitude"}),
]


@torch.no_grad()
def largest_change(dense: Any, ids: torch.Tensor) -> float:
    """Of any logit by a rotation at full width."""
    walk = find_layers(dense)
    gram = normalised_gram(dense, ["model.norm"], ids)
    turned = sliced(dense, walk, principal_basis(gram, len(gram)))
    before, after = (model(input_ids=ids[:2].to(dense.device)).logits for model in (dense, turned))
    return float((before - after).abs().max())


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.75, 0.6])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    asked = {"length": args.length, "count": args.windows}
    held_out = evaluation_windows(load_texts(args.text, split="evaluation"), tokenizer, **asked).ids
    ids = calibration_windows(load_texts(args.text, split="calibration"), tokenizer, **asked, seed=0).ids
    print(f"{args.model}, {args.windows} windows of {args.length}; dense perplexity "
          f"{evaluate(dense, held_out).perplexity:.2f}; a rotation alone changes no logit by more than "
          f"{largest_change(dense, ids):.1e}")  # fmt: skip
    for keep in args.keeps:
        for label, name, options in ROWS:
            outcome = compress_model(dense, make_method(name, options=dict(options)), keep, ids)
            stored = outcome.plan.numbers_after / outcome.plan.numbers_before
            print(f"keep {keep:<5} {label:22} perplexity {evaluate(outcome.model, held_out).perplexity:9.2f}  "
                  f"stored {stored:.4f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
