"""What stored weights take, part by part, in bytes; everything that has to be in the file is counted.

Numbers of 16 bits (scales, kept values, factors, biases) count two bytes whatever dtype a folder is written in: sizes
are relative to the dense weight in bfloat16.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spectrim.linalg.bilevel import row_blocks
from spectrim.linalg.groups import bitmap_bytes
from spectrim.linalg.normal_float import Form, blocks_in
from spectrim.linalg.outliers import most_gap_bytes
from spectrim.linalg.quantise import group_count, packed_width

VALUE_BYTES = 2

Unit = Literal["numbers", "bytes"]
"""What a budget counts. A method of ranks counts numbers, one of bits must count bytes."""
PER_NUMBER: dict[Unit, int] = {"numbers": 1, "bytes": VALUE_BYTES}
"""What a number of the dense weight counts."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Bytes of one layer or of many."""

    codes: int = 0
    scales: int = 0
    zeros: int = 0
    codebooks: int = 0
    indices: int = 0  # of sparse patterns and of entries kept apart
    values: int = 0  # weights in 16 bits
    factors: int = 0  # low-rank corrections
    bias: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "Account") -> "Account":
        pairs = zip(dataclasses.fields(self), dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Account(**{field.name: mine + theirs for field, mine, theirs in pairs})

    def bits_a_weight(self, weights: int) -> float:
        """Of that many weights."""
        return 8 * self.total / weights


def uniform_account(outputs: int, inputs: int, bits: int, group_size: int, *, symmetric: bool) -> Account:
    """Codes and scales of `linalg/quantise.py`, codes packed row by row; zeros packed as one row."""
    groups = group_count(inputs, group_size)
    return Account(
        codes=outputs * packed_width(inputs, bits),
        scales=outputs * groups * VALUE_BYTES,
        zeros=0 if symmetric else packed_width(outputs * groups, bits),
    )


def bilevel_account(
    outputs: int, inputs: int, bits: int, group_size: int, *, statistic_bits: int, rows: int
) -> Account:
    """Codes of `linalg/bilevel.py`; scales and zeros each as one stream of codes, and a step and a low a block."""
    groups = group_count(inputs, group_size)
    statistics = packed_width(outputs * groups, statistic_bits) + 2 * row_blocks(outputs, rows) * groups * VALUE_BYTES
    return Account(codes=outputs * packed_width(inputs, bits), scales=statistics, zeros=statistics)


def codebook_account(outputs: int, inputs: int, bits: int) -> Account:
    """Codes and a table for each row (`linalg/codebook.py`)."""
    return Account(codes=outputs * packed_width(inputs, bits), codebooks=outputs * 2**bits * VALUE_BYTES)


def outliers_account(outputs: int, inputs: int, entries: int) -> Account:
    """At most: entries in 16 bits, and as many bytes for where they stand as the worst places take."""
    return Account(values=entries * VALUE_BYTES, indices=most_gap_bytes(outputs * inputs, entries))


def groups_account(outputs: int, inputs: int, bits: int, group_size: int, *, kept: int, symmetric: bool) -> Account:
    """`kept` groups of `linalg/groups.py` in codes, each with a scale and a zero, and one bit for every group."""
    codes = uniform_account(kept, group_size, bits, 0, symmetric=symmetric)
    return codes + Account(indices=bitmap_bytes(outputs, group_count(inputs, group_size)))


def normal_account(outputs: int, inputs: int, form: Form) -> Account:
    """Codes and scales of both levels of `linalg/normal_float.py`; codes packed row by row, scale codes as one row."""
    blocks, tops = blocks_in(outputs, inputs, form)
    return Account(
        codes=outputs * packed_width(inputs, form.bits),
        scales=packed_width(outputs * blocks, form.scale_bits) + tops * VALUE_BYTES,
    )


def sparse24_account(outputs: int, inputs: int) -> Account:
    """Two of four values, and two bits for the place of each."""
    kept = inputs // 2
    return Account(values=outputs * kept * VALUE_BYTES, indices=outputs * packed_width(kept, 2))


def correction_account(outputs: int, inputs: int, rank: int) -> Account:
    """A low-rank correction U V."""
    return Account(factors=rank * (outputs + inputs) * VALUE_BYTES)


def bias_account(outputs: int, *, bias: bool) -> Account:
    """A bias, if there is one."""
    return Account(bias=outputs * VALUE_BYTES if bias else 0)


def budget_in(unit: Unit, dense_numbers: int, keep: float) -> int:
    """What a share of that many dense numbers allows."""
    return int(keep * PER_NUMBER[unit] * dense_numbers + 1e-6)


def stored_size(numel: int, nbytes: int, *, floating: bool, unit: Unit) -> int:
    """What a stored tensor counts: its elements; or bytes, numbers two each and others what they take."""
    if unit == "numbers":
        return numel
    return numel * VALUE_BYTES if floating else nbytes


def size_of(tensors: Iterable[Tensor], unit: Unit) -> int:
    """What they count together."""
    return sum(stored_size(t.numel(), t.nbytes, floating=t.is_floating_point(), unit=unit) for t in tensors)
