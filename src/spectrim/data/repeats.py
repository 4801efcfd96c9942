"""How much of a text of tokens occurs twice: inside itself, or in another text."""

import torch
from torch import Tensor

RUN_TOKENS = 16
"""Tokens in a row that count as the same text. Shorter runs are common phrases."""
LARGEST_OVERLAP = 0.05
SMALLEST_VARIETY = 0.1
"""Shares of runs at which a text is warned about. Licence headers and imports repeat in any honest text of code."""


def runs_of(ids: Tensor) -> Tensor:
    """One number for each run of RUN_TOKENS inside a window of ids (windows, length): equal for equal runs."""
    if ids.shape[1] < RUN_TOKENS:
        return torch.empty(0, dtype=torch.int64)
    count = ids.shape[1] - RUN_TOKENS + 1
    total = torch.zeros(len(ids), count, dtype=torch.int64)
    for place in range(RUN_TOKENS):  # int64 wraps around: a polynomial hash modulo 2^64
        total = total * 6_364_136_223_846_793_005 + (ids[:, place : place + count] + 1)
    return total.flatten()


def variety(ids: Tensor) -> float:
    """Share of runs that are different ones, 1 for a text that never repeats itself."""
    runs = runs_of(ids)
    return 1.0 if not len(runs) else len(runs.unique()) / len(runs)


def overlap(ids: Tensor, other: Tensor) -> float:
    """Share of the runs of `ids` that occur in `other`."""
    runs = runs_of(ids)
    return float(torch.isin(runs, runs_of(other)).double().mean()) if len(runs) else 0.0


def text_warnings(calibration: Tensor, evaluation: Tensor | None, training: Tensor | None = None) -> list[str]:
    """What to say about a text that repeats itself, and about one that holds the text it is judged on."""
    found = []
    different = variety(calibration)
    if different < SMALLEST_VARIETY:
        found.append(
            f"the calibration text repeats itself: {different:.1%} of its runs of {RUN_TOKENS} tokens are different "
            "ones; more varied text gives a better result"
        )
    if evaluation is not None:
        seen = [overlap(evaluation, ids) for ids in (calibration, training) if ids is not None]
        if max(seen) > LARGEST_OVERLAP:
            found.append(
                f"{max(seen):.1%} of the evaluation text's runs of {RUN_TOKENS} tokens occur in the text that the "
                "result was made with: the figures flatter it; evaluate on other text"
            )
    return found
