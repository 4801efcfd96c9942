"""Dense times semi-sparse beside truncated SVD: the error of every weight at equal bytes, then perplexity.

    python examples/semi_sparse.py                                       # builtin:tiny
    python examples/semi_sparse.py --model FOLDER --keeps 0.8 0.6 0.4 --solvers alternate straight-through

The error is that of the layers' outputs on calibration text, relative; low rank has its optimum there (`svd-llm`). The
semi-sparse form is charged for a bit for every entry of the sparse factor. Then, on one weight at the same numbers: one
dictionary or one for each half or quarter of the rows, densities, and the paper's factoriser.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines import recovery as recovery_steps
from spectrim.engines.measure import measure
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.linalg.metric import root_of, shrink
from spectrim.linalg.semi_sparse import DENSITY, alternate, size_within, straight_through
from spectrim.method import Method
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.codecs import StoredLinear
from spectrim.registry import make_method
from spectrim.stats import Stat

SOLVERS = ("alternate", "straight-through")


def errors_of(outcome: Outcome, weights: dict[str, Tensor], grams: dict[str, Tensor]) -> Tensor:
    """|| (W - W') R ||^2 / || W R ||^2 of every layer that is stored in another form."""
    found = []
    for name, weight in weights.items():
        module = outcome.model.get_submodule(name)
        if isinstance(module, StoredLinear):
            lost = weight - module.dense_weight().double()
            found.append(float(((lost @ grams[name]) * lost).sum() / ((weight @ grams[name]) * weight).sum()))
    return torch.tensor(found)


def error_as(
    measured: Tensor, keep: float, *, blocks: int = 1, density: float = DENSITY, solver: str = "alternate"
) -> float:
    """The relative error of M (O, I), in all; each block of rows has atoms of its own."""
    lost = 0.0
    for part in measured.chunk(blocks):
        size = size_within(len(part), part.shape[1], int(keep * part.numel()), density)
        assert size is not None, "blocks too small for one atom"
        found = alternate(part, size) if solver == "alternate" else straight_through(part, size)
        lost += float((part - found.sparse @ found.atoms).square().sum())
    return lost / float(measured.square().sum())


def one_weight(measured: Tensor, keep: float) -> None:
    """What the choices of the method are worth on M (O, I) = W R."""
    energy = torch.linalg.svdvals(measured).square()
    rank = int(keep * measured.numel()) // sum(measured.shape)
    print(f"keep {keep:.2f}  one weight: truncated SVD {float(energy[rank:].sum() / energy.sum()):.4f}")
    for label, values in {"blocks": (1, 2, 4), "density": (0.2, 0.3, 0.4, 0.5, 0.6), "solver": SOLVERS}.items():
        shown = ", ".join(f"{value}: {error_as(measured, keep, **{label: value}):.4f}" for value in values)
        print(f"keep {keep:.2f}  one weight by {label}  {shown}", flush=True)


def rows_of(solvers: list[str], steps: int, batch: int) -> list[tuple[str, Method, tuple[str, ...]]]:
    """Label, method, recovery."""
    rows = [(name, make_method(name), ()) for name in ("svd", "svd-llm")]
    rows.append(("svd-llm, pivot storage", make_method("svd-llm", options={"storage": "pivot"}), ()))
    rows += [(f"dsformer, {s}", make_method("dsformer", options={"solver": s}), ()) for s in solvers]
    if not steps:
        return rows
    trained: dict[str, Any] = {"steps": steps, "batch_size": batch}
    return [
        *rows,
        ("svd-llm, trained", make_method("svd-llm"), (f"kl:{steps}",)),
        ("dsformer, support fixed", make_method("dsformer", options={**trained, "reselect_every": 1_000_000}), ()),
        ("dsformer, straight through", make_method("dsformer", options={**trained, "reselect_every": 5}), ()),
    ]


def main() -> None:
    """Every method at every size, then blocks of one weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.6])
    parser.add_argument("--solvers", nargs="*", default=["alternate"])
    parser.add_argument("--steps", type=int, default=0, help="of training; then also with it")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--weight", default="model.layers.3.mlp.up_proj", help="on which choices are compared")
    parser.add_argument("--only-weight", action="store_true", help="compare choices on the one weight and no models")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    count, recovery_steps.RECOVERY_BATCH = max(args.windows, args.steps * args.batch), args.batch
    texts = load_texts(args.text, split="calibration")
    ids = calibration_windows(texts, tokenizer, length=args.length, count=count, seed=0).ids
    judge = load_texts(args.text, split="evaluation")
    held_out = evaluation_windows(judge, tokenizer, length=args.length, count=args.windows).ids
    walk = find_layers(dense)
    stats = measure(dense, walk, ids[: args.windows], frozenset({Stat.GRAM}))
    grams = {name: own.get(Stat.GRAM) for name, own in stats.items()}
    weights = {la.name: weight_of(dense.get_submodule(la.name)).detach().double() for la in walk.layers}
    print(f"{args.model}, {args.windows} windows of {args.length} tokens; dense perplexity "
          f"{evaluate(dense, held_out).perplexity:.2f}")  # fmt: skip
    for keep in args.keeps:
        rows = [] if args.only_weight else rows_of(args.solvers, args.steps, args.batch)
        for label, method, recovery in rows:
            start = time.perf_counter()
            outcome = compress_model(dense, method, keep, ids[: args.windows], ids, recovery=recovery)
            seconds = time.perf_counter() - start
            errors, quality = errors_of(outcome, weights, grams), evaluate(outcome.model, held_out, dense=dense)
            share = outcome.plan.numbers_after / outcome.plan.numbers_before
            print(f"keep {keep:.2f}  {label:28} stored {share:.4f}  error {errors.mean():.4f} (worst "
                  f"{errors.max():.4f})  perplexity {quality.perplexity:9.2f}  KL {quality.kl:.4f}  {seconds:6.1f} s",
                  flush=True)  # fmt: skip
        measured = (weights[args.weight] @ root_of(shrink(grams[args.weight], 0.01)).root).float()
        one_weight(measured, keep)


if __name__ == "__main__":
    main()
