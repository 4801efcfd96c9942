"""What methods that keep weights in few bits have in common: a budget in bytes, layers of a base and a correction.

A method states the base of a layer (rounded, pruned, both) and what it takes; the rest, what `keep` allows and what is
refused, is here. `keep` is the share of the bytes of all decoder linears in 16 bits: numbers count two bytes, bytes
one, with scales, zeros, indices, corrections and biases (linalg/bits.py).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from spectrim.engines.blockwise import block_by_block
from spectrim.engines.learned import skeleton
from spectrim.engines.quantise_factors import check_group_size
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.bits import VALUE_BYTES, Account, Unit, bias_account, budget_in, correction_account
from spectrim.linalg.factor import Factors
from spectrim.linalg.quantise import BITS
from spectrim.linalg.solver import SolverError
from spectrim.model_method import EACH_PASS, Job, ModelMethod, Piece
from spectrim.models.walk import Layer, Walk, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores import Store
from spectrim.stats import Stats

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BytesMethod(ModelMethod):
    """A method whose layers are `packed` and whose budget is in bytes."""

    codecs: ClassVar[tuple[str, ...]] = ("packed",)
    budget_unit: ClassVar[Unit] = "bytes"

    @abstractmethod
    def account(self, layer: Layer) -> Account:
        """The least that a layer takes, its bias apart; UsageError where the layer does not fit the method."""

    def check_model(self, config: "PretrainedConfig", walk: Walk, keep: float) -> None:
        """Refuse layers that do not fit, and a `keep` that even the bases alone do not meet."""
        self.bytes_left(walk, budget_in(self.budget_unit, walk.numbers, keep), keep)

    def bases(self, walk: Walk) -> Account:
        """What bases and biases of all layers take."""
        return sum((self.account(la) + bias_account(la.outputs, bias=la.has_bias) for la in walk.layers), Account())

    def bytes_left(self, walk: Walk, budget: int, keep: float) -> int:
        """What bases and biases leave of the budget; UsageError when it is nothing."""
        bases = self.bases(walk)
        if bases.total > budget:
            dense = walk.numbers * VALUE_BYTES
            share = bases.total / dense
            way = f"Pass --keep {_rounded_up(share)} or more, or" if share < 1 else "No --keep is enough: pass"
            settings = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
            raise UsageError(
                f"method {self.info.name} with {settings} stores {bases.total:,} bytes in the decoder's linear layers, "
                f"{share:.4f} of what they take in 16 bits; keep {keep:g} allows {budget:,}. {way} "
                "settings that take less"
            )
        return budget - bases.total

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The options that decide the size of the base, for messages."""
        return {}


@dataclass(frozen=True, kw_only=True)
class PackedMethod(BytesMethod):
    """A method that makes a base in few bits, and perhaps a low-rank correction of what the base misses."""

    sequential: bool = False
    """Whether a block is calibrated behind the compressed blocks before it (engines/blockwise.py)."""

    @abstractmethod
    def store_of(self, weight: Tensor, stats: Stats, dtype: torch.dtype) -> Store:
        """The base of a weight (O, I), given in float64; its numbers in `dtype`."""

    def ranks(self, layers: Sequence[Layer], left: int) -> list[int]:
        """Rank of the correction of each layer, from the bytes that bases and biases leave."""
        return [0] * len(layers)

    def correction(self, missing: Tensor, stats: Stats, rank: int) -> Factors | None:
        """A low-rank stand-in for what the base misses of the weight (O, I)."""
        return None

    @property
    def reads_dense_stats(self) -> bool:
        """Not where statistics are measured behind compressed blocks."""
        return bool(self.needs) and not self.sequential

    def least(self, walk: Walk) -> int:
        """Bases and biases."""
        return self.bases(walk).total

    def stored(self, walk: Walk, budget: int) -> int:
        """Bases, biases and corrections."""
        bases = self.bases(walk).total
        ranks = self.ranks(walk.layers, budget - bases)
        pairs = zip(walk.layers, ranks, strict=True)
        return bases + sum(correction_account(layer.outputs, layer.inputs, rank).total for layer, rank in pairs)

    def rehearsal(self, layer: Layer, weight: Tensor, stats: Stats, keep: float) -> Sequence[Piece]:
        """The base, the correction where a layer's share of the bytes leaves one, and unpacking."""
        base = self.store_of(weight, stats, torch.bfloat16)
        pieces = [
            Piece("compress", lambda: self.store_of(weight, stats, torch.bfloat16)),
            Piece(EACH_PASS, lambda: base.matrix(torch.float32), numbers=layer.weight_numbers),
        ]
        left = int(keep * VALUE_BYTES * layer.weight_numbers) - self.account(layer).total
        rank = self.ranks([layer], left)[0] if left > 0 else 0
        if rank:
            missing = weight - base.matrix(torch.float64).detach()
            pieces.append(Piece("compress", lambda: self.correction(missing, stats, rank)))
        return pieces

    def compress(self, job: Job) -> "PreTrainedModel":
        """Layer by layer, or block by block with what the blocks before now make."""
        layers = {layer.name: layer for layer in job.walk.layers}
        left = self.bytes_left(job.walk, job.budget, job.keep)
        ranks = dict(zip(layers, self.ranks(job.walk.layers, left), strict=True))
        model = skeleton(job.dense)

        def place(stats: Mapping[str, Stats]) -> None:
            for name, measured in stats.items():
                module = job.dense.get_submodule(name)
                model.set_submodule(name, self._packed(module, layers[name], measured, ranks[name]))

        if self.sequential and self.needs:
            block_by_block(model, job.walk, job.calibration, self.needs, place, progress=job.progress)
            return model
        for done, name in enumerate(layers):
            place({name: job.stats.get(name, Stats(tokens=0))})
            if job.progress is not None:
                job.progress("pack", done + 1, len(layers))
        return model

    def _packed(self, module: nn.Module, layer: Layer, measured: Stats, rank: int) -> PackedLinear:
        def parts(weight: Tensor, dtype: torch.dtype) -> Parts:
            base = self.store_of(weight, measured, dtype)
            if not rank:
                return base, None
            return base, self.correction(weight - base.matrix(torch.float64).detach(), measured, rank)

        return packed_layer(layer.name, module, measured, parts)


Parts = tuple[Store, Factors | None]
"""A base and its correction."""


def packed_layer(
    name: str, module: nn.Module, measured: Stats, parts: Callable[[Tensor, torch.dtype], Parts]
) -> PackedLinear:
    """A linear layer from the `parts` made of its weight (O, I), float64; NumericalError names the layer."""
    weight = weight_of(module).detach()
    if not measured.is_finite():
        raise NumericalError(f"{name}: its statistics hold NaN or Inf; measure again on other text")
    try:
        base, factors = parts(weight.double(), weight.dtype)
    except SolverError as error:
        raise NumericalError(f"{name}: {error}; use more calibration text") from error
    bias = cast("Tensor | None", module.bias)
    return PackedLinear.holding(base, factors, bias, dtype=weight.dtype)


def check_bits(method: str, bits: int, allowed: Sequence[int] = BITS, *, name: str = "bits") -> None:
    """Refuse a width that is not offered."""
    if bits not in allowed:
        raise UsageError(f"method {method}: {name} must be one of {', '.join(map(str, allowed))}, got {bits}")


def check_group(method: str, layer: Layer, group_size: int, inputs: int) -> None:
    """Refuse a group size that does not divide the inputs of a layer, with those that do."""
    check_group_size(f"method {method}: group_size", layer.name, inputs, group_size)


def _rounded_up(share: float) -> str:
    return f"{int(share * 10_000 + 1) / 10_000:g}"
