"""LoRD on a model of Python: do its completions still parse, and does it matter what it is calibrated on?

    python examples/code_model.py                          # builtin:tiny, taught Python first
    python examples/code_model.py --model FOLDER --adapt 0 # a model that knows Python

The code is this interpreter's standard library: modules of its calibration part to learn and to calibrate on, modules
of its evaluation part for perplexity and for prompts. Figures: perplexity on code, and the share of greedy completions
of function headers that `ast.parse` accepts (evaluate/code.py).
"""

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectrim.data import calibration_windows, load_texts, load_tokenizer
from spectrim.data.stdlib import part_of, source_files, stdlib_root
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.code import function_prompts, parse_share
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method

ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("svd", "svd", {}, "code"),
    ("svd-llm, calibrated on prose", "svd-llm", {}, "prose"),
    ("svd-llm, calibrated on code", "svd-llm", {}, "code"),
    ("afm, calibrated on code", "afm", {}, "code"),
    ("lord, calibrated on prose", "lord", {}, "prose"),
    ("lord, calibrated on code", "lord", {}, "code"),
]


def sources(part: str) -> list[str]:
    """Source files of one part of the standard library, the larger part of which is left to learn from."""
    root = stdlib_root()
    found = []
    for path in source_files(root):
        module = path.relative_to(root).as_posix().split("/")[0].removesuffix(".py")
        if part_of(module) == part:
            found.append(path.read_text(encoding="utf-8", errors="ignore"))
    return found


def windows(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """All windows (N, length) of the texts, shuffled once."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    cut = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))]


def adapt(model: Any, ids: Tensor, steps: int, batch: int) -> None:
    """Next-token training, in place."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = ids[torch.arange(step * batch, (step + 1) * batch) % len(ids)].to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"adapt: step {step + 1} of {steps}, loss {float(loss.detach()):.3f}", flush=True)
    model.eval().requires_grad_(False)


def main() -> None:
    """Teach, compress in every way, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--adapt", type=int, default=200, help="training steps on code before compressing")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8])
    parser.add_argument("--rows", nargs="*", help="labels to run (default: all)")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=40, help="of each completion")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    model, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    learning = windows(tokenizer, sources("calibration"), args.length)
    held_out = windows(tokenizer, sources("evaluation"), args.length)[: args.windows]
    prompts = [p for text in sources("evaluation") for p in function_prompts(text)][: args.prompts]
    if args.adapt:
        adapt(model, learning[args.windows :], args.adapt, args.batch)
    prose = calibration_windows(
        load_texts("builtin:stdlib", split="calibration"), tokenizer, length=args.length, count=args.windows, seed=0
    ).ids
    calibration = {"code": learning[: args.windows], "prose": prose}

    def judge(label: str, keep: float, judged: Any, seconds: float) -> None:
        share = parse_share(judged, tokenizer, prompts, tokens=args.tokens)
        perplexity = evaluate(judged, held_out).perplexity
        print(f"{keep:<5} {label:32} perplexity {perplexity:8.2f}  parse {share:.3f}  {seconds:6.1f} s", flush=True)

    print(f"{args.model}, {args.adapt} steps on code, {len(prompts)} prompts, {args.windows} windows of {args.length}")
    judge("dense", 1.0, model, 0.0)
    for keep in args.keeps:
        for label, name, options, text in (r for r in ROWS if not args.rows or r[0] in args.rows):
            start = time.perf_counter()
            outcome = compress_model(model, make_method(name, options=options), keep, calibration[text])
            judge(label, keep, outcome.model, time.perf_counter() - start)


if __name__ == "__main__":
    main()
