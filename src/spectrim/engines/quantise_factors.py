"""Low-rank layers in few bits: after encoding and recovery, each `factor` or `pivot` layer becomes a quantised one.

What a layer's parts become is worked out in linalg/quantised_factors.py; here is the walk. Layers that stayed dense
become `packed` ones of the same bits, by the column solver (gptq).

quantise_factors   from statistics that are given, of all layers or of some, with bits for each if wanted
quantise_behind    block by block: a block is calibrated behind the quantised blocks before it
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.blockwise import block_by_block
from spectrim.engines.measure import Progress
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.columns import gptq
from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import shrink
from spectrim.linalg.quantise import Rounded, dequantise
from spectrim.linalg.quantised_factors import round_factors, round_pivots
from spectrim.linalg.solver import LinAlgError
from spectrim.memory import Batch
from spectrim.method import Method
from spectrim.models.walk import Walk, weight_of
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.stores_uniform import UniformStore
from spectrim.options import FACTOR_GROUP_SIZE, check_factor_bits, check_factors
from spectrim.stats import Stat, Stats

WINDOWS = 4
"""Calibration windows at a time."""
OUTPUT_SHRINKAGE = 0.2
"""Of the gradient covariance, as in methods/weights/two_sided.py."""


def quantise_factors(
    model: PreTrainedModel,
    walk: Walk,
    stats: Mapping[str, Stats],
    bits: int | Mapping[str, int],
    *,
    group_size: int = FACTOR_GROUP_SIZE,
    symmetric: bool = False,
) -> None:
    """Quantise the layers of `model` that `stats` holds, in place.

    GRAM is that of their inputs as they are to be seen; OUTPUT_GRAD, where it is there, weighs their outputs. `bits`
    may be given for each layer by name; a layer that is not in it stays as it is. Deterministic. NumericalError names
    a layer that cannot be quantised.
    """
    for layer in walk.layers:
        wide = bits if isinstance(bits, int) else bits.get(layer.name)
        if layer.name not in stats or wide is None:
            continue
        module, given = model.get_submodule(layer.name), stats[layer.name]
        if not given.is_finite():
            raise NumericalError(f"{layer.name}: its statistics hold NaN or Inf; measure again on other text")
        require_finite(layer.name, module)
        try:
            made = quantise_layer(
                module, given.get(Stat.GRAM), wide, group_size, outputs=_output_metric(given), symmetric=symmetric
            )
        except LinAlgError as error:
            raise NumericalError(f"{layer.name}: {error}; use more calibration text") from error
        require_finite(layer.name, made)
        model.set_submodule(layer.name, made.train(module.training))


def quantise_behind(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    bits: int | Mapping[str, int],
    *,
    group_size: int = FACTOR_GROUP_SIZE,
    symmetric: bool = False,
    progress: Progress | None = None,
) -> None:
    """Quantise all layers of `model` in place, a block on what the quantised blocks before it make of `ids`.

    When it fails, the model has the layers that it had before.
    """
    before = {layer.name: model.get_submodule(layer.name) for layer in walk.layers}

    def restore() -> None:
        for name, module in before.items():
            model.set_submodule(name, module)

    def place(stats: Mapping[str, Stats]) -> None:
        quantise_factors(model, walk, stats, bits, group_size=group_size, symmetric=symmetric)

    def once(size: int) -> None:
        restore()  # a batch that was too large may have left a part of them quantised
        block_by_block(model, walk, ids, frozenset({Stat.GRAM}), place, batch_size=size, progress=progress)

    try:
        Batch(WINDOWS).run("quantise", once)
    except BaseException:
        restore()
        raise


def quantise_layer(
    module: nn.Module,
    gram: Tensor,
    bits: int,
    group_size: int,
    *,
    outputs: Tensor | None = None,
    symmetric: bool = False,
) -> StoredLinear:
    """One layer in codes; `gram` (I, I) is the second moment of its inputs, `outputs` (O, O) weighs its outputs.

    Any other layer than a low-rank one becomes its own weight in codes.
    """
    bias = cast("Tensor | None", module.bias)
    dtype = next(module.parameters()).dtype

    def keep(matrix: Tensor, moment: Tensor) -> tuple[Rounded, Tensor]:
        size = group_of(matrix.shape[1], group_size)
        rounded = gptq(matrix, moment, bits, size, symmetric=symmetric, search=True)
        return rounded, dequantise(rounded, bits, torch.float64)

    def stored(rounded: Rounded) -> UniformStore:
        size = group_of(rounded.codes.shape[1], group_size)
        return UniformStore.holding(rounded, bits=bits, group_size=size, dtype=dtype)

    gram = gram.double()
    if isinstance(module, LowRankLinear):
        factors = Factors(module.U.weight.detach().double(), module.V.weight.detach().double())
        left, right = round_factors(factors, gram, keep, joined, outputs=outputs)
        return QuantisedFactorLinear.holding(stored(right), stored(left), bias, dtype=dtype)
    if isinstance(module, PivotLinear):
        order = module.order.argsort()  # pivots first
        placed = None if outputs is None else outputs[order][:, order]
        parts = module.pivot.weight.detach().double(), module.rest.weight.detach().double()
        rows, rest = round_pivots(*parts, gram, keep, joined, outputs=placed)
        return QuantisedPivotLinear.holding(stored(rows), stored(rest), module.mask, bias, dtype=dtype)
    return PackedLinear.holding(stored(keep(weight_of(module).detach().double(), gram)[0]), None, bias, dtype=dtype)


def joined(blocks: list[Rounded]) -> Rounded:
    """Blocks of rows as one matrix in codes."""
    zeros = [block.zeros for block in blocks if block.zeros is not None]
    return Rounded(
        torch.cat([block.codes for block in blocks]),
        torch.cat([block.scales for block in blocks]),
        torch.cat(zeros) if zeros else None,
    )


def group_of(inputs: int, group_size: int) -> int:
    """Neighbouring inputs of a part that share a grid.

    `group_size` where it divides the inputs, as it does those of the layers. A part that reads the rank dimension has
    any number of inputs: the largest divisor of at least a quarter of `group_size`, else 0, whole rows.
    """
    least = max(1, group_size // 4)
    return next((size for size in range(group_size, least - 1, -1) if size and inputs % size == 0), 0)


def _output_metric(stats: Stats) -> Tensor | None:
    measured = stats.output_grad
    return None if measured is None else shrink(measured.double(), OUTPUT_SHRINKAGE)


def require_finite(name: str, layer: nn.Module) -> None:
    """NumericalError unless all numbers of a layer, scales among them, are finite."""
    for key, tensor in layer.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(
                f"{name}: its {key} hold NaN or Inf, so it cannot be quantised; nothing is written. Leave out the "
                "recovery steps before it, or use more calibration text"
            )


def check_groups(walk: Walk, bits: int | None, group_size: int) -> None:
    """Refuse a group size that does not divide the inputs of a layer."""
    for layer in walk.layers if bits is not None else ():
        check_group_size("factor_group_size", layer.name, layer.inputs, group_size)


def check_asked(method: Method, walk: Walk, bits: int | None, group_size: int) -> None:
    """Refuse, before anything is measured, what no step of this kind can do."""
    check_factor_bits(bits, group_size)
    check_factors(method, bits)
    check_groups(walk, bits, group_size)


def check_group_size(what: str, layer: str, inputs: int, group_size: int) -> None:
    """A group size that divides the inputs of a layer; UsageError with those that do."""
    if group_size and inputs % group_size:
        fits = [2**k for k in range(2, 11) if inputs % 2**k == 0]
        raise UsageError(
            f"{what} {group_size} does not divide the {inputs} inputs of {layer}; "
            f"{', '.join(map(str, fits)) or 'no power of two from 4 on'} would, and 0 is one group a row"
        )
