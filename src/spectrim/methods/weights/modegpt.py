"""MoDeGPT: each block is cut by its three parts, from forward passes alone (Lin et al., ICLR 2025, arXiv 2408.09632).

    1. second moments of what attention and the down projection read
    2. what share of each block goes: softmax of minus its influence on the stream, 1 - E cos(before, after)
    3. queries and keys: the rotation pairs with the largest |q|^2 |k|^2 stay            (CR)
       values and outputs: the best product of rank r for each head of values            (SVD)
       MLP: the channels with the largest ridge leverage; down projection fitted anew    (Nystrom)

What goes are whole rows and columns of the dense weights, so the layers that stay compute with smaller dense matrices
(codec "narrow"). The MLP gets what queries, keys, values and outputs leave of the block's share.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from spectrim.engines.learned import skeleton
from spectrim.engines.residual import block_influence
from spectrim.errors import UsageError
from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import root_of
from spectrim.linalg.modular import (
    best_pairs,
    channel_sizes,
    largest_values,
    leverage,
    nystrom_down,
    pair_scores,
    row_sizes,
    sparsities,
    value_output,
    with_bias_input,
)
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, ModelMethod
from spectrim.models.llama_like import (
    HEAD_NORMS,
    LLAMA_LIKE,
    READS_MLP,
    Heads,
    heads_of,
    linear,
    require_llama_like,
    wide_bias,
    wide_weight,
)
from spectrim.models.walk import Walk
from spectrim.nn.narrow import NarrowLinear
from spectrim.stats import Stat, Stats

QUERY, KEY, VALUE, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP = READS_MLP
DOWN = "mlp.down_proj"
ALLOWED = tuple(kind for kind in LLAMA_LIKE if kind not in HEAD_NORMS)


class Size(NamedTuple):
    """What stays of one block."""

    pairs: int  # of a key head
    values: int  # dimensions of a value head
    channels: int  # of the MLP


@dataclass(frozen=True, kw_only=True)
class MoDeGPT(ModelMethod):
    """Narrower heads and MLPs, chosen and fitted from second moments; no backward pass."""

    info: ClassVar = MethodInfo(
        name="modegpt",
        family="weights",
        paper="arXiv 2408.09632",
        promise="narrower heads and MLPs, each part by the decomposition that suits it, no backward pass",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.MEAN})
    codecs: ClassVar = ("narrow",)

    allocation: Literal["influence", "uniform"] = "influence"
    temperature: float = 0.1
    """Of the softmax over blocks; larger is more even."""
    rule: Literal["moments", "magnitude"] = "moments"
    """magnitude: what has the smallest weights goes and nothing is fitted, in the same sizes. To compare with."""
    ridge: float = 1.0
    """Of the leverage scores, in units of the mean second moment of a channel."""

    def __post_init__(self) -> None:
        require_choice("modegpt", "allocation", self.allocation, ("influence", "uniform"))
        require_choice("modegpt", "rule", self.rule, ("moments", "magnitude"))
        require_range("modegpt", "temperature", self.temperature, 1e-3, 1e6)
        require_range("modegpt", "ridge", self.ridge, 1e-9, 1e9)

    def check_model(self, config: PretrainedConfig, walk: Walk, keep: float) -> None:
        """Attention with rotary embedding over whole heads, an MLP with a gate."""
        why = "it needs a gated MLP and queries and keys that rotary embedding reads as they are projected"
        require_llama_like("modegpt", config, walk, ALLOWED, why)

    @torch.no_grad()
    def compress(self, job: Job) -> PreTrainedModel:
        """Steps 2 and 3."""
        model = skeleton(job.dense)
        heads = heads_of(job.dense.config)
        keeps = self.keeps(job)
        for index, name in enumerate(job.walk.block_names):
            if keeps[index] >= 1:
                continue
            block = model.get_submodule(name)
            size = self.size(block, heads, keeps[index])
            with job.timed("decompose"):
                reads, inside = job.stats[f"{name}.{QUERY}"], job.stats[f"{name}.{DOWN}"]
                self.cut_attention(block, heads, reads, size)
                self.cut_mlp(block, inside.get(Stat.GRAM), size.channels)
            if job.progress is not None:
                job.progress("decompose", index + 1, len(keeps))
        return model

    def keeps(self, job: Job) -> list[float]:
        """Step 2: the share that stays of each block; blocks are of equal size."""
        mean = job.budget / job.walk.numbers
        if self.allocation == "uniform" or mean == 1:
            return [mean] * len(job.walk.block_names)
        with job.timed("calibrate"):
            influence = block_influence(job.dense, job.walk, job.calibration)
        return (1 - sparsities(influence, 1 - mean, self.temperature)).tolist()

    def size(self, block: nn.Module, heads: Heads, keep: float) -> Size:
        """The largest parts that fit into `keep` of the block's numbers."""
        before = sum(module.weight.numel() + bias_numbers(module) for module in layers_of(block))
        allowed, half = int(keep * before + 1e-9), heads.width // 2
        pairs, values = max(1, int(keep * half)), max(1, int(keep * heads.width))
        for more_pairs, more_values in ((1, 1), (1, 0), (0, 1)):  # where the MLP then still stays whole
            bigger = Size(min(pairs + more_pairs, half), min(values + more_values, heads.width), mlp_width(block))
            if block_numbers(block, heads, bigger) <= allowed:
                return bigger
        channels = fitting_channels(block, allowed - attention_numbers(block, heads, pairs, values))
        if channels < 1:
            raise UsageError(
                f"modegpt: {keep:.3g} of a block's {before:,} numbers leave no channel to its MLP; raise --keep, "
                "or the temperature, which spreads the cuts over the blocks"
            )
        return Size(pairs, values, channels)

    def cut_attention(self, block: nn.Module, heads: Heads, stats: Stats, size: Size) -> None:
        """CR and SVD, in place."""
        if self.rule == "magnitude":
            moments = torch.eye(len(stats.get(Stat.GRAM)) + 1, dtype=torch.float64, device=stats.get(Stat.GRAM).device)
            choose = largest_values
        else:
            moments = with_bias_input(stats.get(Stat.GRAM), stats.get(Stat.MEAN))
            choose = partial(value_output, moments=root_of(moments))
        cut_queries_keys(block, heads, moments, size.pairs)
        cut_values_outputs(block, heads, choose, size.values)

    def cut_mlp(self, block: nn.Module, moments: Tensor, channels: int) -> None:
        """Nystrom, in place."""
        if channels == len(moments):
            return
        old = wide_weight(block, DOWN)
        if self.rule == "magnitude":
            score = channel_sizes(wide_weight(block, GATE), wide_weight(block, UP), old)
        else:
            score = leverage(moments, self.ridge)
        kept = score.argsort(descending=True, stable=True)[:channels].sort().values
        down = old[:, kept] if self.rule == "magnitude" else nystrom_down(old, moments, kept)
        mask = torch.zeros(len(moments), dtype=torch.bool, device=kept.device)
        mask[kept] = True
        for path in READS_MLP:
            keep_rows(block, path, mask)
        put(block, DOWN, down, wide_bias(block, DOWN), None, mask)


def layers_of(block: nn.Module) -> list[nn.Linear]:
    """All linear layers of a block."""
    return [linear(block, path) for path in (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)]


def bias_numbers(module: nn.Linear) -> int:
    """0 where there is none."""
    bias: Tensor | None = module.bias
    return 0 if bias is None else bias.numel()


def mask_numbers(places: int) -> int:
    """Bytes of a mask of so many bits."""
    return (places + 7) // 8


def attention_numbers(block: nn.Module, heads: Heads, pairs: int, values: int) -> int:
    """Stored numbers of q, k, v and o, masks and biases included."""
    total = 0
    rows_of = {QUERY: heads.query * 2 * pairs, KEY: heads.key * 2 * pairs, VALUE: heads.key * values}
    for path, rows in rows_of.items():
        module = linear(block, path)
        total += rows * module.in_features + (0 if module.bias is None else rows)
        total += mask_numbers(module.out_features) if rows < module.out_features else 0
    out = linear(block, OUT)
    total += out.out_features * heads.query * values + bias_numbers(out)
    return total + (mask_numbers(out.in_features) if values < heads.width else 0)


def mlp_width(block: nn.Module) -> int:
    """F."""
    return linear(block, GATE).out_features


def mlp_numbers(block: nn.Module, channels: int) -> int:
    """Stored numbers of gate, up and down, masks and biases included."""
    gate, up, down = (linear(block, path) for path in (GATE, UP, DOWN))
    channel = gate.in_features + up.in_features + down.out_features
    channel += sum(module.bias is not None for module in (gate, up))
    masks = 3 * mask_numbers(mlp_width(block)) if channels < mlp_width(block) else 0
    return channels * channel + masks + bias_numbers(down)


def fitting_channels(block: nn.Module, allowed: int) -> int:
    """The most channels within so many numbers, 0 where there is no room for one."""
    width = mlp_width(block)
    if mlp_numbers(block, width) <= allowed:
        return width
    one, two = mlp_numbers(block, 1), mlp_numbers(block, 2)
    return max(0, min(width - 1, (allowed - one) // (two - one) + 1))


def block_numbers(block: nn.Module, heads: Heads, size: Size) -> int:
    """Stored numbers of all its layers."""
    return attention_numbers(block, heads, size.pairs, size.values) + mlp_numbers(block, size.channels)


def put(
    block: nn.Module, path: str, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> None:
    """A narrow layer in the place of a dense one; a side without a mask stays whole."""
    old = linear(block, path)
    like = old.weight
    rows = torch.ones(old.out_features, dtype=torch.bool, device=like.device) if rows is None else rows
    columns = torch.ones(old.in_features, dtype=torch.bool, device=like.device) if columns is None else columns
    made = NarrowLinear.of(weight.to(like), None if bias is None else bias.to(like), rows, columns)
    block.set_submodule(path, made.requires_grad_(False))


def keep_rows(block: nn.Module, path: str, mask: Tensor) -> None:
    """The rows of a layer that `mask` (O,) marks, as they are."""
    bias = wide_bias(block, path)
    put(block, path, wide_weight(block, path)[mask], None if bias is None else bias[mask], mask, None)


def with_bias(block: nn.Module, path: str) -> Tensor:
    """[W b] (O, I + 1)."""
    weight, bias = wide_weight(block, path), wide_bias(block, path)
    return torch.cat([weight, weight.new_zeros(len(weight), 1) if bias is None else bias[:, None]], 1)


def cut_queries_keys(block: nn.Module, heads: Heads, moments: Tensor, pairs: int) -> None:
    """CR, in place: queries keep the pairs of the key head that they look at."""
    if 2 * pairs == heads.width:
        return
    sizes = [row_sizes(with_bias(block, path), moments) for path in (QUERY, KEY)]
    keys = best_pairs(pair_scores(sizes[0], sizes[1], heads.width), pairs)
    queries = keys.repeat_interleave(heads.query // heads.key, 0)
    keep_rows(block, QUERY, queries.flatten())
    keep_rows(block, KEY, keys.flatten())


Choose = Callable[[Tensor, Tensor, int], Factors]
"""From a head's values (hd, I + 1), what reads them (N, hd) and a rank: what takes their place (linalg/modular.py)."""


def cut_values_outputs(block: nn.Module, heads: Heads, choose: Choose, rank: int) -> None:
    """Each value head with all its readers, in place; of a head the first `rank` places stay."""
    if rank == heads.width:
        return
    group, width = heads.query // heads.key, heads.width
    values = with_bias(block, VALUE).split(width)  # (hd, I + 1) for each value head
    outputs = wide_weight(block, OUT).split(group * width, dim=1)  # (D, group hd)
    new_values, new_outputs = [], []
    for value, output in zip(values, outputs, strict=True):
        readers = output.split(width, dim=1)  # (D, hd) for each query head
        left, right = choose(value, torch.cat(readers), rank)
        new_values.append(right)
        new_outputs += [reader @ left for reader in readers]
    value, has_bias = torch.cat(new_values), linear(block, VALUE).bias is not None
    stays = torch.arange(width, device=value.device) < rank
    put(block, VALUE, value[:, :-1], value[:, -1] if has_bias else None, stays.repeat(heads.key), None)
    put(block, OUT, torch.cat(new_outputs, 1), wide_bias(block, OUT), None, stays.repeat(heads.query))
