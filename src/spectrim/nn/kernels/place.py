"""Triton: outputs of pivot layers for many rows, written where they belong.

    merge      y (T, O) from the pivots (T, R) and the others (T, O - R), read once and written once
    scatter    y[:, place] = p C^T, a product that writes each of its columns to its place
    spread     y[:, place] = p, for what goes with it

torch makes [pivots, others] first and takes columns from it then: two reads and two writes of all outputs.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _biased(value, bias, columns, inside, BIAS: tl.constexpr):
    """Rounded before the bias is added, as torch does."""
    if BIAS:
        wide = value.to(tl.float32) + tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        return wide.to(value.dtype)
    else:
        return value


@triton.jit
def merge(pivots, others, order, bias, y, T, R, outputs, BIAS: tl.constexpr, ROWS: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """`order` (O,) int32: where each output stands in [pivots, others]."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    line, within = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    inside = columns < outputs
    at = tl.load(order + columns, mask=inside, other=0)
    # What depends on the column is worked out once for all lines; within a block 32 bits are enough.
    base = tl.where(at < R, pivots + line * R, others + line * (outputs - R))
    stride, offset = tl.where(at < R, R, outputs - R), tl.where(at < R, at, at - R)
    source = base[None, :] + (within[:, None] * stride[None, :] + offset[None, :])
    mask = (within < T - line)[:, None] & inside[None, :]
    value = _biased(tl.load(source, mask=mask, other=0.0), bias, columns, inside, BIAS)
    tl.store(y + line * outputs + (within[:, None] * outputs + columns[None, :]), value, mask=mask)


@triton.jit
def spread(pivots, places, bias, y, T, R, outputs, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`places` (R,) int32: the output that each pivot is."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lines = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = columns < R
    to = tl.load(places + columns, mask=inside, other=0)
    wide = lines.to(tl.int64)[:, None]
    mask = (lines < T)[:, None] & inside[None, :]
    value = _biased(tl.load(pivots + wide * R + columns[None, :], mask=mask, other=0.0), bias, to, inside, BIAS)
    tl.store(y + wide * outputs + to[None, :], value, mask=mask)


@triton.jit
def scatter(x, w, places, bias, y, T, N, K, outputs, BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
            COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """x (T, K), w (N, K), `places` (N,) int32 among the columns of y. Programs go through y in strips of 8 blocks."""
    down, across = tl.cdiv(T, ROWS), tl.cdiv(N, COLUMNS)
    strip = tl.program_id(0) // (8 * across)
    tall = tl.minimum(down - strip * 8, 8)
    within = tl.program_id(0) % (8 * across)
    lines = (strip * 8 + within % tall) * ROWS + tl.arange(0, ROWS)
    columns = within // tall * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, BLOCK_K)
    left = x + tl.minimum(lines, T - 1).to(tl.int64)[:, None] * K + k[None, :]
    right = w + tl.minimum(columns, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            a, b = tl.load(left + start), tl.load(right + start)
        else:
            inside = (k < K - start)[None, :]
            a, b = tl.load(left + start, mask=inside, other=0.0), tl.load(right + start, mask=inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    real = columns < N
    to = tl.load(places + columns, mask=real, other=0)
    value = _biased(total.to(y.dtype.element_ty), bias, to, real, BIAS)
    tl.store(y + lines.to(tl.int64)[:, None] * outputs + to[None, :], value, mask=(lines < T)[:, None] & real[None, :])
