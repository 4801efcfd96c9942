"""Matrix product operators beside truncated SVD, at equal stored numbers, before healing and after as much of it.

    python examples/tensor_network.py                                    # builtin:tiny
    python examples/tensor_network.py --model FOLDER --keeps 0.7 0.5 0.3 --steps 300

The comparison that the paper lacks: SVD under the same profile, trained for the same steps on the same windows. First
the profile itself: what the model loses with one part of it cut to half.
"""

import argparse
import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.distil import distil
from spectrim.engines.layerwise import build_linear
from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import compress_model
from spectrim.engines.shares import levels_around, profile, shares_by
from spectrim.evaluate.language import evaluate
from spectrim.linalg.factor import decompose, truncate
from spectrim.methods.weights.compactifai import CompactifAI
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import Layer, find_layers, linear_at, weight_of
from spectrim.nn.codecs import StoredLinear
from spectrim.replacement import encode


def low_rank(dense: PreTrainedModel, layer: Layer, share: float):
    """The layer as two factors with at most that share of its numbers."""
    module = linear_at(dense, layer.name)
    weight = weight_of(module).detach()
    rank = max(1, int(share * layer.weight_numbers / (layer.outputs + layer.inputs)))
    return build_linear(encode(truncate(decompose(weight.double()), rank), "factor", like=weight, bias=module.bias))


def svd(dense: PreTrainedModel, keep: float, ids: Tensor, *, by_profile: bool) -> PreTrainedModel:
    """Plain SVD, at equal shares or at those of the same profile that CompactifAI uses."""
    walk, model = find_layers(dense), skeleton(dense)
    shares = dict.fromkeys((layer.name for layer in walk.layers), keep)
    if by_profile:
        levels = levels_around(keep)
        found = profile(dense, walk, lambda la, s: low_rank(dense, la, s), levels, ids)
        shares = shares_by(found, levels, walk, int(keep * walk.numbers))
    for layer in walk.layers:
        if shares[layer.name] < 1:
            model.set_submodule(layer.name, low_rank(dense, layer, shares[layer.name]))
    return model


def stored_share(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """Stored numbers of the target layers, after / before."""
    walk = find_layers(dense)
    modules = [(model.get_submodule(layer.name), layer.numbers) for layer in walk.layers]
    return sum(m.numbers if isinstance(m, StoredLinear) else dense for m, dense in modules) / walk.numbers


def main() -> None:
    """The profile, then every method at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", default="builtin:stdlib", help="text to train on and to judge by")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7])
    parser.add_argument("--windows", type=int, default=48, help="that judge")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    source = resolve(args.model)
    dense, tokenizer = load_dense(source, pick_device(args.device)), load_tokenizer(source.folder)
    texts = load_texts(args.text, split="calibration")
    count = max(args.windows, args.steps * args.batch)
    ids = calibration_windows(texts, tokenizer, length=args.length, count=count, seed=0).ids
    judge = load_texts(args.text, split="evaluation")
    held_out = evaluation_windows(judge, tokenizer, length=args.length, count=args.windows).ids
    perplexity = evaluate(dense, held_out).perplexity
    print(f"{args.model}, {args.windows} windows of {args.length} tokens; dense perplexity {perplexity:.2f}")

    walk, own = find_layers(dense), CompactifAI()
    lost = profile(dense, walk, lambda la, s: own.cut(dense, la, own.bond_within(la, s)), [0.5], ids)
    print("KL with one part cut to half: " + ", ".join(f"{name} {kl[0]:.4f}" for name, kl in lost.items()))

    def network(keep: float, **options) -> PreTrainedModel:
        return compress_model(dense, CompactifAI(**options), keep, ids[: args.windows], ids).model

    def trained_svd(keep: float) -> PreTrainedModel:
        model = svd(dense, keep, ids[: args.windows], by_profile=True)
        distil(model, dense, walk, ids, steps=args.steps, batch_size=args.batch)
        return model

    rows: dict[str, Callable[[float], PreTrainedModel]] = {
        "svd, uniform": lambda keep: svd(dense, keep, ids, by_profile=False),
        "2 sites, uniform": lambda keep: network(keep, allocation="uniform"),
        "3 sites, uniform": lambda keep: network(keep, allocation="uniform", sites=3),
        "svd, profile": lambda keep: svd(dense, keep, ids[: args.windows], by_profile=True),
        "2 sites, profile": lambda keep: network(keep),
        "3 sites, profile": lambda keep: network(keep, sites=3),
    }
    if args.steps:
        rows["svd, profile, trained"] = trained_svd
        rows["2 sites, profile, healed"] = lambda keep: network(keep, steps=args.steps, batch_size=args.batch)
    for keep, (label, make) in ((keep, row) for keep in args.keeps for row in rows.items()):
        start = time.perf_counter()
        model = make(keep)
        seconds, quality = time.perf_counter() - start, evaluate(model, held_out, dense=dense)
        print(f"keep {keep:.2f}  {label:26} stored {stored_share(model, dense):.4f}  perplexity "
              f"{quality.perplexity:9.2f}  KL {quality.kl:.4f}  {seconds:6.1f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
