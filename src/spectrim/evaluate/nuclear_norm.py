"""Matrix Nuclear-Norm of hidden states (arXiv 2410.10672): how many directions a model's representation uses.

    R   last hidden states (m tokens, d) of one text, column means subtracted, each row of length 1
    c_j length of column j                  MNN = sum of the largest min(m, d) of c_j, over m      the paper's, O(m d)
                                            exact = sum of the singular values of R, over m        O(m d min(m, d))

The first stands for the second since sum c_j (all d of them: the L1,2 norm) is at least the nuclear norm; with fewer
columns than d it bounds nothing. **It is no stand-in that may be trusted**: it changes under a rotation of the hidden
space, under which the nuclear norm stays, and along the training of a small model the two were seen to move in opposite
directions. Both are given here, always. Both depend on m: texts of one length only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class NuclearNorm:
    """Means over texts."""

    proxy: float
    exact: float
    tokens: int
    texts: int


def centred_rows(hidden: Tensor) -> Tensor:
    """R (m, d) in float64 of hidden states (m, d); a row that is nothing but the mean stays 0."""
    wide = hidden.double()
    centred = wide - wide.mean(0)
    length = centred.norm(dim=1, keepdim=True)
    return centred / length.where(length > 0, 1.0)


def proxy_norm(hidden: Tensor) -> float:
    """The paper's figure of hidden states (m, d)."""
    rows = centred_rows(_checked(hidden))
    return float(rows.norm(dim=0).topk(min(rows.shape)).values.sum()) / len(rows)


def exact_norm(hidden: Tensor) -> float:
    """The nuclear norm over m, of the same matrix."""
    rows = centred_rows(_checked(hidden))
    return float(torch.linalg.svdvals(rows).sum()) / len(rows)


def nuclear_norm(texts: list[Tensor]) -> NuclearNorm:
    """Both, over the hidden states (m, d) of several texts of one length."""
    if len({len(hidden) for hidden in texts}) != 1:
        raise UsageError("nuclear-norm needs texts of one length: the figure depends on it")
    count = len(texts)
    return NuclearNorm(
        proxy=sum(map(proxy_norm, texts)) / count,
        exact=sum(map(exact_norm, texts)) / count,
        tokens=len(texts[0]),
        texts=count,
    )


def _checked(hidden: Tensor) -> Tensor:
    if hidden.ndim != 2 or len(hidden) < 2:
        raise UsageError(f"hidden states of at least two tokens (m, d) are needed, got shape {tuple(hidden.shape)}")
    return hidden
