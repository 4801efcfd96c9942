"""SliceGPT with one rotation for the whole model, and with one for each norm as in the paper, at equal stored numbers.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/rotations.py --data .carry --windows 16 --evaluation-windows 6

One a norm puts a K x K matrix on every skip connection, two a block; they count, beside the decoder's linear layers. It
is worked out at full width: the stream h (D,) is projected, h <- Q_l Q_l^T h, before it meets norm l, which is what
the narrow model computes (RMSNorm over K numbers divides by the root mean square of all D, linalg/slicing.py). Each
Q_l is measured on the stream as the layers before it, already cut, leave it. The head reads the full width, as in the
paper, and is not counted: to the advantage of one a norm.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from reference_data import calibration_windows, held_out, unpack_model
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.linalg.curvature import add_gram
from spectrim.linalg.factor import wide_product
from spectrim.linalg.slicing import principal_basis
from spectrim.methods.weights.slicegpt import SliceGPT, hidden_size, sliced_numbers
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.models.walk import Walk, find_layers

Project = Callable[[str, Tensor], Tensor]
"""From a norm's name and the stream before it to the stream as it is there."""


def through_block(block: Any, name: str, project: Project, hidden_states: Tensor, **given: Any) -> Tensor:
    """A block whose stream is projected before each of its norms."""
    hidden = project(f"{name}.input_layernorm", hidden_states)
    hidden = hidden + block.self_attn(hidden_states=block.input_layernorm(hidden), **given)[0]
    hidden = project(f"{name}.post_attention_layernorm", hidden)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def projected(dense: PreTrainedModel, walk: Walk, project: Project) -> PreTrainedModel:
    """The model with `project` before every norm of its blocks."""
    model = skeleton(dense)
    for name in walk.block_names:
        block = model.get_submodule(name)
        block.forward = partial(through_block, block, name, project)
    return model


class Rotations:
    """One basis for each norm, measured on the first call and used from then on."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.bases: dict[str, Tensor] = {}

    def __call__(self, norm: str, hidden: Tensor) -> Tensor:
        if norm not in self.bases:
            rows = hidden.flatten(0, 1).float()
            gram = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
            add_gram(gram, rows * rows.square().mean(-1, keepdim=True).rsqrt())
            self.bases[norm] = principal_basis(gram, self.width)
        basis = self.bases[norm].float()
        return wide_product(wide_product(hidden.float(), basis), basis.mT).to(hidden.dtype)


def width_of_one_a_norm(walk: Walk, before: int, budget: int) -> int:
    """The largest width whose layers and skip matrices fit."""
    blocks = len(walk.block_names)
    fits = [k for k in range(1, before) if sliced_numbers(walk, before, k) + 2 * blocks * k * k <= budget]
    return fits[-1]


@torch.no_grad()
def one_a_norm(dense: PreTrainedModel, walk: Walk, budget: int, ids: Tensor) -> tuple[PreTrainedModel, int]:
    """The model, and its width; all windows pass through each block at once."""
    rotations = Rotations(width_of_one_a_norm(walk, hidden_size(dense.config), budget))
    model = projected(dense, walk, rotations)
    cast(Any, model).model(input_ids=ids.to(dense.device), use_cache=False)
    return model, rotations.width


def main() -> None:
    """Both, at every keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.9, 0.8, 0.7])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluation-windows", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack_model(args.data, Path(scratch))
        dense = load_dense(resolve(str(folder)), pick_device(args.device))
        ids = calibration_windows(args.data, folder)[: args.windows, : args.length]
    texts = {name: ids[: args.evaluation_windows] for name, ids in held_out(args.data, ("wikitext2", "novels")).items()}
    walk = find_layers(dense)

    def say(keep: float, label: str, model: PreTrainedModel) -> None:
        figures = " / ".join(f"{evaluate(model, held).perplexity:.2f}" for held in texts.values())
        print(f"{keep:<5} {label:34} {figures}", flush=True)

    say(1.0, "dense", dense)
    everything = Rotations(hidden_size(dense.config))  # at full width nothing may change
    say(1.0, "one a norm, full width", projected(dense, walk, everything))
    for keep in args.keeps:
        one = compress_model(dense, SliceGPT(), keep, ids).model
        say(keep, f"one rotation, width {hidden_size(one.config)}", one)
        many, width = one_a_norm(dense, walk, int(keep * walk.numbers), ids)
        say(keep, f"one a norm, width {width}", many)


if __name__ == "__main__":
    main()
