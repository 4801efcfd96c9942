"""Triton: 2 to 16 rows times up to three weights in codes, each warp with inputs of its own.

    y_n = sum_v s_nv ( sum_k (c + code_nk) x_k  -  (c + zero_nv) sum_k x_k )    v: groups of inputs, k: one's

A sum over inputs may be taken in any order, so the order is chosen that needs no exchange: of a weight's row, four
neighbouring threads load words of 16 bytes, and what a thread loads is what the matrix unit takes from it. x is loaded
the same way. Neither passes through shared memory, and warps do not wait for each other: warp s takes every WARPS-th
group of inputs, and sums are added at the end, in the order of warps. Where programs are few, `splits` of them divide
the inputs of a weight's rows: each leaves its sums in `part`, and the one that comes last (`count`) adds them in their
order and sets the count back to 0, so results do not depend on who was first.

A code becomes a number of 16 bits without a conversion, two at a time: put at the end of the fraction of c = 128
(bfloat16) or 1024 (float16), it is c + code, exactly. Codes of 8 bits in bfloat16 go through float32 (c = 0), and so do
all where x is in float32. The sums of x that c and the zeros go with come from the matrix unit, too. Sums are in
float32.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # pyright: ignore[reportMissingImports]

from spectrim.nn.kernels.plain import keep


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """The two numbers of 16 bits of each word: (..., 2)."""
    low = words.to(tl.int16).to(dtype, bitcast=True)
    return tl.join(low, (words >> 16).to(tl.int16).to(dtype, bitcast=True))


@triton.jit
def _pair(words, i: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """c + code number i of each half of words: (..., 2); the codes themselves in float32."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001
    POWER: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    # The grid has one layer: a number that the compiler does not know stays in a register, and both operations are one.
    numbers = ((words >> (BITS * i)) & MASK) | (POWER + tl.program_id(2))
    if dtype == tl.float32:
        return _halves(numbers, tl.float16).to(tl.float32) - 1024.0
    else:
        return _halves(numbers, dtype)


@triton.jit
def _byte(words, i: tl.constexpr, dtype: tl.constexpr):
    """Byte i of each word: a float32 of 2^23 + byte is one bitwise operation away."""
    number = ((words >> (8 * i)) & 0xFF) | 0x4B000000
    return (number.to(tl.float32, bitcast=True) - 8388608.0).to(dtype)


@triton.jit
def _four(words, i: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes i, i + step, ... of each half: (..., 2, 2, 2), the half first."""
    even = tl.join(_pair(words, i, BITS, dtype), _pair(words, i + 2 * step, BITS, dtype))
    odd = tl.join(_pair(words, i + step, BITS, dtype), _pair(words, i + 3 * step, BITS, dtype))
    return tl.join(even, odd)


@triton.jit
def _decoded(words, BITS: tl.constexpr, COUNT: tl.constexpr, dtype: tl.constexpr):
    """c + code of words (4, 8, S, R, B, V), as (S, 8 B, K): threads of a row and halves of a word change fastest."""
    S: tl.constexpr = words.shape[2]
    R: tl.constexpr = words.shape[3]
    B: tl.constexpr = words.shape[4]
    V: tl.constexpr = words.shape[5]
    if BITS == 8:
        if dtype == tl.float16:
            numbers = tl.join(_pair(words, 0, BITS, dtype), _pair(words, 1, BITS, dtype))
        else:
            even = tl.join(_byte(words, 0, dtype), _byte(words, 2, dtype))
            numbers = tl.join(even, tl.join(_byte(words, 1, dtype), _byte(words, 3, dtype)))
    elif COUNT == 16:
        numbers = tl.join(_four(words, 0, 2, BITS, dtype), _four(words, 1, 2, BITS, dtype))
    else:
        numbers = _four(words, 0, 1, BITS, dtype)
    wide = tl.reshape(numbers, [4, 8, S, R, B, V, 2, COUNT // 4, 2])
    return tl.reshape(tl.permute(wide, (2, 4, 1, 3, 5, 7, 0, 8, 6)), [S, 8 * B, R * V * 4 * COUNT])


@triton.jit
def _ordered(x, R: tl.constexpr, V: tl.constexpr, COUNT: tl.constexpr):
    """x (4, 8, S, R, E, 2, 8) as (S, 16, K), in the order of `_decoded`."""
    S: tl.constexpr = x.shape[2]
    wide = tl.reshape(tl.permute(x, (2, 5, 1, 3, 0, 4, 6)), [S, 16, R, 4, V, 2, COUNT // 4, 2])
    return tl.reshape(tl.permute(wide, (0, 1, 2, 4, 6, 3, 7, 5)), [S, 16, R * V * 4 * COUNT])


@triton.jit
def _parted(codes, BITS: tl.constexpr):
    """Eight codes each as four in either half of a word."""
    HALF: tl.constexpr = (1 << (4 * BITS)) - 1
    return (codes & HALF) | ((codes & (HALF << (4 * BITS))) << (16 - 4 * BITS))


@triton.jit
def _words(at, BITS: tl.constexpr, V: tl.constexpr):
    """Words (4, 8, S, R, B, V) of COUNT codes, half of them in each half; `at` their first int32, (4, 8, S, R, B)."""
    if BITS == 3:  # 32 codes fill three words: four of 8 codes are made
        a, b, c = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        first = tl.join(a, ((b >> 16) & 0xFFFF) | (c << 16))
        second = tl.join(((a >> 24) & 0xFF) | (b << 8), c >> 8)
        return _parted(tl.reshape(tl.join(first, second), [4, 8, at.shape[2], at.shape[3], at.shape[4], V]), BITS)
    else:
        return tl.load(tl.expand_dims(at, 5) + tl.arange(0, V))


@triton.jit
def _words_within(at, BITS: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr):
    """The same where what a thread has of a group ends within a word: `at` the group's first int32 of STEP."""
    begin = tl.arange(0, 4) * (V * 8 * BITS)  # bits
    low = tl.reshape(begin >> 5, [4, 1, 1, 1, 1])
    a, b = tl.load(at + low), tl.load(at + tl.minimum(low + 1, STEP - 1))
    both = a.to(tl.uint32, bitcast=True).to(tl.uint64) | (b.to(tl.uint32, bitcast=True).to(tl.uint64) << 32)
    both = both >> tl.reshape(begin & 31, [4, 1, 1, 1, 1]).to(tl.uint64)
    if V == 1:
        return _parted(tl.expand_dims(both.to(tl.int32), 5), BITS)
    else:
        return _parted(tl.join(both.to(tl.int32), (both >> (8 * BITS)).to(tl.int32)), BITS)


@triton.jit
def _next(at, BITS: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, WITHIN: tl.constexpr):
    if WITHIN:
        return _words_within(at, BITS, V, STEP)
    else:
        return _words(at, BITS, V)


@triton.jit
def _scale(scales, zeros, index, known, SYMMETRIC: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr, size):
    """Scales by their number, 0 where not `known`, and c + zeros; float32."""
    scale = tl.where(known, tl.load(scales + index).to(tl.float32), 0.0)
    if SYMMETRIC:
        zero = tl.full(index.shape, OFFSET + (1 << (BITS - 1)), tl.float32)
    else:
        byte = (index * BITS) >> 3
        word = tl.load(zeros + byte).to(tl.int32)
        if BITS == 3:  # the other widths divide a byte
            word |= tl.load(zeros + tl.minimum(byte + 1, size - 1)).to(tl.int32) << 8
        zero = ((word >> ((index * BITS) & 7)) & ((1 << BITS) - 1)).to(tl.float32) + OFFSET
    return scale, zero


@triton.jit
def _add(total, part, count, lines, columns, splits):
    """Sums of all programs that share these rows, and whether this one came last and has them."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    N: tl.constexpr = total.shape[1]
    at = part + tile * (splits * 16 * N) + lines[:, None] * N + columns[None, :]
    tl.store(at + split * (16 * N), total, cache_modifier=".cg")
    tl.debug_barrier()
    last = tl.atomic_add(count + tile, 1, sem="acq_rel") == splits - 1
    tl.debug_barrier()
    if last:
        total = tl.load(at, cache_modifier=".cg")
        for other in range(1, splits):
            total += tl.load(at + other * (16 * N), cache_modifier=".cg")
        tl.store(count + tile, 0)
    return total, last


@triton.jit(do_not_specialize=["M", "splits"])
def coded_rows(x0, x1, x2, w0, w1, w2, r0, r1, r2, y0, y1, y2, p0, p1, p2, b0, b1, b2, n0, n1, n2, k0, k1, k2,
               s0, s1, s2, M, c0, c1, c2, z0, z1, z2, g0, g1, g2, part, count, splits, RAW: tl.constexpr,
               OUT: tl.constexpr, PLACED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr, SYMMETRIC: tl.constexpr,
               BITS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, BLOCK_N: tl.constexpr,
               WARPS: tl.constexpr, DIVIDED: tl.constexpr):  # fmt: skip
    """Weights in codes: arguments as `coded` of coded.py. GROUP is 32, 64 or 128 (`shared_group`).

    COUNT: codes of a word that a thread decodes at once.
    """
    dtype: tl.constexpr = x0.dtype.element_ty
    COUNT: tl.constexpr = 8 if BITS == 3 or (BITS == 2 and GROUP == 32) else 32 // BITS
    WIDE: tl.constexpr = GROUP // COUNT // 4  # words of a thread in a row's group
    V: tl.constexpr = 4 if WIDE > 4 else WIDE
    R: tl.constexpr = WIDE // V
    EACH: tl.constexpr = 3 if BITS == 3 else V  # int32 of them
    WITHIN: tl.constexpr = V * COUNT * BITS % 32 > 0  # what a thread has of a group ends within an int32
    SIXTEEN: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
    OFFSET: tl.constexpr = 0 if dtype == tl.float32 or (dtype == tl.bfloat16 and BITS == 8) else SIXTEEN
    STEP: tl.constexpr = GROUP * BITS // 32
    B: tl.constexpr = BLOCK_N // 8
    H: tl.constexpr = BLOCK_N // 32 if BLOCK_N > 32 else 1
    block, split = tl.program_id(0) // splits, tl.program_id(0) % splits
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
    groups = k // GROUP
    per = groups // g
    size = (n * g * BITS + 7) // 8
    share = tl.cdiv(groups, splits)
    begin = split * share
    end = tl.minimum(begin + share, groups)
    warp = begin + tl.arange(0, WARPS)
    # Axes: threads of a row (4), rows (8), warps (S), then what one thread has. The compiler gives threads to axes in
    # this order, the last one aside, which is contiguous in memory: so a warp has rows and inputs of its own.
    quad, eight = tl.arange(0, 4), tl.arange(0, 8)
    rows = block * BLOCK_N + tl.arange(0, B)[None, :] * 8 + eight[:, None]  # (8, B)
    real = tl.minimum(rows, n - 1).to(tl.int64) * (groups * STEP)
    inside = (tl.arange(0, R)[None, :] * 4 + quad[:, None]) * (0 if WITHIN else EACH)  # (4, R)
    codes = w + (real[None, :, None, None, :] + inside[:, None, None, :, None])  # (4, 8, 1, R, B)
    taken = (tl.arange(0, R)[None, :, None, None] * 4 + quad[:, None, None, None]) * (V * COUNT)
    taken += tl.arange(0, V * COUNT // 8)[None, None, :, None] * 8 + eight[None, None, None, :]  # (4, R, E, 8)
    line = tl.minimum(tl.arange(0, 2)[None, :] * 8 + eight[:, None], M - 1)  # (8, 2)
    inputs = x + (line[None, :, None, None, None, :, None] * k + taken[:, None, None, :, :, None, :])
    # Scales (N / H, S, H): 32 rows are a warp's threads.
    among = tl.arange(0, H)[None, None, :] * (BLOCK_N // H) + tl.arange(0, BLOCK_N // H)[:, None, None]
    owner = tl.minimum(block * BLOCK_N + among, n - 1) * g  # (N / H, 1, H)
    if PDL == 1:
        gdc_wait()
        gdc_launch_dependents()
    at = tl.minimum(warp, groups - 1)
    words = _next(codes + (at * STEP)[None, None, :, None, None], BITS, V, STEP, WITHIN)
    index = owner + (at // per if SHARED else at)[None, :, None]
    scale, zero = _scale(scales, zeros, index, (warp < end)[None, :, None], SYMMETRIC, BITS, OFFSET, size)
    if PDL == 2:
        gdc_wait()
        gdc_launch_dependents()
    given = tl.load(inputs + (at * GROUP)[None, None, :, None, None, None, None])
    ones = tl.full([WARPS, GROUP, 4], 1.0, dtype)
    ones = tl.reshape(tl.join(ones, ones), [WARPS, GROUP, 8])
    total = tl.zeros([WARPS, 16, BLOCK_N], tl.float32)
    for start in tl.range(begin, end, WARPS, num_stages=1):
        # What the next turn needs is on its way while this one is computed.
        then = warp + (start - begin) + WARPS
        at = tl.minimum(then, groups - 1)
        words_after = _next(codes + (at * STEP)[None, None, :, None, None], BITS, V, STEP, WITHIN)
        index = owner + (at // per if SHARED else at)[None, :, None]
        scale_after, zero_after = _scale(scales, zeros, index, (then < end)[None, :, None], SYMMETRIC, BITS, OFFSET, size)  # noqa: E501  # fmt: skip
        given_after = tl.load(inputs + (at * GROUP)[None, None, :, None, None, None, None])
        lines_x = _ordered(given, R, V, COUNT)
        found = tl.dot(lines_x, tl.permute(_decoded(words, BITS, COUNT, dtype), (0, 2, 1)), input_precision="ieee")
        seen = tl.dot(lines_x, ones, input_precision="ieee")  # (S, 16, 8), all columns alike
        seen = tl.reshape(tl.broadcast_to(tl.expand_dims(seen, 2), [WARPS, 16, B, 8]), [WARPS, 16, BLOCK_N])
        scale = tl.reshape(tl.permute(scale, (1, 2, 0)), [WARPS, 1, BLOCK_N])
        zero = tl.reshape(tl.permute(zero, (1, 2, 0)), [WARPS, 1, BLOCK_N])
        total += scale * (found - zero * seen)
        words, scale, zero, given = words_after, scale_after, zero_after, given_after
    value = tl.sum(total, 0)
    lines, columns = tl.arange(0, 16), tl.arange(0, BLOCK_N)
    if DIVIDED:
        value, last = _add(value, part, count, lines, columns, splits)
        if last:
            keep(value, lines, block * BLOCK_N + columns, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)
    else:
        keep(value, lines, block * BLOCK_N + columns, M, n, raw, y, place, bias, stride, RAW, OUT, PLACED, BIAS)
