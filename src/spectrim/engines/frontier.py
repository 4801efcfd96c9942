"""What other budgets would lose: the menus that one budget was chosen from, priced at many."""

from collections.abc import Sequence

from spectrim.linalg.allocate import Options
from spectrim.linalg.bits import VALUE_BYTES, bias_account
from spectrim.linalg.knapsack import frontier
from spectrim.models.walk import Walk


def predicted_frontier(walk: Walk, menus: Sequence[Options], *, fixed: int = 0) -> list[dict[str, float]]:
    """`keep` of the bytes (biases and `fixed` bytes in it) and `predicted` loss of the choice that one price finds.

    Losses are the sums that the method chooses by, in its own unit; bytes are of what all weights take in 16 bits.
    """
    whole = walk.numbers * VALUE_BYTES
    beside = fixed + sum(bias_account(la.outputs, bias=la.has_bias).total for la in walk.layers)
    points = frontier(list(menus), whole - beside)
    return [{"keep": (point.cost + beside) / whole, "predicted": point.error} for point in points]
