"""WeLore: ranks from one threshold on normalised singular values (Jaiswal et al., arXiv 2407.11239).

    1. W = U diag(s) V^T for every layer, no data;  z = (s - min s) / (max s - min s)
    2. one threshold for all layers, raised until the numbers fit: components with the least z go first
    3. layers that end below the break-even of two factors become low rank ("LRC"), the others stay dense ("N-LRC")
    4. optional: go on training the low-rank layers only (`--recover kl:STEPS` does, it trains factors and nothing else)

Layers whose spectrum has a heavy tail lose most. The paper counts ranks; here numbers count, and they fall only below
the break-even. The rule looks at each spectrum's shape alone: the largest singular value of a layer decides its scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.method import MethodInfo, OrderedMethod
from spectrim.stats import Stats


@dataclass(frozen=True, kw_only=True)
class WeLore(OrderedMethod):
    """Plain SVD with ranks from one threshold on each layer's normalised singular values."""

    info: ClassVar = MethodInfo(
        name="welore",
        family="weights",
        paper="arXiv 2407.11239",
        promise="plain SVD, ranks by one threshold on normalised singular values, no data",
    )

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Singular components of the weight itself."""
        return decompose(weight)

    def prices(self, weight: Tensor, spectrum: Spectrum, stats: Stats) -> Tensor:
        """z (K,), from 1 down to 0; a flat spectrum is all 1."""
        singular = spectrum.energy.sqrt()
        spread = singular[0] - singular[-1]
        return (singular - singular[-1]) / spread if spread > 0 else torch.ones_like(singular)

    def removal_order(self, prices: Sequence[Tensor]) -> list[int]:
        """Ascending z; of equal ones the earlier layer first."""
        layers = torch.cat([torch.full((len(price),), layer) for layer, price in enumerate(prices)])
        return layers[torch.cat(list(prices)).argsort(stable=True)].tolist()
