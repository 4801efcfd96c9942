"""The layer in which factors are trained: a low-rank weight in the coordinates of a metric.

    W' = left right,   left = D_l U (O, R),   right = V D_r (R, I)          D_l, D_r frozen; U, V trained

With roots L L^T = E[g g^T] and R R^T = E[x x^T] and D_l = L^-T, D_r = R^-1, an error of U V has the loss 1/2 |E|^2 to
second order: every direction is as steep as any other up to the singular values, which are the columns of U and the
rows of V (balanced: U = P s^1/2, V = s^1/2 Q^T). An optimiser with one rate for each number (Adam) then has little
left to correct. Without a metric (D_l, D_r multiples of 1) they are balanced factors of the weight itself.

U, V and the bias are scaled to entries of root mean square 1: one learning rate is then relative for every layer
of every model.

Layers that share V (`spectral_group`) are one stacked product: balanced together, one V for all, trained once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.linalg.factor import Factors, balance, wide_product
from spectrim.linalg.metric import Root

ALIGNED = 16
"""Ranks are padded to a multiple of this with zero columns while training: odd widths miss the fast matrix kernels
(29 ms to 19 ms a step on an H100). A zero column of U beside a zero row of V has zero gradients and stays zero."""


ZERO_BIAS = 0.01
"""The scale on which a bias of zeros is trained."""


class SpectralLinear(nn.Module):
    """A linear layer whose weight is trained as a rank-R product in the coordinates of a metric."""

    U: nn.Parameter
    V: nn.Parameter
    from_left: Tensor | None
    from_right: Tensor | None

    def __init__(
        self,
        factors: Factors,
        bias: Tensor | None,
        left: Root | None = None,
        right: Root | None = None,
        *,
        balanced: bool = False,
    ) -> None:
        """`factors` (float64) of the weight; `left` (O, O) and `right` (I, I) are roots of the metric, None for 1.

        `balanced` ones are in the coordinates of the metric already.
        """
        super().__init__()
        u, v = factors if balanced else balance(measured(factors, left, right))
        self._hold_left(u, left)
        self.in_features = v.shape[1]
        self.right_scale = _root_mean_square(v)
        self.V = nn.Parameter(F.pad(v / self.right_scale, (0, 0, 0, -self.rank % ALIGNED)).float().contiguous())
        self.register_buffer("from_right", None if right is None else right.dual.mT.float().contiguous(), False)
        self._hold_bias(bias)

    def _hold_left(self, u: Tensor, left: Root | None) -> None:
        self.out_features, self.rank = u.shape
        self.left_scale = _root_mean_square(u)
        self.U = nn.Parameter(F.pad(u / self.left_scale, (0, -self.rank % ALIGNED)).float().contiguous())
        self.register_buffer("from_left", None if left is None else left.dual.float(), persistent=False)

    def _hold_bias(self, bias: Tensor | None) -> None:
        self.bias_scale = 1.0 if bias is None else _root_mean_square(bias.detach().double(), of_zero=ZERO_BIAS)
        self.bias = None if bias is None else nn.Parameter((bias.detach() / self.bias_scale).float().clone())

    def factors_now(self) -> tuple[Tensor, Tensor]:
        """left (O, R') and right (R', I) of the weight, R' the padded rank."""
        left = self.U * self.left_scale
        return (left if self.from_left is None else wide_product(self.from_left, left)), self.right_now()

    def right_now(self) -> Tensor:
        """right (R', I)."""
        right = self.V * self.right_scale
        return right if self.from_right is None else wide_product(right, self.from_right)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., I) to (..., O)."""
        left, right = self.factors_now()
        return F.linear(F.linear(x, right), left, self.bias_now())

    def bias_now(self) -> Tensor | None:
        """The bias (O,) in its own units."""
        return None if self.bias is None else self.bias * self.bias_scale

    @torch.no_grad()
    def trained(self) -> tuple[Factors, Tensor | None]:
        """The factors of the weight, float64, without the padding; and the bias."""
        left = self.U[:, : self.rank].double() * self.left_scale
        if self.from_left is not None:
            left = self.from_left.double() @ left
        bias = None if self.bias is None else self.bias.double() * self.bias_scale
        return Factors(left, self.right_trained()), bias

    @torch.no_grad()
    def right_trained(self) -> Tensor:
        """right (R, I), float64."""
        right = self.V[: self.rank].double() * self.right_scale
        return right if self.from_right is None else right @ self.from_right.double()


class BorrowingSpectralLinear(SpectralLinear):
    """One whose right factor is that of another, which trains it for both."""

    def __init__(self, u: Tensor, bias: Tensor | None, left: Root | None, owner: SpectralLinear) -> None:
        """`u` (O, R): its part of the balanced left factor."""
        nn.Module.__init__(self)
        self._hold_left(u, left)
        self._hold_bias(bias)
        self._owner = (owner,)  # in a tuple: nn.Module takes no notice of what is inside
        self.in_features = owner.in_features

    def right_now(self) -> Tensor:
        """right (R', I)."""
        return self._owner[0].right_now()

    def right_trained(self) -> Tensor:
        """right (R, I), float64."""
        return self._owner[0].right_trained()


def spectral_group(
    factors: Sequence[Factors], biases: Sequence[Tensor | None], lefts: Sequence[Root | None], right: Root | None
) -> list[SpectralLinear]:
    """Layers with one right factor (float64), the first of which trains it; `lefts` (O_l, O_l), `right` (I, I)."""
    parts = [measured(own, left, right) for own, left in zip(factors, lefts, strict=True)]
    u, v = balance(Factors(torch.cat([own.left for own in parts]), parts[0].right))
    first, *others = u.split([len(own.left) for own in parts])
    owner = SpectralLinear(Factors(first, v), biases[0], lefts[0], right, balanced=True)
    return [owner, *(BorrowingSpectralLinear(*own, owner) for own in zip(others, biases[1:], lefts[1:], strict=True))]


def measured(factors: Factors, left: Root | None, right: Root | None) -> Factors:
    """The same in the coordinates of a metric: L^T left, right R."""
    return Factors(
        factors.left if left is None else left.root.mT @ factors.left,
        factors.right if right is None else factors.right @ right.root,
    )


def _root_mean_square(x: Tensor, *, of_zero: float = 1.0) -> float:
    """`of_zero` for a tensor of zeros; the scale of an all-zero factor does not matter."""
    value = float(x.square().mean().sqrt())
    return value if value > 0 else of_zero
