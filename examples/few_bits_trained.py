"""LQ-LoRA and INT2.1 beside GPTQ and EoRA at equal bytes, untrained and after the same steps; and where the bits went.

    python examples/few_bits_trained.py                                    # builtin:tiny
    python examples/few_bits_trained.py --model FOLDER --text CALIBRATION --judge TEXT --keep 0.197 --group-size 128

`effective bits` are those of all that a decoder linear stores, over its weights: codes, scales, corrections. Allocation
by integer programming needs SciPy (spectrim[ilp]).
"""

import argparse
import time
from collections import defaultdict
from typing import Any

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores_normal import NormalStore
from spectrim.registry import make_method


def rows(group: int, steps: int, batch: int, rounds: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label to method and options."""
    codes, training = {"group_size": group}, {"steps": steps, "batch_size": batch}
    return {
        "gptq, 3 bits": ("gptq", {"bits": 3, **codes}),
        "eora on gptq, 2 bits": ("eora", {"base": "gptq2", **codes}),
        "int2.1, trained": ("int2.1", {**codes, **training}),
        "lq-lora, one form for all": ("lq-lora", {"allocation": "uniform", "iterations": rounds}),
        "lq-lora": ("lq-lora", {"iterations": rounds}),
        "lq-lora, trained": ("lq-lora", {"iterations": rounds, **training}),
    }


def effective_bits(outcome: Outcome) -> float:
    """Of all that is stored, a weight."""
    stored = sum(placed.size("bytes") for placed in outcome.placed.values())
    return 8 * stored / sum(layer.weight_numbers for layer in outcome.walk.layers)


def where_bits_went(outcome: Outcome) -> str:
    """Mean width of codes by the kind of layer."""
    found: dict[str, list[int]] = defaultdict(list)
    for layer in outcome.walk.layers:
        module = outcome.model.get_submodule(layer.name)
        if isinstance(module, PackedLinear) and isinstance(module.base, NormalStore):
            found[layer.name.rsplit(".", 1)[-1]].append(module.base.form.bits)
    return ", ".join(f"{kind} {sum(bits) / len(bits):.2f}" for kind, bits in found.items())


def main() -> None:
    """One line for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate and train on")
    parser.add_argument("--judge", default="builtin:stdlib", help="text to judge by")
    parser.add_argument("--keep", type=float, default=0.265, help="share of the bytes in 16 bits")
    parser.add_argument("--group-size", type=int, default=16, help="of gptq, eora and int2.1")
    parser.add_argument("--windows", type=int, default=16, help="to calibrate on, and to judge by")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5, help="of lq-lora, at most; its own default is 100")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, length=args.length, seed=0,
        count=max(args.windows, args.steps * args.batch),
    ).ids  # fmt: skip
    judge = load_texts(args.judge, split="evaluation")
    held_out = evaluation_windows(judge, tokenizer, length=args.length, count=args.windows).ids
    print(f"{args.model}, keep {args.keep:g}; dense perplexity {evaluate(dense, held_out).perplexity:.2f}")
    for label, (name, options) in rows(args.group_size, args.steps, args.batch, args.rounds).items():
        start = time.perf_counter()
        try:
            outcome = compress_model(dense, make_method(name, options=options), args.keep, ids[: args.windows], ids)
        except UsageError as error:  # three bits may not fit
            print(f"{label:32} {error}")
            continue
        seconds = time.perf_counter() - start
        round_to(outcome.model, source.dtype)
        quality = evaluate(outcome.model, held_out, dense=dense)
        print(f"{label:32} effective bits {effective_bits(outcome):.3f}  perplexity {quality.perplexity:9.2f}  "
              f"KL {quality.kl:.4f}  {seconds:6.1f} s", flush=True)  # fmt: skip
        if name == "lq-lora":
            print(f"{'':32} bits of codes: {where_bits_went(outcome)}")


if __name__ == "__main__":
    main()
