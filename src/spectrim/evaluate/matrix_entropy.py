"""Matrix entropy of hidden states: von Neumann entropy of their normalised Gram matrix (companion of arXiv 2410.10672).

    Z   last hidden states (m tokens, d) of one text, column means subtracted, each row of length 1
    A = Z^T Z / tr(Z^T Z),  l its eigenvalues        entropy = - sum l log l / log d        in [0, 1]

1: all d directions are used alike; 0: one of them. At most log min(m, d) / log d of it can be reached, so texts must be
of one length to be compared, and long ones. "Compresses better, so its entropy is lower" was seen across the sizes of
one family; it is no measure of quality, and a damaged model can move it either way: read it beside perplexity.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import UsageError
from spectrim.evaluate.nuclear_norm import centred_rows


@dataclass(frozen=True, kw_only=True)
class MatrixEntropy:
    """Mean over texts, and the largest that texts of this length can have."""

    entropy: float
    reachable: float
    tokens: int
    texts: int


def entropy_of(hidden: Tensor) -> float:
    """Of hidden states (m, d); the eigenvalues are squared singular values, which saves the d x d matrix."""
    if hidden.ndim != 2 or len(hidden) < 2 or hidden.shape[1] < 2:
        raise UsageError(f"hidden states (m, d) with m, d of at least 2 are needed, got shape {tuple(hidden.shape)}")
    values = torch.linalg.svdvals(centred_rows(hidden)).square()
    total = float(values.sum())
    if total == 0:
        return 0.0  # all tokens alike: one direction, the mean, and nothing else
    shares = values / total
    return float(-torch.xlogy(shares, shares).sum()) / math.log(hidden.shape[1])


def matrix_entropy(texts: list[Tensor]) -> MatrixEntropy:
    """Over the hidden states (m, d) of several texts of one length."""
    if len({len(hidden) for hidden in texts}) != 1:
        raise UsageError("entropy needs texts of one length: the figure depends on it")
    tokens, width = texts[0].shape
    return MatrixEntropy(
        entropy=sum(map(entropy_of, texts)) / len(texts),
        reachable=min(1.0, math.log(min(tokens - 1, width)) / math.log(width)) if tokens > 2 else 0.0,
        tokens=tokens,
        texts=len(texts),
    )
