"""Streaming sums over calibration tokens, from which every metric is made.

Products are formed in float32 over at most `CHUNK` tokens and added in float64: the float32 error of one product is
averaged out, the running sum loses nothing. (Gram matrices accumulated in float32 alone had negative eigenvalues
once activations spread over four decades.)

Hooks run inside the autocast of the pass that calls them, which would turn these products into bf16: it is switched
off here, at the sums themselves, so that no caller can forget it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 4096
TENSOR_CHUNK, TENSOR_SIDE = 65_536, 1024
"""Tokens in one product on tensor cores, and the least width that is worth it."""
STRIP, STRIPS, ALIGNED = 1376, 4, 64
"""Rows of a strip of a symmetric product, and into how many it is cut where each has TENSOR_SIDE rows (measured: 4 of
4096 and 8 of 11008 are the fastest; benchmarks/scale_drivers.py). Strips begin at multiples of ALIGNED bytes: three of
4096 inputs, 1,366 rows each, took three times as long as four."""


def full_precision(device: torch.device) -> torch.autocast:
    """A context in which products on this device keep the precision of what is multiplied."""
    return torch.autocast(device.type, enabled=False)


def add_gram(total: Tensor, rows: Tensor, other: Tensor | None = None, *, upper: bool = False) -> None:
    """`total += rows^T other` in place. rows (N, n), other (N, m) or the same, total (n, m) in float64.

    With `upper`, what is below the diagonal may be left as it was, until `mirror` puts it there: adding it to each sum
    in turn takes a GPU as long as the product.

    Rows in bf16 on a GPU are multiplied on its tensor cores: products of bf16 numbers are exact in float32, in which
    they are added, as they are in the other way; it is eight times as fast.
    """
    with full_precision(total.device):
        if rows.is_cuda and rows.dtype == torch.bfloat16 and min(total.shape) >= TENSOR_SIDE:
            second = rows if other is None else other.to(rows.dtype)
            _add_gram_of_bf16(total, rows, second, symmetric=other is None, upper=upper)
            return
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK].float()
            second = part if other is None else other[start : start + CHUNK].float()
            total += part.mT @ second


def mirror(total: Tensor) -> None:
    """What is above the diagonal of a matrix (n, n) put below it too, in place."""
    for low in range(0, len(total), STRIP):
        high = low + STRIP
        diagonal = total[low:high, low:high]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).mT)
        total[high:, low:high] = total[low:high, high:].mT


def _add_gram_of_bf16(total: Tensor, rows: Tensor, other: Tensor, *, symmetric: bool, upper: bool = False) -> None:
    """A symmetric product is formed in strips above the diagonal: little more than half of the work for many strips."""
    for start in range(0, len(rows), TENSOR_CHUNK):
        part, second = rows[start : start + TENSOR_CHUNK], other[start : start + TENSOR_CHUNK]
        if not symmetric:
            total += _product_in_float32(part.mT, second)
            continue
        step = strip_rows(len(total))
        for low in range(0, len(total), step):
            high = low + step
            strip = _product_in_float32(part[:, low:high].mT, second[:, low:])
            total[low:high, low:] += strip
            if not upper:
                total[high:, low:high] += strip[:, step:].mT


def strip_rows(width: int) -> int:
    """Rows of one strip of a symmetric product (width, width) of bf16 rows."""
    count = max(-(-width // STRIP), min(STRIPS, width // TENSOR_SIDE), 1)
    unit = ALIGNED // 2  # bf16
    return -(-width // (count * unit)) * unit


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of bf16 matrices on a GPU, added and given in float32."""
    return torch.mm(a, b, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]


def add_squares(total: Tensor, gradients: Tensor, inputs: Tensor) -> None:
    """Diagonal Fisher: `total += sum over sequences of (sum over tokens g x^T)^2`, elementwise.

    gradients (B, S, O), inputs (B, S, I), total (O, I) in float64.
    """
    with full_precision(total.device):
        for gradient, rows in zip(gradients, inputs, strict=True):
            total += (gradient.float().mT @ rows.float()).square()


class Coupled(NamedTuple):
    """Sums for one step of the alternation, float64; `overlap` is a 0-dimensional tensor."""

    input: Tensor  # (I, I)  sum over sequences of  G^T B0^-1 G / O
    output: Tensor  # (O, O)  sum over sequences of  G A0^-1 G^T / I
    overlap: Tensor  # ()     sum over sequences of  tr(A0^-1 G^T B0^-1 G) / (O I)

    def finish(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The new pair (A, B), per token.

        Each of the two new factors, paired with the *old* other one, already carries the size of the whole. It would
        count twice in A (x) B, so B is divided by c = E[tr(A0^-1 G^T B0^-1 G)] / (O I), which is 1 where tokens are
        independent: the pair then has the mean curvature, seen from (A0, B0), of what was measured.
        """
        a, b = self.input / tokens, self.output / self.overlap
        return (a + a.mT) / 2, (b + b.mT) / 2


def add_coupled(total: Coupled, gradients: Tensor, inputs: Tensor, a_inverse: Tensor, b_inverse: Tensor) -> None:
    """One step of the alternation for the Kronecker factors of the Fisher matrix, token correlations included.

    gradients (B, S, O), inputs (B, S, I), a_inverse (I, I) and b_inverse (O, O) in float32; with the gradient of a
    whole sequence at the weight, G = sum over its tokens of g x^T (O, I):

        A = E[G^T B0^-1 G] / O,   B = E[G A0^-1 G^T] / I

    Repeated until nothing moves, it gives the maximum-likelihood factors of a matrix normal G (the flip-flop of
    Dutilleul 1999), which is the A (x) B nearest to E[vec G vec G^T] in Kullback-Leibler divergence. K-FAC (Martens and
    Grosse 2015) takes E[x x^T] and E[g g^T], as if the terms of G were independent of each other and g of x.
    """
    outputs, columns, length = gradients.shape[-1], inputs.shape[-1], gradients.shape[1]
    weights, tokens = _costs(outputs, columns, length)
    add = _add_through_weights if weights < tokens else _add_through_tokens
    count = max(1, CHUNK // max(outputs, columns, length))
    with full_precision(total.input.device):
        for g, x in zip(gradients.float().split(count), inputs.float().split(count), strict=True):
            add(total, g, x, a_inverse, b_inverse)


HALF_TRUST = 40
"""Windows at which a coupled covariance counts as much as the plain one; see `window_share`. Chosen on builtin:tiny,
where 16 windows made the coupled pair worse than the plain one, 64 better (docs/log.md); 256 still count for 0.98."""


def window_share(windows: int) -> float:
    """How much of a coupled covariance to take after this many windows, in [0, 1): N^2 / (N^2 + HALF_TRUST^2).

    Each window gives one G, and nothing averages over tokens: the squared error of A is v / N, with v the variance of
    G^T B0^-1 G / O. The plain A0 has many more samples, and a bias d that no number of them takes away. The mix
    (1 - s) A0 + s A has the squared error (1 - s)^2 d^2 + s^2 v / N, least at s = 1 / (1 + v / (N d^2)): Ledoit and
    Wolf's (2004) argument, with A0 in the place of the identity. v is not fixed: B0^-1 comes from the same windows, and
    its own error of order 1 / N multiplies that of G. Where windows are few, so that s matters, v / N falls as 1 / N^2.
    """
    return windows**2 / (windows**2 + HALF_TRUST**2)


def toward(plain: Tensor, coupled: Tensor, share: float) -> Tensor:
    """A covariance (n, n) between two: directions mixed at equal trace, `share` of them from `coupled`; then the size.

    A coupled covariance is larger than the plain one where tokens are correlated. Mixed as they are, it would take
    more than its share. The size goes from one trace to the other by the same share, in logarithms. 0 gives `plain`,
    1 `coupled`, both of which must have a positive trace.
    """
    ratio = coupled.diagonal().sum() / plain.diagonal().sum()
    return ratio**share * ((1 - share) * plain + share / ratio * coupled)


def coupling_operations(outputs: int, inputs: int, length: int) -> int:
    """Floating-point operations of `add_coupled` for one sequence of this length."""
    return min(_costs(outputs, inputs, length))


def _costs(outputs: int, inputs: int, length: int) -> tuple[int, int]:
    """Operations through weights and through tokens."""
    through_weights = 2 * length * outputs * inputs + 4 * outputs * inputs * (outputs + inputs)
    return through_weights, 4 * length * (outputs**2 + inputs**2) + 4 * length**2 * (outputs + inputs)


def _add_through_weights(total: Coupled, g: Tensor, x: Tensor, a_inverse: Tensor, b_inverse: Tensor) -> None:
    """From the gradients G at the weight, (B, O, I): the fewer operations for long sequences."""
    outputs, columns = g.shape[-1], x.shape[-1]
    whole = g.mT @ x
    left, right = b_inverse @ whole, whole @ a_inverse
    total.input.add_(left.flatten(0, 1).mT @ whole.flatten(0, 1), alpha=1 / outputs)
    total.output.add_(_side_by_side(right) @ _side_by_side(whole).mT, alpha=1 / columns)
    total.overlap.add_((left * right).sum(dtype=torch.float64), alpha=1 / (outputs * columns))


def _add_through_tokens(total: Coupled, g: Tensor, x: Tensor, a_inverse: Tensor, b_inverse: Tensor) -> None:
    """The same from what each token has in common with each other one, (B, S, S): g^T B0^-1 g' and x^T A0^-1 x'."""
    outputs, columns = g.shape[-1], x.shape[-1]
    of_gradients, of_inputs = g @ b_inverse @ g.mT, x @ a_inverse @ x.mT
    total.input.add_(x.flatten(0, 1).mT @ (of_gradients @ x).flatten(0, 1), alpha=1 / outputs)
    total.output.add_(g.flatten(0, 1).mT @ (of_inputs @ g).flatten(0, 1), alpha=1 / columns)
    total.overlap.add_((of_gradients * of_inputs).sum(dtype=torch.float64), alpha=1 / (outputs * columns))


def _side_by_side(matrices: Tensor) -> Tensor:
    """Matrices (B, O, I) as one (O, B I)."""
    return matrices.transpose(0, 1).flatten(1)


def clip_rows(rows: Tensor, *, ratio: float) -> Tensor:
    """Scale rows (N, n) whose norm exceeds `ratio` times the root mean square norm down to that norm.

    A few tokens carry gradients a hundred times the rest; unclipped they decide the whole covariance.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide).float()  # no copy of the rows in float32
    limit = ratio * norms.square().mean().sqrt()
    return rows * (limit / norms.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0).to(rows.dtype)
