"""Recovery of layers in few bits: codes stay, and what is stored beside them in 16 bits is trained (`--recover kl`).

    python examples/trained_numbers.py                                     # builtin:tiny
    python examples/trained_numbers.py --model FOLDER --text CALIBRATION --judge TEXT --steps 0 300 --batch 32

Trellis codes beside GPTQ under the same budget of bytes, each without recovery and after the same steps. `stored` is
what the decoder's linear layers take of their bytes in 16 bits, everything counted; training does not change it.
"""

import argparse
import copy
import time
from typing import Any

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.distil import LEARNING_RATE, distil
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.linalg.bits import PER_NUMBER
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method


def main() -> None:
    """One line for each method and each number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate and train on")
    parser.add_argument("--judge", default="builtin:stdlib", help="text to judge by")
    parser.add_argument("--keep", type=float, default=0.134, help="share of the bytes in 16 bits")
    parser.add_argument("--window", type=int, default=8, help="of trellis; its own default is 12, which is slower")
    parser.add_argument("--group-size", type=int, default=0, help="of gptq, 2 bits; 0: whole rows")
    parser.add_argument("--windows", type=int, default=32, help="to calibrate on, and to judge by")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 40], help="0 is without recovery")
    parser.add_argument("--batch", type=int, default=8, help="windows a step; `--recover kl` takes 32")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, length=args.length, seed=0,
        count=max(args.windows, max(args.steps) * args.batch),
    ).ids  # fmt: skip
    judge = load_texts(args.judge, split="evaluation")
    held_out = evaluation_windows(judge, tokenizer, length=args.length, count=args.windows).ids
    print(f"{args.model}, keep {args.keep:g}; dense perplexity {evaluate(dense, held_out).perplexity:.2f}")
    rows: dict[str, dict[str, Any]] = {
        "gptq": {"bits": 2, "group_size": args.group_size},
        "trellis": {"window": args.window},
    }
    for name, options in rows.items():
        start = time.perf_counter()
        outcome = compress_model(dense, make_method(name, options=options), args.keep, ids[: args.windows])
        stored = sum(placed.size("bytes") for placed in outcome.placed.values())
        share = stored / (PER_NUMBER["bytes"] * outcome.walk.numbers)
        for steps in args.steps:
            model = copy.deepcopy(outcome.model)
            distil(
                model, dense, outcome.walk, ids, steps=steps, batch_size=args.batch, learning_rate=args.learning_rate
            )
            seconds, start = time.perf_counter() - start, time.perf_counter()
            round_to(model, source.dtype)
            quality = evaluate(model, held_out, dense=dense)
            print(f"{name:8} {steps:4d} steps  stored {share:.4f}  perplexity {quality.perplexity:9.2f}  "
                  f"KL {quality.kl:.4f}  {seconds:6.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
