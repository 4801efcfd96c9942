"""Golden numbers of the closed forms of basis-sharing and lpaf on fixed synthetic weights, to six digits.

As in test_golden.py; after a wanted change:  python tests/golden/test_shared_pruned.py --write
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectrim.linalg.factor import truncate
from spectrim.linalg.movement import sparse_spectrum, strongest
from spectrim.linalg.shared import fitted, shared_factors

FILE = Path(__file__).with_name("shared_pruned.json")
COMMAND = "python tests/golden/test_shared_pruned.py --write"
OUTPUTS, INPUTS, TOKENS = (48, 40), 32, 512
RANKS = (4, 12, 24)


def layers() -> list[tuple[Tensor, Tensor]]:
    """Two weights with decaying spectra and a common part, and the Gram matrices of their inputs; float64."""
    generator = torch.Generator().manual_seed(24_100_376)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = 0.9 ** torch.arange(INPUTS, dtype=torch.float64)
    common, mixing = normal(INPUTS, INPUTS), normal(INPUTS, INPUTS)
    found = []
    for outputs in OUTPUTS:
        weight = (normal(outputs, INPUTS) * decay) @ (common + 0.5 * normal(INPUTS, INPUTS))
        x = (normal(TOKENS, INPUTS) * decay.sqrt()) @ (mixing + 0.5 * normal(INPUTS, INPUTS))
        found.append((weight, x.mT @ x / TOKENS))
    return found


def lost(weight: Tensor, small: Tensor, gram: Tensor) -> float:
    """Share of the outputs' size that is lost."""
    difference = weight - small
    return float(f"{float((difference @ gram * difference).sum() / (weight @ gram * weight).sum()):.6g}")


def measured() -> dict[str, dict[str, float]]:
    """By method and layer, then by rank."""
    table: dict[str, dict[str, float]] = {}
    (one, gram_one), (other, gram_other) = layers()
    for rank in RANKS:
        found = shared_factors([one, other], (gram_one + gram_other) / 2, rank)
        for place, (weight, gram) in enumerate(layers()):
            pooled, own = found.coefficients[place], fitted(weight, found.basis, gram)
            for fit, coefficients in (("pooled", pooled), ("own", own)):
                key = f"basis-sharing fit={fit}, layer {place}"
                table.setdefault(key, {})[str(rank)] = lost(weight, coefficients @ found.basis, gram)
        mask = strongest(one.abs(), 0.7)
        for weigh in (True, False):
            cut = truncate(sparse_spectrum(one, mask, weigh=weigh), rank)
            key = f"lpaf weigh={str(weigh).lower()}, sparsity 0.7 by size"
            table.setdefault(key, {})[str(rank)] = lost(one * mask, cut.left @ cut.right, gram_one)
    return table


@pytest.mark.golden
def test_errors_are_the_recorded_ones():
    recorded, now = json.loads(FILE.read_text(encoding="utf-8"))["relative_error"], measured()
    assert set(now) == set(recorded)
    for label, values in now.items():
        assert values == pytest.approx(recorded[label], rel=1e-5), f"{label}; if wanted: {COMMAND}"


@pytest.mark.golden
def test_recorded_errors_are_in_the_order_that_theory_demands():
    table = json.loads(FILE.read_text(encoding="utf-8"))["relative_error"]
    for place in range(len(OUTPUTS)):
        own, pooled = (table[f"basis-sharing fit={fit}, layer {place}"] for fit in ("own", "pooled"))
        assert all(own[str(rank)] < pooled[str(rank)] for rank in RANKS)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    about = f"Written by `{COMMAND}`. Layers {OUTPUTS} x {INPUTS}, {TOKENS} tokens, float64; by method and rank."
    FILE.write_text(json.dumps({"about": about, "relative_error": measured()}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
