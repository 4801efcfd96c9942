"""Triton: products of few rows with up to three weights in one launch.

    y_g = x_g W_g^T,   x_g (M, K_g),  W_g (N_g, K_g),  g = 0, 1, 2       M = 1: `matvec`,  2 <= M <= 16: `few_rows`

What one row of the model's state asks of a low-rank layer is two products whose weights are read once. Each takes about
as long as a launch, so three things matter more than arithmetic:

1. Layers that read the same input (q, k, v; gate, up) share a launch: `g` is chosen by the program's number.
   Those that share their right factor are one weight in the first launch, whose result all of the second read.
2. A pivot layer's outputs go to their places as they are computed (`place`): no concatenation, no gather.
3. With PDL (programmatic dependent launch, Hopper) a launch starts while the one in front of it still runs, and waits
   for it before it reads what that one computes: PDL = 1. PDL = 2 loads its first weights before it waits, which is
   right where the launch in front is known not to write weights: the first of a layer's two products is. A launch lets
   the next one start only after its own wait, so all that came before the pair is done by then.

GATHER: a right factor in pivot storage is the identity for the inputs order[:n], and w its columns for order[n:].

Sums are in float32, results are rounded once to the dtype of `x`.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]


@triton.jit
def keep(value, lines, rows, M, n, raw, y, place, bias, stride, RAW: tl.constexpr, OUT: tl.constexpr,
         PLACED: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """Results (L, N) of lines of x and rows of a weight to `raw`, to `y` in their places, or to both."""
    inside = (lines < M)[:, None] & (rows < n)[None, :]
    if RAW:
        tl.store(raw + lines[:, None] * n + rows[None, :], value.to(raw.dtype.element_ty), mask=inside)
    if OUT:
        where = rows
        if PLACED:
            where = tl.load(place + rows, mask=rows < n, other=0)
        if BIAS:
            # Rounded first, as torch does when it adds the bias to a finished product.
            value = value.to(y.dtype.element_ty).to(tl.float32)
            value += tl.load(bias + where, mask=rows < n, other=0.0).to(tl.float32)[None, :]
        tl.store(y + lines[:, None] * stride + where[None, :], value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def matvec(x0, x1, x2, w0, w1, w2, r0, r1, r2, y0, y1, y2, p0, p1, p2, b0, b1, b2, n0, n1, n2, k0, k1, k2,
           s0, s1, s2, M, order, wide, RAW: tl.constexpr, OUT: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr,
           GATHER: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """One row: each program BLOCK_N outputs of one weight, all of its inputs."""
    block = tl.program_id(0)
    x, w, raw, y, place, bias, n, k, stride = x0, w0, r0, y0, p0, b0, n0, k0, s0
    first, second = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    if block >= first + second:
        x, w, raw, y, place, bias, n, k, stride = x2, w2, r2, y2, p2, b2, n2, k2, s2
        block -= first + second
    elif block >= first:
        x, w, raw, y, place, bias, n, k, stride = x1, w1, r1, y1, p1, b1, n1, k1, s1
        block -= first
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    weights = w + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * k + columns[None, :]
    if PDL == 1:
        gdc_wait()
        gdc_launch_dependents()
    if EVEN:
        tile = tl.load(weights)
    else:
        tile = tl.load(weights, mask=(columns < k)[None, :], other=0.0)
    if PDL == 2:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if EVEN:
        total += tile.to(tl.float32) * tl.load(x + columns).to(tl.float32)[None, :]
        for start in tl.range(BLOCK_K, k, BLOCK_K, num_stages=STAGES):
            tile = tl.load(weights + start)
            total += tile.to(tl.float32) * tl.load(x + start + columns).to(tl.float32)[None, :]
    else:
        at = columns
        if GATHER:
            at = tl.load(order + n + columns, mask=columns < k, other=0)
        total += tile.to(tl.float32) * tl.load(x + at, mask=columns < k, other=0.0).to(tl.float32)[None, :]
        for start in tl.range(BLOCK_K, k, BLOCK_K, num_stages=STAGES):
            inside = columns < k - start
            tile = tl.load(weights + start, mask=inside[None, :], other=0.0)
            at = start + columns
            if GATHER:
                at = tl.load(order + n + start + columns, mask=inside, other=0)
            total += tile.to(tl.float32) * tl.load(x + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.sum(total, 1)[None, :]
    if GATHER:
        pivots = tl.load(order + rows, mask=rows < n, other=0)
        value += tl.load(x + pivots, mask=rows < n, other=0.0).to(tl.float32)[None, :]
    keep(value, tl.arange(0, 1), rows, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)


@triton.jit
def few_rows(x0, x1, x2, w0, w1, w2, r0, r1, r2, y0, y1, y2, p0, p1, p2, b0, b1, b2, n0, n1, n2, k0, k1, k2,
             s0, s1, s2, M, order, wide, RAW: tl.constexpr, OUT: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr,
             GATHER: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """Up to 16 rows on the matrix units. A program's inputs are cut in SPLIT parts that run beside each other."""
    SPLIT: tl.constexpr = 4
    PART: tl.constexpr = BLOCK_K // SPLIT
    block = tl.program_id(0)
    x, w, raw, y, place, bias, n, k, stride = x0, w0, r0, y0, p0, b0, n0, k0, s0
    first, second = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    if block >= first + second:
        x, w, raw, y, place, bias, n, k, stride = x2, w2, r2, y2, p2, b2, n2, k2, s2
        block -= first + second
    elif block >= first:
        x, w, raw, y, place, bias, n, k, stride = x1, w1, r1, y1, p1, b1, n1, k1, s1
        block -= first
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    lines = tl.arange(0, 16)
    columns = tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, None, :]  # (S, 1, P)
    weights = w + tl.minimum(rows, n - 1).to(tl.int64)[None, :, None] * k + columns
    inputs = x + lines[None, :, None] * k + columns
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([SPLIT, 16, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        inside = lines[None, :, None] < M
        if EVEN:
            tile = tl.load(weights + start)
        else:
            inside = inside & (columns < k - start)
            tile = tl.load(weights + start, mask=columns < k - start, other=0.0)
        if GATHER:
            at = tl.load(order + n + start + columns, mask=columns < k - start, other=0)
            given = tl.load(x + lines[None, :, None] * wide + at, mask=inside, other=0.0)
        else:
            given = tl.load(inputs + start, mask=inside, other=0.0)
        total = tl.dot(given, tl.permute(tile, (0, 2, 1)), total, input_precision="ieee")
    value = tl.sum(total, 0)
    if GATHER:
        pivots = tl.load(order + rows, mask=rows < n, other=0)
        inside = (lines < M)[:, None] & (rows < n)[None, :]
        value += tl.load(x + lines[:, None] * wide + pivots[None, :], mask=inside, other=0.0).to(tl.float32)
    keep(value, lines, rows, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)
