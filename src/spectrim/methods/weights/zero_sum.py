"""Zero-Sum SVD (mint-vu/Zero-Sum-SVD on GitHub, May 2026): one budget for all layers, by signed changes of the loss.

    1. W S = U diag(s) V^T with S S^T = E[x x^T]                                    as in svd-llm
    2. G = E[dL/dW] on the calibration text;  D_i = -s_i u_i^T G S^-T v_i = -<G, component i>
       the first-order change of the loss when component i goes, of either sign
    3. components of all layers go, the last of a layer first: always the least |D| among those whose sign is against
       the sum of what went, so that the sum of changes stays near zero, until the budget is met

A layer saves nothing until two factors take less than its weight, and stays dense if it ends before. This is the
method in one stage, its default; the authors advise six at strong compression, each with a correction along the
gradient. Written from its formulas. The gradient of a trained model is small, and noisy on few windows.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from spectrim.linalg.factor import Spectrum, decompose
from spectrim.linalg.metric import root_of
from spectrim.method import MethodInfo, OrderedMethod
from spectrim.stats import Stat, Stats


@dataclass(frozen=True, kw_only=True)
class ZeroSum(OrderedMethod):
    """Whitened SVD whose ranks keep the first-order change of the loss at zero."""

    info: ClassVar = MethodInfo(
        name="zero-sum",
        family="weights",
        paper="mint-vu/Zero-Sum-SVD 2026",
        promise="whitened SVD, ranks that keep the loss's first-order change at zero",
    )
    needs: ClassVar = frozenset({Stat.GRAM, Stat.SLOPE})
    optimal_in_gram: ClassVar = True

    def decompose(self, weight: Tensor, stats: Stats) -> Spectrum:
        """Components in the metric of the input Gram."""
        return decompose(weight, right=root_of(stats.get(Stat.GRAM)))

    def prices(self, weight: Tensor, spectrum: Spectrum, stats: Stats) -> Tensor:
        """D (K,)."""
        return -((spectrum.left.mT @ stats.get(Stat.SLOPE)) * spectrum.right).sum(1)

    def removal_order(self, prices: Sequence[Tensor]) -> list[int]:
        """Step 3, to the end. Where only one sign is left, it goes on with that."""
        changes = [price.tolist() for price in prices]
        heaps: dict[bool, list[tuple[float, int]]] = {False: [], True: []}

        def offer(layer: int) -> None:
            if changes[layer]:
                last = changes[layer][-1]
                heapq.heappush(heaps[last > 0], (abs(last), layer))

        for layer in range(len(changes)):
            offer(layer)
        order, total = [], 0.0
        while heaps[True] or heaps[False]:
            wanted = heaps[total <= 0] or heaps[total > 0]
            _, layer = heapq.heappop(wanted)
            total += changes[layer].pop()
            order.append(layer)
            offer(layer)
        return order
