"""Where MoDeGPT's loss comes from: one part of every block is cut, the others stay whole.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/modegpt_parts.py --data .carry --windows 32 --length 256 --evaluation-windows 6

By moments (the method) and by magnitude, in the same sizes. Statistics are the dense model's, of the head of the
training text; perplexity is on wikitext2 and novels, windows of 512 tokens.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from reference_data import calibration_windows, held_out, unpack_model

from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.evaluate.language import evaluate
from spectrim.methods.weights.modegpt import DOWN, QUERY, MoDeGPT, Size, mlp_width
from spectrim.models.llama_like import heads_of
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import find_layers
from spectrim.stats import Stat

PARTS: dict[str, Callable[[Size, float], Size]] = {
    "MLP": lambda whole, keep: whole._replace(channels=int(keep * whole.channels)),
    "queries and keys": lambda whole, keep: whole._replace(pairs=int(keep * whole.pairs)),
    "values and outputs": lambda whole, keep: whole._replace(values=int(keep * whole.values)),
}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--keep", type=float, default=0.75, help="of the part that is cut")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--evaluation-windows", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack_model(args.data, Path(scratch))
        dense = load_dense(resolve(str(folder)), pick_device(args.device))
        ids = calibration_windows(args.data, folder)[: args.windows, : args.length]
    texts = {name: ids[: args.evaluation_windows] for name, ids in held_out(args.data, ("wikitext2", "novels")).items()}
    walk, heads = find_layers(dense), heads_of(dense.config)
    stats = measure(dense, walk, ids, frozenset({Stat.GRAM, Stat.MEAN}))
    rows = {"dense": dense}
    for rule in ("moments", "magnitude"):
        method = MoDeGPT(rule=rule)
        for part, cut in PARTS.items():
            rows[f"{part}, by {rule}"] = model = skeleton(dense)
            for name in walk.block_names:
                block = model.get_submodule(name)
                size = cut(Size(heads.width // 2, heads.width, mlp_width(block)), args.keep)
                method.cut_attention(block, heads, stats[f"{name}.{QUERY}"], size)
                method.cut_mlp(block, stats[f"{name}.{DOWN}"].get(Stat.GRAM), size.channels)
    for label, model in rows.items():
        figures = " / ".join(f"{evaluate(model, held).perplexity:.2f}" for held in texts.values())
        print(f"{label:34} {figures}", flush=True)


if __name__ == "__main__":
    main()
