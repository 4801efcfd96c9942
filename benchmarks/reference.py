"""All methods on the reference model at equal stored numbers: the table of benchmarks/README.md.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/reference.py --data .carry --out results --device cuda --keeps 0.8 0.5

256 calibration windows of 512 tokens, 4,096 for learning, all from the training text; perplexity over the first 300
windows of 512 tokens of each held-out text, without overlap. Each result is written as a folder, its stored numbers
are counted from the files' headers, and the figures are of the weights rounded as stored (bf16). The JSON is rewritten
after every row, so that a run that is cut short keeps what it has.
"""

import argparse
import json
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import finalise, round_to, write_folder
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method
from spectrim.report.facts import environment
from spectrim.store import open_checkpoint

TEXTS = ("wikitext2", "valid.wiki", "novels")
CALIBRATION_WINDOWS = 256

UNIFORM_FACTORS = {"storage": "factor", "allocation": "uniform", "rounds": 0}

# label, method, preset, options, seed
ROWS: list[tuple[str, str, str | None, dict[str, Any], int]] = [
    ("svd", "svd", None, {}, 0),
    ("asvd", "asvd", None, {}, 0),
    ("svd-llm", "svd-llm", None, {}, 0),
    ("two-sided, uniform factors, 0 rounds", "two-sided", None, UNIFORM_FACTORS, 0),
    ("soco --preset fast", "soco", "fast", {}, 0),
    ("soco --preset balanced", "soco", "balanced", {}, 0),
    ("soco --preset balanced, basis svd", "soco", "balanced", {"basis": "svd"}, 0),
    ("soco --preset best", "soco", "best", {}, 0),
    ("soco --preset balanced, seed 1", "soco", "balanced", {}, 1),
    ("soco --preset balanced, seed 2", "soco", "balanced", {}, 2),
    ("svd-llm, update=sequential", "svd-llm", None, {"update": "sequential"}, 0),
    ("svd, pivot storage", "svd", None, {"storage": "pivot"}, 0),
    ("svd-llm, pivot storage", "svd-llm", None, {"storage": "pivot"}, 0),
    ("two-sided, pivot, global, 0 rounds", "two-sided", None, {"rounds": 0}, 0),
    ("soco balanced, phase 3 only", "soco", "balanced", {"explore": 0.0, "refine": 0.0}, 0),
    ("soco balanced, phases 1 and 3", "soco", "balanced", {"explore": 0.3, "refine": 0.0}, 0),
    ("soco balanced, phases 2 and 3", "soco", "balanced", {"explore": 0.0, "refine": 0.6}, 0),
]  # fmt: skip


def load_ids(path: Path) -> torch.Tensor:
    """Windows (count, 512) as int64."""
    return torch.from_numpy(np.load(path).astype(np.int64))


def counted_keep(outcome: Outcome) -> tuple[float, int]:
    """Share of stored numbers of the decoder linears and bytes of the whole model, from the written files."""
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), finalise(outcome, torch.bfloat16, base_model=None), None)
        written = open_checkpoint(Path(scratch))
        prefixes = tuple(layer.name + "." for layer in outcome.walk.layers)
        after = sum(info.numel for name, info in written.tensors.items() if name.startswith(prefixes))
        return after / outcome.walk.numbers, written.nbytes


def main() -> None:
    """Run the rows that were asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--model", default="ref-llama-24m")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--rows", nargs="*", help="labels to run (default: all)")
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    args = parser.parse_args()
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.mkdtemp()
    with tarfile.open(args.data / "model.tar.xz") as tar:
        tar.extractall(scratch, filter="data")
    device = pick_device(args.device)
    dense = load_dense(resolve(f"{scratch}/{args.model}"), device)
    training = load_ids(args.data / "training.npy")
    texts = {name: load_ids(args.data / f"{name}.npy") for name in TEXTS}
    results: dict[str, Any] = {"environment": environment(), "model": args.model, "rows": []}

    def add(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        (args.out / "reference.json").write_text(json.dumps(results, indent=1))
        figures = " / ".join(f"{row[name]:.2f}" for name in TEXTS)
        print(
            f"{row['keep']:<5} {row['label']:40} {figures:24} counted {row['counted']:.5f}  {row['seconds']:.1f} s",
            flush=True,
        )

    batch_size = 64 if device.type == "cuda" else 8
    row = {name: evaluate(dense, ids, batch_size=batch_size).perplexity for name, ids in texts.items()}
    add({"label": "dense", "keep": 1.0, "counted": 1.0, "seconds": 0.0, "settings": {}, **row})
    for label, name, preset, options, seed in ROWS:
        for keep in args.keeps:
            if (args.rows and label not in args.rows) or time.time() - started > args.seconds:
                continue
            method = make_method(name, preset, dict(options))
            clock = time.perf_counter()
            outcome = compress_model(
                dense, method, keep, training[:CALIBRATION_WINDOWS], training[CALIBRATION_WINDOWS:],
                gradient_windows=args.gradient_windows, seed=seed,
            )  # fmt: skip
            seconds = time.perf_counter() - clock
            round_to(outcome.model, torch.bfloat16)
            counted, size = counted_keep(outcome)
            row: dict[str, Any] = {"label": label, "keep": keep, "counted": counted, "bytes": size, "seconds": seconds}
            row |= {"stages": outcome.seconds, "settings": method.to_config(), "seed": seed}
            for text, ids in texts.items():
                quality = evaluate(outcome.model, ids, dense=dense, batch_size=batch_size)
                row |= {text: quality.perplexity, f"{text}.kl": quality.kl, f"{text}.agreement": quality.agreement}
            if outcome.learned:
                row |= {"losses": outcome.learned.losses, "returned": outcome.learned.returned}
            add(row)


if __name__ == "__main__":
    main()
