"""Triton: rows times up to three weights in codes of 2, 3, 4 or 8 bits (linalg/quantise.py), decoded in registers.

    y_n = sum_v s_nv ( sum_k code_nk x_k  -  zero_nv sum_k x_k )        v: groups of inputs, k: the inputs of one

COUNT codes fill SIZE bytes, a unit; a program takes BLOCK_N rows, and of each GROUPS groups of UNITS units at a time.
A group here may be a part of one of the file (`per` of them share a scale): UNITS is a power of two. One line of x is a
program of its own (axis 1 of the grid). Sums are in float32.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from spectrim.nn.kernels.plain import keep


@triton.jit
def _zeros(zeros, index, inside, total, BITS: tl.constexpr):
    """Codes of zeros by their number: packed without gaps, they may lie across two bytes."""
    bit = index * BITS
    byte = bit >> 3
    word = tl.load(zeros + byte, mask=inside, other=0).to(tl.int32)
    word |= tl.load(zeros + byte + 1, mask=inside & (byte + 1 < total), other=0).to(tl.int32) << 8
    return ((word >> (bit & 7)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def coded(x0, x1, x2, w0, w1, w2, r0, r1, r2, y0, y1, y2, p0, p1, p2, b0, b1, b2, n0, n1, n2, k0, k1, k2,
          s0, s1, s2, M, c0, c1, c2, z0, z1, z2, g0, g1, g2, RAW: tl.constexpr, OUT: tl.constexpr, PLACED: tl.constexpr,
          BIAS: tl.constexpr, PDL: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr,
          SIZE: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """`w` codes (N, K BITS / 8) uint8, `c` scales (N, g), `z` zeros packed over all (N g); the rest as in plain.py."""
    block, line = tl.program_id(0), tl.program_id(1)
    x, w, raw, y, place, bias, n, k, stride = x0, w0, r0, y0, p0, b0, n0, k0, s0
    scales, zeros, g = c0, z0, g0
    first, second = tl.cdiv(n0, BLOCK_N), tl.cdiv(n1, BLOCK_N)
    if block >= first + second:
        x, w, raw, y, place, bias, n, k, stride = x2, w2, r2, y2, p2, b2, n2, k2, s2
        scales, zeros, g = c2, z2, g2
        block -= first + second
    elif block >= first:
        x, w, raw, y, place, bias, n, k, stride = x1, w1, r1, y1, p1, b1, n1, k1, s1
        scales, zeros, g = c1, z1, g1
        block -= first
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    real = tl.minimum(rows, n - 1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    groups = k // (UNITS * COUNT)
    per = groups // g
    width = groups * (UNITS * SIZE)
    parts = tl.arange(0, GROUPS)
    units = parts[:, None] * UNITS + tl.arange(0, UNITS)[None, :]  # (V, U)
    codes = w + real.to(tl.int64)[:, None, None] * width + units[None, :, :] * SIZE
    inputs = x + line * k + units * COUNT
    total = tl.zeros([BLOCK_N, GROUPS, UNITS], tl.float32)
    below = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for start in tl.range(0, groups, GROUPS, num_stages=STAGES):
        inside = (start + parts < groups)[:, None]
        words = tl.zeros([BLOCK_N, GROUPS, UNITS], tl.int32)
        for i in tl.static_range(SIZE):
            at = codes + start * (UNITS * SIZE) + i
            words |= tl.load(at, mask=inside[None, :, :], other=0).to(tl.int32) << (8 * i)
        found = tl.zeros([BLOCK_N, GROUPS, UNITS], tl.float32)
        seen = tl.zeros([GROUPS, UNITS], tl.float32)
        for i in tl.static_range(COUNT):
            given = tl.load(inputs + start * (UNITS * COUNT) + i, mask=inside, other=0.0).to(tl.float32)
            found += ((words >> (BITS * i)) & ((1 << BITS) - 1)).to(tl.float32) * given[None, :, :]
            seen += given
        index = real[:, None] * g + ((start + parts) // per)[None, :]
        known = (start + parts < groups)[None, :] & (rows >= 0)[:, None]
        scale = tl.load(scales + index, mask=known, other=0.0).to(tl.float32)
        if SYMMETRIC:
            zero = tl.full([BLOCK_N, GROUPS], 1 << (BITS - 1), tl.float32)
        else:
            zero = _zeros(zeros, index, known, (n * g * BITS + 7) // 8, BITS)
        # Zeros meet the sum of a group's inputs, once for the group: an instruction for each weight would show.
        total += scale[:, :, None] * found
        below += scale * zero * tl.sum(seen, 1)[None, :]
    value = (tl.sum(tl.sum(total, 2), 1) - tl.sum(below, 1))[None, :]
    keep(value, line + tl.arange(0, 1), rows, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)
