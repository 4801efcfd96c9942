"""WeLore: ranks by one threshold against equal shares, then training only the low-rank parts, only the dense, or both.

    python examples/low_rank_parts.py                     # builtin:tiny
    python examples/low_rank_parts.py --model FOLDER --device cuda

Perplexity is on held-out text. Training is next-token loss on the calibration part of the same text, the same windows
for all; memory is what gradients and Adam's two moments take in float32 (12 bytes a trained number).
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method

BYTES_A_NUMBER = 12

PARTS: dict[str, Callable[[str], bool]] = {
    "low-rank": lambda codec: codec != "dense",
    "dense": lambda codec: codec == "dense",
    "all": lambda codec: True,
}


def trained_numbers(model: nn.Module, outcome: Outcome, part: str) -> list[nn.Parameter]:
    """The parameters of the decoder linears of one kind, each one's own."""
    chosen = [name for name, placed in outcome.placed.items() if PARTS[part](placed.codec)]
    return [p for name in chosen for p in model.get_submodule(name).parameters()]


def train(model: Any, parameters: list[nn.Parameter], ids: Tensor, steps: int, batch: int, rate: float) -> None:
    """Next-token training of `parameters`, in place."""
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in range(steps):
        rows = ids[torch.arange(step * batch, (step + 1) * batch) % len(ids)].to(model.device)
        with torch.enable_grad():
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.requires_grad_(False)


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to train on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--train-at", type=float, default=0.7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    held_out = evaluation_windows(
        load_texts(args.text, split="evaluation"), tokenizer, length=args.length, count=args.windows
    ).ids
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, length=args.length, count=args.steps * args.batch, seed=0
    ).ids
    print(f"{args.model}, {args.windows} windows of {args.length}; dense perplexity "
          f"{evaluate(dense, held_out).perplexity:.2f}")  # fmt: skip
    for keep in args.keeps:
        found = []
        for name in ("svd", "welore"):
            outcome = compress_model(dense, make_method(name), keep, ids[:1])
            found.append(f"{name} {evaluate(outcome.model, held_out).perplexity:9.2f}")
        low_rank = [placed for placed in outcome.placed.values() if placed.codec != "dense"]
        print(f"keep {keep:<5} {'  '.join(found)}  welore: {len(low_rank)} of {len(outcome.placed)} layers low-rank")

    outcome = compress_model(dense, make_method("welore"), args.train_at, ids[:1])
    for part in PARTS:
        model = copy.deepcopy(outcome.model)
        parameters = trained_numbers(model, outcome, part)
        numbers = sum(p.numel() for p in parameters)
        start = time.perf_counter()
        if parameters:
            train(model, parameters, ids, args.steps, args.batch, args.rate)
        seconds = time.perf_counter() - start
        print(f"keep {args.train_at}, {args.steps} steps on {part:9} perplexity "
              f"{evaluate(model, held_out).perplexity:8.2f}  {numbers:>12,} numbers trained, "
              f"{numbers * BYTES_A_NUMBER / 2**20:7.1f} MiB  {seconds:6.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
