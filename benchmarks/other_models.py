"""Models that nothing was tuned on, with the same settings for all: the last table of benchmarks/README.md.

    python benchmarks/other_models.py --shared ../shared --out results

Trained: the embedded model, and two third-party models with grouped queries. Random weights: a GPT-2 and an OPT shape,
for the mechanics alone. Everything is sampled from the dense model: calibration and training windows with one seed,
evaluation windows with another, so that no tokenizer is needed. KL is E[KL(dense || compressed)] in nats a token.
Results are written as folders and their numbers counted from the files' headers; figures are of the weights as stored.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PreTrainedModel

from spectrim.data import held_out_samples, sample_windows
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import Quality, evaluate
from spectrim.integrations.folder import finalise, round_to, write_folder
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method
from spectrim.report.facts import environment
from spectrim.store import open_checkpoint

UNIFORM_FACTORS = {"storage": "factor", "allocation": "uniform", "rounds": 0, "coupling": "none", "propagate": 0.0}
"""What is left of `two-sided`, else the same as soco fast: the metric alone."""
ROWS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "svd": ("svd", None, {}),
    "svd-llm": ("svd-llm", None, {}),
    "two-sided, uniform factors": ("two-sided", None, UNIFORM_FACTORS),
    "soco fast": ("soco", "fast", {}),
    "soco balanced": ("soco", "balanced", {"batch_size": 8}),
}
ABLATION: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "balanced, factor storage": ("soco", "balanced", {"batch_size": 8, "storage": "factor"}),
    "balanced, basis svd": ("soco", "balanced", {"batch_size": 8, "basis": "svd"}),
    "balanced, basis svd, factor storage": ("soco", "balanced", {"batch_size": 8, "basis": "svd", "storage": "factor"}),
}
"""Rows that only `--rows` names."""
NAMES = ("stories-260k", "babyllama-0.9m", "gpt2 shape, random", "opt shape, random", "tiny-llama-8m")
TRAINED = {"tiny-llama-8m": torch.bfloat16, "babyllama-0.9m": torch.float32, "stories-260k": torch.float32}


def models(shared: Path) -> Iterator[tuple[str, PreTrainedModel, torch.dtype]]:
    """(name, dense model in float32, stored dtype), the small ones first."""
    for name in ("stories-260k", "babyllama-0.9m"):
        yield name, load_dense(resolve(str(shared / "models" / name)), pick_device("cpu")), TRAINED[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    # A wide spread of weights: the library's own start gives nearly uniform distributions, where no row would differ.
    shapes = {
        "gpt2 shape, random": GPT2Config(n_embd=96, n_layer=4, n_head=4, initializer_range=0.15, **sizes),
        "opt shape, random": OPTConfig(
            hidden_size=96, word_embed_proj_dim=96, ffn_dim=384, num_hidden_layers=4, num_attention_heads=4,
            init_std=0.15, **sizes,
        ),
    }  # fmt: skip
    for name, config in shapes.items():
        yield name, AutoModelForCausalLM.from_config(config).float().eval(), torch.float32
    yield "tiny-llama-8m", load_dense(resolve("builtin:tiny"), pick_device("cpu")), TRAINED["tiny-llama-8m"]


def row(
    name: str, dense: PreTrainedModel, dtype: torch.dtype, label: str, keep: float, ids: dict[str, torch.Tensor],
    seed: int, args: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Compress, count what is written, judge."""
    kind, preset, options = {**ROWS, **ABLATION}[label]
    if preset == "balanced":
        options = {**options, "steps": args.steps}
    method = make_method(kind, preset, options)
    clock = time.perf_counter()
    outcome = compress_model(dense, method, keep, ids["calibration"], ids["training"], seed=seed)
    seconds = time.perf_counter() - clock
    round_to(outcome.model, dtype)
    quality = evaluate(outcome.model, ids["evaluation"], dense=dense)
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), finalise(outcome, dtype, base_model=None), None)
        layers = tuple(layer.name + "." for layer in outcome.walk.layers)
        tensors = open_checkpoint(Path(scratch)).tensors
        counted = sum(info.numel for tensor, info in tensors.items() if tensor.startswith(layers))
    return {
        **facts(name, f"{label}, {args.steps} steps" if preset == "balanced" else label, keep, quality),
        "seed": seed,
        "counted": counted / outcome.walk.numbers,
        "seconds": seconds,
        "settings": method.to_config(),
        "warnings": outcome.warnings,
    }


def facts(name: str, label: str, keep: float, quality: Quality) -> dict[str, Any]:
    """What every row has."""
    return {
        "model": name, "label": label, "keep": keep, "perplexity": quality.perplexity, "kl": quality.kl,
        "agreement": quality.agreement,
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """One row for each model and method, the figures at both keeps in it."""
    sizes = sorted({r["keep"] for r in found["rows"] if "counted" in r}, reverse=True)
    heads = [f"keep {size:g}: perplexity, KL, agreement, counted keep, seconds" for size in sizes]
    lines = [f"| model | method | {' | '.join(heads)} |", "|---" * (2 + len(sizes)) + "|"]
    for key in dict.fromkeys((r["model"], r["label"]) for r in found["rows"]):
        cells = [cell(r) for r in found["rows"] if (r["model"], r["label"]) == key]
        lines.append(f"| {' | '.join([*key, *cells, *[''] * (len(sizes) - len(cells))])} |")
    return "\n".join(lines)


def cell(r: dict[str, Any]) -> str:
    """The figures of one row."""
    if "counted" not in r:
        return f"{r['perplexity']:.2f}"
    return f"{r['perplexity']:.2f}, {r['kl']:.4f}, {r['agreement']:.3f}, {r['counted']:.5f}, {r['seconds']:.1f}"


def main() -> None:
    """Every model, every row, every keep; the file is rewritten after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with the reference models")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--models", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--calib-windows", type=int, default=64)
    parser.add_argument("--train-windows", type=int, default=128)
    parser.add_argument("--eval-windows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="of balanced")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is sampled")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs, which order the windows")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *ABLATION], default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    found: dict[str, Any] = {"environment": environment(), "settings": settings, "rows": []}
    until = time.time() + args.seconds
    for name, dense, dtype in models(args.shared):
        if name not in args.models:
            continue
        training = sample_windows(dense, length=args.length, count=args.train_windows, seed=args.seed).ids
        judging = held_out_samples(dense, length=args.length, count=args.eval_windows, seed=args.seed).ids
        ids = {"calibration": training[: args.calib_windows], "training": training, "evaluation": judging}
        found["rows"].append(facts(name, "dense", 1.0, evaluate(dense, judging)))
        for label, seed, keep in product(args.rows, args.seeds, args.keeps):
            if time.time() < until:
                found["rows"].append(row(name, dense, dtype, label, keep, ids, seed, args))
                print(name, label, f"seed {seed}", keep, cell(found["rows"][-1]), flush=True)
                (args.out / "other-models.json").write_text(json.dumps(found, indent=1) + "\n")
    print(markdown(found))


if __name__ == "__main__":
    main()
