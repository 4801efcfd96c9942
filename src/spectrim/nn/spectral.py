"""The layer in which factors are trained: a low-rank weight in the coordinates of a metric.

    W' = left right,   left = D_l U (O, R),   right = V D_r (R, I)          D_l, D_r frozen; U, V trained

With roots L L^T = E[g g^T] and R R^T = E[x x^T] and D_l = L^-T, D_r = R^-1, an error of U V has the loss 1/2 |E|^2 to
second order: every direction is as steep as any other up to the singular values, which are the columns of U and the
rows of V (balanced: U = P s^1/2, V = s^1/2 Q^T). An optimiser with one rate for each number (Adam) then has little
left to correct. Without a metric (D_l, D_r multiples of 1) they are balanced factors of the weight itself.

U, V and the bias are scaled to entries of root mean square 1: one learning rate is then relative for every layer
of every model.
"""

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
        self, factors: Factors, bias: Tensor | None, left: Root | None = None, right: Root | None = None
    ) -> None:
        """`factors` (float64) of the weight; `left` (O, O) and `right` (I, I) are roots of the metric, None for 1."""
        super().__init__()
        self.rank = factors.left.shape[1]
        self.out_features, self.in_features = len(factors.left), factors.right.shape[1]
        u, v = balance(
            Factors(
                factors.left if left is None else left.root.mT @ factors.left,
                factors.right if right is None else factors.right @ right.root,
            )
        )
        self.left_scale, self.right_scale = _root_mean_square(u), _root_mean_square(v)
        pad = -self.rank % ALIGNED
        self.U = nn.Parameter(F.pad(u / self.left_scale, (0, pad)).float().contiguous())
        self.V = nn.Parameter(F.pad(v / self.right_scale, (0, 0, 0, pad)).float().contiguous())
        self.register_buffer("from_left", None if left is None else left.dual.float(), persistent=False)
        self.register_buffer("from_right", None if right is None else right.dual.mT.float().contiguous(), False)
        self.bias_scale = 1.0 if bias is None else _root_mean_square(bias.detach().double(), of_zero=ZERO_BIAS)
        self.bias = None if bias is None else nn.Parameter((bias.detach() / self.bias_scale).float().clone())

    def factors_now(self) -> tuple[Tensor, Tensor]:
        """left (O, R') and right (R', I) of the weight, R' the padded rank."""
        left, right = self.U * self.left_scale, self.V * self.right_scale
        if self.from_left is not None:
            left = wide_product(self.from_left, left)
        if self.from_right is not None:
            right = wide_product(right, self.from_right)
        return left, right

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
        right = self.V[: self.rank].double() * self.right_scale
        if self.from_left is not None:
            left = self.from_left.double() @ left
        if self.from_right is not None:
            right = right @ self.from_right.double()
        return Factors(left, right), None if self.bias is None else self.bias.double() * self.bias_scale


def _root_mean_square(x: Tensor, *, of_zero: float = 1.0) -> float:
    """`of_zero` for a tensor of zeros; the scale of an all-zero factor does not matter."""
    value = float(x.square().mean().sqrt())
    return value if value > 0 else of_zero
