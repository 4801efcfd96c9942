"""Entries kept in 16 bits: what they are worth in an ordinary model, and in one whose weights have large columns.

    python examples/outliers.py                       # builtin:tiny
    python examples/outliers.py --model FOLDER --text CALIBRATION --judge TEXT TEXT --bits 3

The second model computes the same as the first: a few gains of each norm are divided by `--factor`, and the columns of
the weights behind it multiplied by as much. Large models have such channels by themselves; a small one has hardly any.
Bits are of all that is stored for a weight.
"""

import argparse
import copy
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.measure import measure
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.linalg.bits import PER_NUMBER, VALUE_BYTES
from spectrim.methods.weights.packed import PackedMethod
from spectrim.model_method import Job
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import Walk, find_layers, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats

BEHIND = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Norms of a Llama block, and the layers that read what they put out."""


@torch.no_grad()
def with_large_columns(dense: Any, walk: Walk, share: float, factor: float) -> Any:
    """The same function with a `share` of the columns behind each norm `factor` times as large."""
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    for name in walk.block_names:
        for norm, readers in BEHIND.items():
            gains = cast(Tensor, model.get_submodule(f"{name}.{norm}").weight)
            chosen = torch.randperm(len(gains), generator=generator)[: max(1, round(share * len(gains)))]
            gains[chosen] /= factor
            for reader in readers:
                weight_of(model.get_submodule(f"{name}.{reader}"))[:, chosen] *= factor
    return model


def rows_of(bits: int, group_size: int) -> list[tuple[str, PackedMethod]]:
    """Label and method."""
    rows: list[tuple[str, str, dict[str, Any]]] = [
        (f"gptq {bits}, groups of {group_size}", "gptq", {"group_size": group_size}),
        (f"gptq {bits}, a group a row", "gptq", {"group_size": 0}),
        *((f"spqr {bits}, outliers {s:g}", "spqr", {"group_size": group_size, "outliers": s}) for s in (0.0, 0.02)),
        (f"k-means {bits}", "squeezellm", {"weigh": "none", "outliers": 0.0, "sensitive": 0.0}),
        *(
            (f"squeezellm {bits}, outliers {s:g}", "squeezellm", {"outliers": s, "sensitive": s / 8})
            for s in (0.0, 0.02)
        ),
    ]
    made = [(label, make_method(name, options={"bits": bits, **options})) for label, name, options in rows]
    return [(label, cast(PackedMethod, method)) for label, method in made]


def bits_of(model: nn.Module, walk: Walk) -> float:
    """Stored bits a weight of the decoder's linear layers."""
    stored = sum(cast(PackedLinear, model.get_submodule(layer.name)).counted_bytes for layer in walk.layers)
    return 8 * VALUE_BYTES * stored / (PER_NUMBER["bytes"] * walk.numbers)


def job_on(dense: Any, walk: Walk, stats: dict[str, Stats], ids: Tensor) -> Job:
    """What `compress_model` would give a method, with statistics that are measured once for all rows."""
    return Job(
        dense=dense, walk=walk, keep=1.0, budget=PER_NUMBER["bytes"] * walk.numbers, stats=stats, calibration=ids,
        training=ids, gradient_windows=0, seed=0, warnings=[], timed=lambda _: nullcontext(),
    )  # fmt: skip


def main() -> None:
    """One line for each model and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on")
    parser.add_argument("--judge", nargs="+", default=["builtin:stdlib"], help="texts to judge by")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.03, help="of the channels that are made large")
    parser.add_argument("--factor", type=float, default=8.0)
    parser.add_argument("--windows", type=int, default=16, help="to calibrate on")
    parser.add_argument("--eval-windows", type=int, default=16, help="of each text")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    walk, size = find_layers(dense), {"length": args.length}
    ids = calibration_windows(
        load_texts(args.text, split="calibration"), tokenizer, seed=0, count=args.windows, **size
    ).ids
    texts = [
        evaluation_windows(load_texts(spec, split="evaluation"), tokenizer, count=args.eval_windows, **size).ids
        for spec in args.judge
    ]

    def say(label: str, bits: float, model: Any, seconds: float) -> None:
        figures = " / ".join(f"{evaluate(model, held).perplexity:.2f}" for held in texts)
        print(f"{label:32} bits {bits:6.3f}  {figures:24} {seconds:6.1f} s", flush=True)

    print(f"{args.model}; {', '.join(Path(t).name for t in args.judge)}")
    for name, model in (
        ("ordinary", dense),
        ("large columns", with_large_columns(dense, walk, args.share, args.factor)),
    ):
        stats = measure(model, walk, ids, frozenset({Stat.GRAM, Stat.FISHER}))  # once for all rows
        say(f"{name}: dense", 8.0 * VALUE_BYTES, model, 0.0)
        for label, method in rows_of(args.bits, args.group_size):
            start = time.perf_counter()
            small = method.compress(job_on(model, walk, stats, ids))
            seconds = time.perf_counter() - start
            round_to(small, source.dtype)
            say(label, bits_of(small, walk), small, seconds)


if __name__ == "__main__":
    main()
