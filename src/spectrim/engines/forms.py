"""What a layer may become under one budget of bytes, what each form takes, and what it is predicted to lose.

    dense           as it is
    codes           trellis codes of 1 to 6 bits, or 8 bits                              linalg/trellis.py
    entries         codes, and a few entries beside them in 16 bits                      linalg/outliers.py
    correction      codes, and a low-rank part of the weight beside them in 4 or 8 bits  nn/stores_corrected.py
    factor, pivot   a low-rank weight, its two parts in codes or in 16 bits              linalg/quantised_factors.py

Losses are those of linalg/predicted.py, so nothing is coded to find out. Ranks are multiples of a strip of 16 rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from spectrim.linalg.allocate import Options
from spectrim.linalg.bits import VALUE_BYTES, Account, outliers_account, uniform_account
from spectrim.linalg.pivot import to_pivots
from spectrim.linalg.predicted import (
    InCodes,
    Measured,
    Parts,
    entry_scores,
    in_codes,
    in_parts,
    pivot_noise,
    split,
)
from spectrim.linalg.quantise import dequantise, round_to_nearest
from spectrim.linalg.trellis import RATES, Rate, distortion
from spectrim.linalg.trellis_columns import STRIP, trellis_account, within_table
from spectrim.models.walk import Layer

BYTE_DISTORTION = 8e-5
"""Of 8-bit codes with one grid a row of normal weights: a range of +-4.5 deviations in 255 steps, (9 / 255)^2 / 12."""
ENTRY_COUNTS, ENTRY_SHARES, MOST_ENTRIES = (16, 64, 256), (0.001, 0.003, 0.01, 0.03), 0.03
"""Entries that may be kept apart, and shares of all, none above the last."""
CORRECTION_RANKS, CORRECTION_BITS = (1, 2, 4, 8, 16, 32), (4, 8)
PART_BITS = (2, 3, 4, 6, 8, 16)
"""Of the two parts of a low-rank weight."""
MOST_RANKS = 32
"""Of a low-rank weight, evenly spaced."""


class Code(NamedTuple):
    """How numbers are kept: trellis codes at a rate, 8-bit codes with a grid a row, or 16-bit numbers."""

    bits: float
    rate: Rate | None = None

    @property
    def error(self) -> float:
        """Mean squared error of normal numbers of variance 1."""
        if self.rate is not None:
            return distortion(self.rate)
        return BYTE_DISTORTION if self.bits == 8 else 0.0

    def account(self, outputs: int, inputs: int) -> Account:
        """Bytes of a matrix."""
        if self.rate is not None:
            return trellis_account(outputs, inputs, self.rate)
        if self.bits == 8:
            return uniform_account(outputs, inputs, 8, 0, symmetric=True)
        return Account(values=outputs * inputs * VALUE_BYTES)


BYTE, PLAIN = Code(8), Code(16)
Kind = Literal["dense", "codes", "entries", "correction", "factor", "pivot"]


@dataclass(frozen=True)
class Form:
    """One entry of the menu."""

    kind: Kind
    code: Code = PLAIN
    rank: int = 0  # of a low-rank weight or of a correction
    entries: int = 0
    side_bits: int = 0  # of a correction

    def account(self, layer: Layer) -> Account:
        """Bytes of the weight."""
        outputs, inputs = layer.outputs, layer.inputs
        if self.kind == "factor":
            return self.code.account(outputs, self.rank) + self.code.account(self.rank, inputs)
        if self.kind == "pivot":
            mask = Account(indices=(outputs + 7) // 8)
            return self.code.account(self.rank, inputs) + self.code.account(outputs - self.rank, self.rank) + mask
        whole = self.code.account(outputs, inputs)
        if self.kind == "entries":
            return whole + outliers_account(outputs, inputs, self.entries)
        if self.kind == "correction":
            sides = (uniform_account(self.rank, n, self.side_bits, 0, symmetric=True) for n in (outputs, inputs))
            return sum(sides, whole)
        return whole

    @property
    def label(self) -> str:
        """For tables."""
        in_bits = f"{self.code.bits:g} bits"
        return {
            "dense": "dense",
            "codes": in_bits,
            "entries": f"{in_bits}, {self.entries} entries apart",
            "correction": f"{in_bits}, rank {self.rank} in {self.side_bits} bits beside",
            "factor": f"factor, rank {self.rank} in {in_bits}",
            "pivot": f"pivot, rank {self.rank} in {in_bits}",
        }[self.kind]


DENSE = Form("dense")


class Menu(NamedTuple):
    """Forms that a layer may take, with what they lose (nats) and take (bytes)."""

    forms: list[Form]
    options: Options


def codes_of(window: int) -> tuple[Code, ...]:
    """By what they lose, most first."""
    return (*(Code(rate.bits, rate._replace(window=window)) for rate in RATES), BYTE)


def mixed_codes(window: int, bits: float) -> list[tuple[Code, float]]:
    """The two codes that so many bits a weight lie between, and the shares of weights that make it so many."""
    codes = [*codes_of(window), PLAIN]
    above = next((i for i, code in enumerate(codes) if code.bits >= bits), len(codes) - 1)
    if above == 0 or codes[above].bits == bits:
        return [(codes[above], 1.0)]
    low, high = codes[above - 1], codes[above]
    share = min(1.0, (bits - low.bits) / (high.bits - low.bits))
    return [(low, 1 - share), (high, share)]


def part_codes(window: int) -> tuple[Code, ...]:
    """Those of the two parts of a low-rank weight."""
    return tuple(code for code in (*codes_of(window), PLAIN) if code.bits in PART_BITS)


def code_losses(codes: Sequence[Code], own: InCodes) -> list[float]:
    """What codes of a weight lose."""
    return [own.byte if code.rate is None else own.at(within_table(code.rate)) for code in codes]


def code_menu(layer: Layer, own: InCodes, window: int) -> Menu:
    """Codes alone."""
    codes = codes_of(window)
    return menu_of(layer, [*(Form("codes", code) for code in codes), DENSE], [*code_losses(codes, own), 0.0])


def full_menu(layer: Layer, measured: Measured, window: int) -> Menu:
    """All forms."""
    plain = code_menu(layer, in_codes(measured, window), window)
    found = list(zip(plain.forms, plain.options.error.tolist(), strict=True))
    found += _with_entries(layer, measured, window)
    found += _with_correction(layer, measured, window)
    found += _low_rank(layer, in_parts(measured), measured, window, plain)
    return menu_of(layer, [form for form, _ in found], [loss for _, loss in found])


def menu_of(layer: Layer, forms: Sequence[Form], losses: Sequence[float]) -> Menu:
    """With what each form takes."""
    cost = torch.tensor([form.account(layer).total for form in forms])
    return Menu(list(forms), Options(torch.tensor(losses, dtype=torch.float64), cost))


def _with_entries(layer: Layer, measured: Measured, window: int) -> list[tuple[Form, float]]:
    order = entry_scores(measured, window).flatten().argsort(descending=True, stable=True)
    counts = sorted({*ENTRY_COUNTS, *(int(share * layer.weight_numbers) for share in ENTRY_SHARES)})
    found: list[tuple[Form, float]] = []
    for count in counts:
        if 0 < count <= MOST_ENTRIES * layer.weight_numbers:
            rest = measured.weight.flatten().index_fill(0, order[:count], 0.0).view_as(measured.weight)
            losses = code_losses(codes_of(window), in_codes(measured, window, rest))
            forms = [Form("entries", code, entries=count) for code in codes_of(window)]
            found += zip(forms, losses, strict=True)
    return found


def _with_correction(layer: Layer, measured: Measured, window: int) -> list[tuple[Form, float]]:
    found: list[tuple[Form, float]] = []
    ranks = [r for r in CORRECTION_RANKS if 4 * r <= min(layer.outputs, layer.inputs)]
    whole = split(measured, max(ranks, default=0))
    for rank in ranks:
        rest = measured.weight - whole.left[:, :rank] @ whole.right[:rank]
        own = in_codes(measured, window, rest)
        before = float(measured.by_row.square().sum() / measured.by_row_of(rest).square().sum().clamp(min=1e-300))
        for bits in CORRECTION_BITS:
            # The correction's own rounding, of both its parts, is left for the codes too.
            grown = 1 + 2 * uniform_distortion(bits) * max(before - 1, 0.0)
            for code, loss in zip(codes_of(window), code_losses(codes_of(window), own), strict=True):
                found.append((Form("correction", code, rank=rank, side_bits=bits), grown * loss))
    return found


def _low_rank(layer: Layer, parts: Parts, measured: Measured, window: int, plain: Menu) -> list[tuple[Form, float]]:
    """Parts and pivots are worked out only where the cut alone leaves less than plain codes of no more bytes."""

    found: list[tuple[Form, float]] = []
    kinds: tuple[Kind, ...] = ("factor", "pivot")
    for kind in kinds:
        for rank in low_ranks(layer):
            cut = parts.cut(rank)
            forms = [Form(kind, code, rank=rank) for code in part_codes(window)]
            forms = [form for form in forms if cut < _least(plain, form.account(layer).total)]
            noise = 0.0
            if any(form.code.error for form in forms):
                factors = parts.factors(rank)
                noise = parts.noise(rank) if kind == "factor" else pivot_noise(to_pivots(factors), measured)
            found += [(form, cut + noise * form.code.error) for form in forms]
    return found


def low_ranks(layer: Layer) -> list[int]:
    """Ranks that a low-rank weight may have."""
    full = min(layer.outputs, layer.inputs)
    step = STRIP * -(-full // (STRIP * MOST_RANKS))
    return list(range(step, full, step))


def _least(menu: Menu, cost: int) -> float:
    """What the best of at most so many bytes loses."""
    fits = menu.options.cost <= cost
    return float(menu.options.error[fits].min()) if bool(fits.any()) else float("inf")


@cache
def uniform_distortion(bits: int) -> float:
    """Mean squared error of normal numbers in codes with a searched grid a row of 512, measured on a fixed sample."""
    sample = torch.randn(64, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    rounded = round_to_nearest(sample, bits, 0, symmetric=True, search=True)
    return float((dequantise(rounded, bits, torch.float64) - sample).square().mean())
