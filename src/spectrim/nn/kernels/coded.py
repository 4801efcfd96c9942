"""Triton: one row times up to three weights in codes of 2, 3, 4 or 8 bits (linalg/quantise.py), decoded in registers.

    y_n = sum_v s_nv ( sum_k (2^b + code_nk) x_k  -  (2^b + zero_nv) sum_k x_k )    v: groups of inputs, k: one's

Codes are read as words of 32 bits, in loads of up to 16 bytes. A code becomes a number without a conversion: put at the
top of the fraction of the float 2^b, it is 2^b + code, exactly, and the 2^b goes with the zero, once for a group. That
is a shift, a bitwise operation and a multiplication for each weight. A program takes BLOCK_N rows and GROUPS groups of
GROUP inputs at a time (a group here may be a part of one of the file: `per` of them share a scale).

It multiplies in registers, too; `rows.py`, for 2 rows and more, on the matrix units. Sums are in float32.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from spectrim.nn.kernels.plain import keep


@triton.jit
def _words(rows, start, unit: tl.constexpr, left, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Words (N, U) of 32 / BITS codes each, or of 8 of 3 bits: each row's from the int32 `start` on, `left` of them.

    EVEN: all are there, or none.
    """
    N: tl.constexpr = rows.shape[0]
    if BITS == 3:  # 32 codes fill three words, of which four of 24 bits are made
        parts = tl.arange(0, unit // 4)
        at = rows[:, None] + start + 3 * parts[None, :]
        inside = left > 0 if EVEN else (3 * parts < left)[None, :]
        a = tl.load(at, mask=inside, other=0)
        b = tl.load(at + 1, mask=inside, other=0)
        c = tl.load(at + 2, mask=inside, other=0)
        first = tl.join(a, ((b >> 16) & 0xFFFF) | (c << 16))
        second = tl.join(((a >> 24) & 0xFF) | (b << 8), c >> 8)
        return tl.reshape(tl.join(first, second), [N, unit])
    else:
        columns = tl.arange(0, unit)
        inside = left > 0 if EVEN else (columns < left)[None, :]
        return tl.load(rows[:, None] + start + columns[None, :], mask=inside, other=0)


@triton.jit
def _number(words, i: tl.constexpr, BITS: tl.constexpr):
    """2^BITS + the code number i of each word, float32."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    # The grid has one layer: a number that the compiler does not know stays in a register, and both operations are one.
    power = ((127 + BITS) << 23) + tl.program_id(2)
    if BITS * i > 23 - BITS:
        moved = words >> (BITS * i - (23 - BITS))
    else:
        moved = words << (23 - BITS - BITS * i)
    return ((moved & MASK) | power).to(tl.float32, bitcast=True)


@triton.jit
def _numbers(words, BITS: tl.constexpr):
    """2^BITS + code of all codes of words (N, U), in their order: (N, U COUNT) float32."""
    N: tl.constexpr = words.shape[0]
    U: tl.constexpr = words.shape[1]
    # Joined by the highest bit of a code's number first: the last join is the fastest axis.
    if BITS == 8:
        even = tl.join(_number(words, 0, BITS), _number(words, 2, BITS))
        odd = tl.join(_number(words, 1, BITS), _number(words, 3, BITS))
        return tl.reshape(tl.join(even, odd), [N, U * 4])
    elif BITS == 2:
        return tl.reshape(tl.join(_eight(words, 0, 2, BITS), _eight(words, 1, 2, BITS)), [N, U * 16])
    else:
        return tl.reshape(_eight(words, 0, 1, BITS), [N, U * 8])


@triton.jit
def _eight(words, i: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr):
    """Codes i, i + step, ... i + 7 step of each word: (N, U, 2, 2, 2)."""
    a = tl.join(_number(words, i, BITS), _number(words, i + 4 * step, BITS))
    b = tl.join(_number(words, i + step, BITS), _number(words, i + 5 * step, BITS))
    c = tl.join(_number(words, i + 2 * step, BITS), _number(words, i + 6 * step, BITS))
    d = tl.join(_number(words, i + 3 * step, BITS), _number(words, i + 7 * step, BITS))
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _zeros(zeros, index, inside, total, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """Bytes that hold zeros, by the zero's number: packed without gaps, one may lie across two bytes."""
    if SYMMETRIC:
        return index
    else:
        byte = (index * BITS) >> 3
        word = tl.load(zeros + byte, mask=inside, other=0).to(tl.int32)
        if BITS == 3:  # the other widths divide a byte
            word |= tl.load(zeros + byte + 1, mask=inside & (byte + 1 < total), other=0).to(tl.int32) << 8
        return word


@triton.jit
def _zero(word, index, SYMMETRIC: tl.constexpr, BITS: tl.constexpr):
    """2^BITS + zero, float32."""
    if SYMMETRIC:
        return tl.full(index.shape, 3 << (BITS - 1), tl.float32)
    else:
        return _number(word >> ((index * BITS) & 7), 0, BITS)


@triton.jit
def _index(real, start, k, g, GROUP: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr):
    """Numbers (N, GROUPS) of the scales of groups from number `start` on; SHARED: several groups have one."""
    groups = start + tl.arange(0, GROUPS)
    if SHARED:
        groups = groups // (k // GROUP // g)
    return real[:, None] * g + groups[None, :]


@triton.jit
def coded(x0, x1, x2, w0, w1, w2, r0, r1, r2, y0, y1, y2, p0, p1, p2, b0, b1, b2, n0, n1, n2, k0, k1, k2,
          s0, s1, s2, M, c0, c1, c2, z0, z1, z2, g0, g1, g2, RAW: tl.constexpr, OUT: tl.constexpr, PLACED: tl.constexpr,
          BIAS: tl.constexpr, PDL: tl.constexpr, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr,
          GROUP: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
          STAGES: tl.constexpr):  # fmt: skip
    """One row: `w` codes (N, K BITS / 32) int32, `c` scales (N, g), `z` zeros packed over all (N g); rest as plain.py.

    COUNT: codes of a word of `_words`.
    """
    UNIT: tl.constexpr = GROUPS * GROUP // COUNT
    block = tl.program_id(0)
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
    groups = k // GROUP
    step: tl.constexpr = GROUP * BITS // 32  # int32 of a group
    width = groups * step
    codes = w + real.to(tl.int64) * width
    parts, columns = tl.arange(0, GROUPS), tl.arange(0, GROUPS * GROUP)
    size = (n * g * BITS + 7) // 8
    if PDL == 1:
        gdc_wait()
        gdc_launch_dependents()
    words = _words(codes, 0, UNIT, width, BITS, EVEN)
    index = _index(real, 0, k, g, GROUP, GROUPS, SHARED)
    known = (parts < groups)[None, :]
    scale, zero = tl.load(scales + index, mask=known, other=0.0), _zeros(zeros, index, known, size, SYMMETRIC, BITS)
    if PDL == 2:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for start in tl.range(0, groups, GROUPS, num_stages=1):
        if EVEN:
            given = tl.load(x + start * GROUP + columns).to(tl.float32)
        else:
            given = tl.load(x + start * GROUP + columns, mask=columns < k - start * GROUP, other=0.0).to(tl.float32)
        # What the next turn needs is on its way while this one is computed.
        then = start + GROUPS
        after = _words(codes, then * step, UNIT, width - then * step, BITS, EVEN)
        ahead = _index(real, then, k, g, GROUP, GROUPS, SHARED)
        known = (then + parts < groups)[None, :]
        scale_after = tl.load(scales + ahead, mask=known, other=0.0)
        zero_after = _zeros(zeros, ahead, known, size, SYMMETRIC, BITS)
        met = _numbers(words, BITS) * given[None, :]
        found = tl.sum(tl.reshape(met, [BLOCK_N, GROUPS, GROUP]), 2)
        seen = tl.sum(tl.reshape(given, [GROUPS, GROUP]), 1)
        total += scale.to(tl.float32) * (found - _zero(zero, index, SYMMETRIC, BITS) * seen[None, :])
        words, index, scale, zero = after, ahead, scale_after, zero_after
    value = tl.sum(total, 1)[None, :]
    keep(value, tl.arange(0, 1), rows, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)
