"""Do summed layer errors predict the loss? Ranks by predicted errors, by losses one layer at a time, by evolution.

    python examples/search_ranks.py                              # builtin:tiny
    python examples/search_ranks.py --model FOLDER --method svd --keep 0.7

Prints, on held-out text, what each allocation of the same numbers gives, beside random search with as many forward
passes as evolution; and over random profiles of the same size the rank correlation between summed error and KL.
"""

import argparse
import time

import torch
from torch import Tensor

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.layerwise import apply_plan, decompose_all
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import frozen, measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import plan_of
from spectrim.engines.search import STAGES, Choice, Searched, draw, exchanged, logits, searchable, shapes
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers
from spectrim.registry import make_method

EXCHANGES = 30
"""Between the uniform profile and a random one."""


def random_profile(searched: Searched, generator: torch.Generator) -> Choice:
    """A profile of the same size, far from uniform."""
    choice: Choice = tuple([searched.start] * len(searched.now))
    for _ in range(EXCHANGES):
        choice = exchanged(choice, shapes(searched), searched.options, generator)
    return choice


def summed_error(searched: Searched, choice: Choice) -> float:
    """The predicted errors of all layers, each relative to that of losing the layer."""
    return sum(
        float(own.options.error[options[level]] / searched.spectra[own.layer.name].energy.sum())
        for own, options, level in zip(searched.priced, searched.options, choice, strict=True)
    )


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([torch.tensor(x).argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def profiles(
    searched: Searched, ids: Tensor, count: int, windows: int
) -> tuple[list[Choice], list[float], list[float]]:
    """Random profiles, their summed errors, their KL on one mini-batch."""
    generator = torch.Generator().manual_seed(0)
    batch = draw(ids, windows, generator)
    with frozen(searched.dense):
        teacher = logits(searched.dense, batch)
        choices = [random_profile(searched, generator) for _ in range(count)]
        return choices, [summed_error(searched, c) for c in choices], [
            searched.fitness(c, batch, teacher) for c in choices
        ]  # fmt: skip


def main() -> None:
    """Every allocation, then the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--text", default="builtin:stdlib", help="text to calibrate on and to judge by")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--generations", type=int, default=30)
    parser.add_argument("--offspring", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    size = {"length": args.length, "count": args.windows}
    ids = calibration_windows(load_texts(args.text, split="calibration"), tokenizer, seed=0, **size).ids
    held_out = evaluation_windows(load_texts(args.text, split="evaluation"), tokenizer, **size).ids
    print(f"{args.model}, {args.method}, keep {args.keep}, {args.windows} windows of {args.length} tokens; dense "
          f"perplexity {evaluate(dense, held_out).perplexity:.2f}")  # fmt: skip

    def say(label: str, model: torch.nn.Module, seconds: float) -> None:
        quality = evaluate(model, held_out, dense=dense)  # type: ignore[arg-type]
        print(f"{label:36} perplexity {quality.perplexity:8.2f}  KL {quality.kl:.4f}  {seconds:6.1f} s", flush=True)

    evolution = {"generations": args.generations, "offspring": args.offspring}
    for allocation in ("uniform", "global", "sensitivity", "evopress"):
        start = time.perf_counter()
        method = make_method(args.method, options={"allocation": allocation, **evolution})
        outcome = compress_model(dense, method, args.keep, ids)
        say(allocation, outcome.model, time.perf_counter() - start)

    start = time.perf_counter()
    method, walk = make_method(args.method), find_layers(dense)
    spectra = decompose_all(method, dense, walk, measure(dense, walk, ids, method.needs))
    searched = searchable(method, dense, walk, spectra, {}, args.keep)
    windows = STAGES[-1][1]
    passes = args.generations * (args.offspring * STAGES[0][1] + (STAGES[0][0] + 1) * windows)
    choices, errors, losses = profiles(searched, ids, passes // windows, windows)
    best = choices[min(range(len(losses)), key=losses.__getitem__)]
    picked = [options[level] for options, level in zip(searched.options, best, strict=True)]
    student = skeleton(dense)
    apply_plan(student, walk, plan_of(searched.priced, picked, walk), spectra)
    say(f"best of {len(choices)} random profiles", student, time.perf_counter() - start)
    print(f"rank correlation of summed error and KL over them: {rank_correlation(errors, losses):.2f}")


if __name__ == "__main__":
    main()
