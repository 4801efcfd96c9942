"""LPAF against plain SVD at the same stored numbers: before any fine-tuning of the factors, and after as many steps.

    python examples/prune_factorise.py                     # builtin:tiny
    python examples/prune_factorise.py --steps 300 --length 128 --keeps 0.6 0.4

Weights are pruned by movement, and by size, over the same windows; each is then factorised with and without weighing
columns by their survivors. Last, LPAF's mixed-rank fine-tuning against SVD that is distilled for as many steps, on as
many windows each, as LPAF prunes and tunes together. Perplexity is on held-out text.
"""

import argparse
import time
from typing import Any

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.distil import distil
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method


def main() -> None:
    """One line a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to train on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.4])
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=80, help="of pruning, and again of fine-tuning")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    held_out = evaluation_windows(
        load_texts(args.text, split="evaluation"), tokenizer, length=args.length, count=args.windows
    ).ids
    count = 2 * args.steps * args.batch
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, length=args.length, count=count, seed=0
    ).ids
    print(f"{args.model}, {args.windows} windows of {args.length}; dense {evaluate(dense, held_out).perplexity:.2f}")

    def row(label: str, keep: float, method: str, distil_steps: int = 0, **options: Any) -> None:
        start = time.perf_counter()
        outcome = compress_model(dense, make_method(method, options=options), keep, ids[:32], ids)
        distil(outcome.model, dense, outcome.walk, ids, steps=distil_steps, batch_size=args.batch)
        seconds = time.perf_counter() - start
        found = evaluate(outcome.model, held_out).perplexity
        print(f"keep {keep:<5} {label:44} {found:9.2f}  {seconds:6.1f} s", flush=True)

    pruned = {"sparsity": args.sparsity, "prune_steps": args.steps, "mixed_steps": 0, "batch_size": args.batch}
    for keep in args.keeps:
        row("svd", keep, "svd")
        row("pruned by size, weighed", keep, "lpaf", **pruned, scores="size")
        row("pruned by movement", keep, "lpaf", **pruned, weigh=False)
        row("pruned by movement, weighed", keep, "lpaf", **pruned)
        row(f"lpaf: the same, {args.steps} mixed-rank steps", keep, "lpaf", **{**pruned, "mixed_steps": args.steps})
        row(f"svd, {2 * args.steps} steps of distillation", keep, "svd", 2 * args.steps)


if __name__ == "__main__":
    main()
