"""Triton: queries or keys turned by their positions, in one pass over them.

    y0 = x0 c0 - x1 s0        x0, x1: the halves of one head at one position; c, s: cos and sin of its angles, by half
    y1 = x1 c1 + x0 s1

and, on the way back, what gives the gradient by x from that by y:

    x0 = y0 c0 + y1 s1
    x1 = y1 c1 - y0 s0

One program a position and some of its heads. Every product is rounded to the dtype of x before the two are added, as
single steps of torch round it: the results are theirs bit for bit. That takes a launch with `enable_fp_fusion=False`.
By itself the compiler makes products and sums in 16 bits of those written here, which is the same, and then one `fma`
of both, which leaves out the rounding between them: in bf16 on an H200 results differed by up to 0.03125, one unit in
the last place of numbers between 4 and 8.
"""

import triton  # pyright: ignore[reportMissingImports]  # not in builds of torch for the CPU
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def rotate(x, cos, sin, y, S, heads, half, x_b, x_h, x_s, y_b, y_h, y_s, c_b, c_s, s_b, s_s,
           BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    """x and y (B, heads, S, 2 half), cos and sin (B or 1, S, 2 half); strides in numbers, the last ones are 1."""
    place = tl.program_id(0).to(tl.int64)
    b, s = place // S, place % S
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    there = column < half
    inside = (head < heads)[:, None] & there[None, :]
    wide = x.dtype.element_ty

    angle = cos + b * c_b + s * c_s + column
    c0 = tl.load(angle, mask=there, other=0.0).to(tl.float32)[None, :]
    c1 = tl.load(angle + half, mask=there, other=0.0).to(tl.float32)[None, :]
    angle = sin + b * s_b + s * s_s + column
    s0 = tl.load(angle, mask=there, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(angle + half, mask=there, other=0.0).to(tl.float32)[None, :]
    if BACK:
        t0, t1 = s1, -s0
    else:
        t0, t1 = -s0, s1

    given = x + b * x_b + s * x_s + head[:, None].to(tl.int64) * x_h + column[None, :]
    x0 = tl.load(given, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(given + half, mask=inside, other=0.0).to(tl.float32)
    y0 = (x0 * c0).to(wide).to(tl.float32) + (x1 * t0).to(wide).to(tl.float32)
    y1 = (x1 * c1).to(wide).to(tl.float32) + (x0 * t1).to(wide).to(tl.float32)
    result = y + b * y_b + s * y_s + head[:, None].to(tl.int64) * y_h + column[None, :]
    tl.store(result, y0.to(wide), mask=inside)
    tl.store(result + half, y1.to(wide), mask=inside)
