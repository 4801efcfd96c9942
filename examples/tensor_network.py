"""Matrix product operators beside truncated SVD, at equal stored numbers, before healing and after as much of it.

    python examples/tensor_network.py                                    # builtin:tiny
    python examples/tensor_network.py --model FOLDER --keeps 0.7 0.5 0.3 --steps 300

The comparison that the paper lacks. First the profile: what the model loses with one part of it cut to half.
"""

import argparse
import time

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines import recovery
from spectrim.engines.pipeline import compress_model
from spectrim.engines.shares import profile
from spectrim.evaluate.language import evaluate
from spectrim.methods.weights.compactifai import CompactifAI
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers
from spectrim.registry import make_method


def main() -> None:
    """The profile, then every method at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to train on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7])
    parser.add_argument("--windows", type=int, default=48, help="that judge")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sites", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    count = max(args.windows, min(args.steps * args.batch, 2048))
    texts = load_texts(args.text, split="calibration")
    ids = calibration_windows(texts, tokenizer, length=args.length, count=count, seed=0).ids
    judge = load_texts(args.text, split="evaluation")
    held_out = evaluation_windows(judge, tokenizer, length=args.length, count=args.windows).ids
    perplexity = evaluate(dense, held_out).perplexity
    print(f"{args.model}, {args.windows} windows of {args.length} tokens; dense perplexity {perplexity:.2f}")
    print(f"healing: {args.steps} steps of {args.batch} windows")

    walk, method = find_layers(dense), CompactifAI()
    lost = profile(dense, walk, lambda la, s: method.cut(dense, la, method.bond_within(la, s)), [0.5], ids)
    print("KL with one part cut to half: " + ", ".join(f"{name} {kl[0]:.4f}" for name, kl in lost.items()))

    recovery.RECOVERY_BATCH = args.batch
    kl = (f"kl:{args.steps}",) if args.steps else ()
    for keep in args.keeps:
        rows = [("svd", make_method("svd"), ()), ("svd, trained", make_method("svd"), kl)]
        for sites in args.sites:
            for allocation in ("uniform", "profile"):
                options = {"sites": sites, "allocation": allocation}
                rows.append((f"{sites} sites, {allocation}", make_method("compactifai", options=options), ()))
        healing = {"sites": args.sites[0], "steps": args.steps, "batch_size": args.batch}
        rows.append((f"{args.sites[0]} sites, profile, healed", make_method("compactifai", options=healing), ()))
        for label, own, steps in rows:
            start = time.perf_counter()
            outcome = compress_model(dense, own, keep, ids[: args.windows], ids, recovery=steps)
            seconds = time.perf_counter() - start
            quality = evaluate(outcome.model, held_out, dense=dense)
            share = outcome.plan.numbers_after / outcome.plan.numbers_before
            print(f"keep {keep:.2f}  {label:26} stored {share:.4f}  perplexity {quality.perplexity:9.2f}  "
                  f"KL {quality.kl:.4f}  {seconds:6.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
