"""A layer put into a form of engines/forms.py."""

import torch
from torch import Tensor, nn

from spectrim.engines.forms import Code, Form
from spectrim.engines.layerwise import build_linear
from spectrim.engines.quantise_factors import joined
from spectrim.linalg.columns import gptq, inverse_root
from spectrim.linalg.factor import Factors
from spectrim.linalg.outliers import Entries, largest
from spectrim.linalg.pivot import Pivots, pack_mask, to_pivots
from spectrim.linalg.predicted import Measured, entry_scores, in_parts, split
from spectrim.linalg.quantise import Rounded, dequantise, round_to_nearest
from spectrim.linalg.quantised_factors import BLOCKS, round_factors, round_pivots
from spectrim.linalg.trellis import WINDOW, code_table
from spectrim.linalg.trellis_columns import (
    BLOCK,
    STRIP,
    Coded,
    decode_weight,
    steps_of,
    strips_of,
    trellis_columns,
    trellis_with_entries,
)
from spectrim.model_method import EACH_PASS, Piece
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.stores import Store
from spectrim.nn.stores_corrected import CorrectedStore
from spectrim.nn.stores_outliers import OutlierStore
from spectrim.nn.stores_trellis import TrellisStore
from spectrim.nn.stores_uniform import UniformStore
from spectrim.replacement import encode

Kept = Rounded | Coded


def put_in_form(form: Form, measured: Measured, bias: Tensor | None, dtype: torch.dtype, damping: float) -> nn.Module:
    """The layer that holds `measured.weight` in a form other than dense; its numbers in `dtype`.

    SolverError where a moment cannot be factored.
    """
    if form.kind == "factor":
        return _as_factors(form, measured, bias, dtype, damping)
    if form.kind == "pivot":
        return _as_pivots(form, measured, bias, dtype, damping)
    if form.kind == "correction":
        store = _with_correction(form, measured, dtype, damping)
    elif form.kind == "entries":
        store = _with_entries(form, measured, dtype, damping)
    else:
        store = code_store(form.code, measured, dtype, damping)
    return PackedLinear.holding(store, None, bias, dtype=dtype)


def code_store(code: Code, measured: Measured, dtype: torch.dtype, damping: float) -> Store:
    """Codes of the whole weight."""
    if code.rate is None:
        rounded = gptq(measured.weight, measured.gram, 8, 0, symmetric=True, damping=damping)
        return UniformStore.holding(rounded, bits=8, group_size=0, dtype=dtype)
    importance = measured.outputs.diagonal()
    coded = trellis_columns(measured.weight, measured.upper, code.rate, importance=importance)
    return TrellisStore.holding(coded, measured.weight.shape[1], code.rate, dtype=dtype)


def code_pieces(code: Code, share: float, measured: Measured, damping: float) -> list[Piece]:
    """What coding a `share` of all weights takes, to be clocked.

    Trellis codes by a few columns, since all take as long. On a CPU of a few rows too; those of a GPU are worked on
    together, so that fewer do not take less.
    """
    outputs, inputs = measured.weight.shape
    if code.rate is None:
        if code.error == 0:
            return []
        store = code_store(code, measured, torch.bfloat16, damping)
        return [
            Piece("compress", lambda: code_store(code, measured, torch.bfloat16, damping), share=share),
            Piece(EACH_PASS, lambda: store.matrix(torch.float32), numbers=outputs * inputs, share=share),
        ]
    rows = outputs if measured.weight.is_cuda else min(outputs, STRIP * max(1, MOST_STATES >> code.rate.window))
    few, rate = min(inputs, 2 * BLOCK), code.rate
    weight, upper = measured.weight[:rows, :few].contiguous(), measured.upper[:few, :few].contiguous()
    codes = torch.zeros(strips_of(outputs), steps_of(inputs, rate), dtype=torch.uint8, device=weight.device)
    scales = torch.ones(outputs, device=weight.device)
    store = TrellisStore.holding(Coded(codes, scales), inputs, rate, dtype=torch.bfloat16)
    return [
        Piece("compress", lambda: trellis_columns(weight, upper, rate), numbers=rows * few, share=share),
        Piece(EACH_PASS, lambda: store.matrix(torch.float32), numbers=outputs * inputs, share=share),
    ]


MOST_STATES = 1 << 17
"""Of all streams together, where a CPU is clocked."""


def _with_entries(form: Form, measured: Measured, dtype: torch.dtype, damping: float) -> Store:
    weight, code = measured.weight, form.code
    window = WINDOW if code.rate is None else code.rate.window
    kept = largest(entry_scores(measured, window), form.entries)
    if code.rate is None:
        store = code_store(code, measured._replace(weight=torch.where(kept, 0, weight)), dtype, damping)
        positions = kept.flatten().nonzero().squeeze(-1)
        return OutlierStore.holding(store, Entries(positions, weight.flatten()[positions]), dtype=dtype)
    coded, entries = trellis_with_entries(
        weight, measured.upper, code.rate, kept, importance=measured.outputs.diagonal()
    )
    return OutlierStore.holding(
        TrellisStore.holding(coded, weight.shape[1], code.rate, dtype=dtype), entries, dtype=dtype
    )


def _with_correction(form: Form, measured: Measured, dtype: torch.dtype, damping: float) -> Store:
    """The correction first, as it is stored; codes hold what is left."""
    left, right = split(measured, form.rank)
    sides = [_side(part, form.side_bits, dtype) for part in (left.mT, right)]
    stored = [side.matrix(torch.float64).detach() for side in sides]
    rest = measured._replace(weight=measured.weight - stored[0].mT @ stored[1])
    return CorrectedStore(code_store(form.code, rest, dtype, damping), *sides)


def _side(rows: Tensor, bits: int, dtype: torch.dtype) -> Store:
    """A row for each component."""
    rounded = round_to_nearest(rows, bits, 0, symmetric=True, search=True)
    return UniformStore.holding(rounded, bits=bits, group_size=0, dtype=dtype)


def _as_factors(form: Form, measured: Measured, bias: Tensor | None, dtype: torch.dtype, damping: float) -> nn.Module:
    factors = in_parts(measured).factors(form.rank)
    if form.code.error == 0:
        return _plain(factors, "factor", measured.weight, bias, dtype)
    coder = _Coder(form.code, damping)
    left, right = round_factors(
        factors, measured.gram, coder.rounding, coder.together, outputs=measured.outputs, rows_at_once=_rows(form.rank)
    )
    stores = coder.store(right, measured.weight.shape[1], dtype), coder.store(left, form.rank, dtype)
    return QuantisedFactorLinear.holding(*stores, bias, dtype=dtype)


def _as_pivots(form: Form, measured: Measured, bias: Tensor | None, dtype: torch.dtype, damping: float) -> nn.Module:
    factors = in_parts(measured).factors(form.rank)
    if form.code.error == 0:
        return _plain(factors, "pivot", measured.weight, bias, dtype)
    pivots: Pivots = to_pivots(factors)
    order = torch.cat([pivots.mask.nonzero().flatten(), (~pivots.mask).nonzero().flatten()])
    coder = _Coder(form.code, damping)
    rows, rest = round_pivots(
        pivots.rows, pivots.coefficients, measured.gram, coder.rounding, coder.together,
        outputs=measured.outputs[order][:, order], rows_at_once=_rows(form.rank),
    )  # fmt: skip
    stores = coder.store(rows, measured.weight.shape[1], dtype), coder.store(rest, form.rank, dtype)
    return QuantisedPivotLinear.holding(*stores, pack_mask(pivots.mask), bias, dtype=dtype)


def _plain(factors: Factors, codec: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Module:
    return build_linear(encode(factors, codec, like=weight.to(dtype), bias=bias))


def _rows(rank: int) -> int:
    """Rows of a part that are rounded together: whole strips, so that the blocks' strips make up the whole."""
    return STRIP * max(1, -(-rank // (STRIP * BLOCKS)))


class _Coder:
    """How both parts of a low-rank weight are rounded, for linalg/quantised_factors.py."""

    def __init__(self, code: Code, damping: float) -> None:
        self.code, self.damping = code, damping

    def rounding(self, matrix: Tensor, moment: Tensor) -> tuple[Kept, Tensor]:
        """Codes of a matrix (m, n) that reads inputs of this second moment, and what they stand for."""
        rate = self.code.rate
        if rate is None:
            rounded = gptq(matrix, moment, 8, 0, symmetric=True, damping=self.damping)
            return rounded, dequantise(rounded, 8, torch.float64)
        coded = trellis_columns(matrix, inverse_root(moment, damping=self.damping), rate)
        table = code_table(rate, matrix.device, torch.float64)
        return coded, decode_weight(coded, rate, matrix.shape[1], table)

    def together(self, blocks: list[Kept]) -> Kept:
        """Blocks of rows as one."""
        if self.code.rate is None:
            return joined([block for block in blocks if isinstance(block, Rounded)])
        return Coded(torch.cat([block.codes for block in blocks]), torch.cat([block.scales for block in blocks]))

    def store(self, kept: Kept, inputs: int, dtype: torch.dtype) -> Store:
        """As it is stored."""
        if isinstance(kept, Rounded):
            return UniformStore.holding(kept, bits=8, group_size=0, dtype=dtype)
        assert self.code.rate is not None
        return TrellisStore.holding(kept, inputs, self.code.rate, dtype=dtype)
