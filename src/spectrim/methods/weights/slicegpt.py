"""SliceGPT: a narrower residual stream (Ashkboos et al., ICLR 2024, arXiv 2401.15024).

    1. fold the gains of every RMSNorm into the layers that read it: norm and rotation then commute
    2. G = E[x x^T] of the normalised stream, averaged over all norms of the model
    3. Q (D, K) = the K first principal directions of G, one rotation for the whole model
    4. embedding E Q, readers (W diag(g)) Q, writers Q^T W, head (E_out diag(g)) Q

The result is a model of the same architecture with hidden_size K that loads without spectrim.

The paper gives every norm a rotation of its own, which puts a K x K matrix Q_l^T Q_l+1 on every skip connection. At
equal stored numbers, these matrices counted, one shared rotation is better at light cuts and worse at strong ones
(docs/slicegpt.md), and its result is a plain model. The paper's head reads the full width; a plain model's reads K.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from spectrim.engines.learned import skeleton
from spectrim.engines.residual import normalised_gram
from spectrim.errors import UsageError
from spectrim.linalg.slicing import (
    NarrowNorm,
    largest_axes,
    narrow_norm,
    principal_basis,
    random_basis,
    turn_reader,
    turn_writer,
)
from spectrim.method import MethodInfo, require_choice, require_range
from spectrim.model_method import Job, ModelMethod
from spectrim.models.llama_like import (
    LLAMA_LIKE,
    NORMS,
    READS_ATTENTION,
    READS_MLP,
    WRITES,
    gains,
    heads_of,
    linear,
    norm_parameters,
    plain,
    require_llama_like,
    wide_bias,
    wide_weight,
)
from spectrim.models.walk import Walk

Basis = Literal["pca", "variance", "random"]


@dataclass(frozen=True, kw_only=True)
class SliceGPT(ModelMethod):
    """The hidden size is cut along principal directions; the result is a plain narrower model."""

    info: ClassVar = MethodInfo(
        name="slicegpt",
        family="weights",
        paper="arXiv 2401.15024",
        promise="a narrower plain model: the residual stream turned to its principal directions and cut",
    )
    codecs: ClassVar = ()

    basis: Basis = "pca"
    """variance: the coordinates of most variance, not turned; random: random directions. To compare with."""
    multiple: int = 1
    """The new hidden size is a multiple of this, and of the number of heads, which the architectures demand."""

    def __post_init__(self) -> None:
        require_choice("slicegpt", "basis", self.basis, ("pca", "variance", "random"))
        require_range("slicegpt", "multiple", self.multiple, 1, 65_536)

    def check_model(self, config: PretrainedConfig, walk: Walk, keep: float) -> None:
        """Architectures whose stream is read through RMSNorm and whose head width is a setting of its own."""
        why = "its stream is not read through RMSNorms alone, or its head width follows from the hidden size"
        require_llama_like("slicegpt", config, walk, LLAMA_LIKE, why)
        self.width(config, walk, int(keep * walk.numbers + 1e-9))

    def width(self, config: PretrainedConfig, walk: Walk, budget: int) -> int:
        """The largest hidden size within the budget."""
        before, step = hidden_size(config), math.lcm(heads_of(config).query, self.multiple)
        fits = [k for k in range(step, before + 1, step) if sliced_numbers(walk, before, k) <= budget]
        if not fits:
            raise UsageError(
                f"slicegpt: hidden size {before} can be cut to multiples of {step} (heads and `multiple`); the "
                f"smallest stores {sliced_numbers(walk, before, step):,} numbers in the decoder's layers, "
                f"{budget:,} are allowed; raise --keep"
            )
        return fits[-1]

    def compress(self, job: Job) -> PreTrainedModel:
        """Steps 1 to 4."""
        width = self.width(job.dense.config, job.walk, job.budget)
        norms = [f"{block}.{norm}" for block in job.walk.block_names for norm in NORMS] + ["model.norm"]
        with job.timed("calibrate"):
            gram = normalised_gram(job.dense, norms, job.calibration, progress=job.progress)
        with job.timed("decompose"):
            model = sliced(job.dense, job.walk, self.directions(gram, width, job.seed))
        if job.dense.config.tie_word_embeddings:
            job.warnings.append(untied(job.dense, model))
        return model

    def directions(self, gram: Tensor, width: int, seed: int) -> Tensor:
        """Step 3: (D, K)."""
        if self.basis == "pca":
            return principal_basis(gram, width)
        return largest_axes(gram, width) if self.basis == "variance" else random_basis(gram, width, seed)


def hidden_size(config: PretrainedConfig) -> int:
    """D."""
    return cast(Any, config).hidden_size


def sliced_numbers(walk: Walk, before: int, width: int) -> int:
    """Stored numbers of the decoder's layers: one side of each weight, and the biases of writers, shrink."""
    total = 0
    for layer in walk.layers:
        writes = layer.name.endswith(WRITES)
        total += layer.weight_numbers // before * width
        total += (width if writes else layer.outputs) if layer.has_bias else 0
    return total


@torch.no_grad()
def sliced(dense: PreTrainedModel, walk: Walk, basis: Tensor) -> PreTrainedModel:
    """The model with its stream turned into `basis` (D, K)."""
    model = skeleton(dense)
    heads, before, width = heads_of(dense.config), *basis.shape
    for name in walk.block_names:
        slice_block(model.get_submodule(name), basis)
    inner, head = cast(Any, model.model), cast(nn.Linear, model.get_output_embeddings())
    gain, eps = norm_parameters(inner.norm)
    model.set_output_embeddings(plain(turn_reader(head.weight.double(), gain, basis), None, head.weight))
    narrow = narrow_norm(eps, before, width)
    set_norm(inner.norm, narrow, width)
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    table = (embedding.weight.double() @ basis).to(embedding.weight)
    small = nn.Embedding(*table.shape, padding_idx=embedding.padding_idx, device="meta")
    small.weight = nn.Parameter(table, requires_grad=False)
    model.set_input_embeddings(small)
    config = cast(Any, model.config)
    config.head_dim, config.hidden_size = heads.width, width
    config.rms_norm_eps, config.tie_word_embeddings = narrow.eps, False
    return model


def slice_block(block: nn.Module, basis: Tensor) -> None:
    """Steps 1 and 4 in one block, in place."""
    before, width = basis.shape
    for norm_name, readers in zip(NORMS, (READS_ATTENTION, READS_MLP), strict=True):
        norm = block.get_submodule(norm_name)
        gain, eps = norm_parameters(norm)
        for path in readers:
            turned = turn_reader(wide_weight(block, path), gain, basis)
            block.set_submodule(path, plain(turned, wide_bias(block, path), linear(block, path).weight))
        set_norm(norm, narrow_norm(eps, before, width), width)
    for path in WRITES:
        bias = wide_bias(block, path)
        turned = turn_writer(wide_weight(block, path), basis)
        turned_bias = None if bias is None else turn_writer(bias, basis)
        block.set_submodule(path, plain(turned, turned_bias, linear(block, path).weight))


def set_norm(norm: nn.Module, narrow: NarrowNorm, width: int) -> None:
    """Constants of a norm over `width` numbers, in place."""
    like = norm.weight
    assert isinstance(like, Tensor)
    norm.weight = gains(narrow.gain, width, like)
    norm.variance_epsilon = narrow.eps  # pyright: ignore[reportArgumentType]  a plain float on the module


def untied(dense: PreTrainedModel, model: PreTrainedModel) -> str:
    """What the head costs once it is a matrix of its own."""
    before = cast(nn.Embedding, dense.get_input_embeddings()).weight.numel()
    after = 2 * cast(nn.Embedding, model.get_input_embeddings()).weight.numel()
    return (
        f"slicegpt: embedding and head shared one matrix of {before:,} numbers; the head now holds the last norm's "
        f"gains and is a matrix of its own: {after:,} numbers in both, which `keep` does not count"
    )
