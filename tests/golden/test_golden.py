"""Golden numbers: the errors of every registered method on one fixed synthetic layer, to six digits.

They show a change of arithmetic that the properties allow. After a wanted change, write them anew and say so in the
changelog:  python tests/golden/test_golden.py --write
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spectrim.method import LayerMethod
from spectrim.registry import METHODS, make_method
from spectrim.replacement import Target
from spectrim.stats import Stats

FILE = Path(__file__).with_name("layer_methods.json")
COMMAND = "python tests/golden/test_golden.py --write"
OUTPUTS, INPUTS, TOKENS = 48, 32, 512
RANKS = (4, 12, 24)
VARIANTS = {"soco basis=svd": ("soco", {"basis": "svd"})}
"""Options that change the closed form, beside the defaults of every method."""


def layer() -> tuple[Tensor, Stats]:
    """A weight with a decaying spectrum, correlated inputs, and gradients with a few strong tokens; float64."""
    generator = torch.Generator().manual_seed(20_250_222)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = 0.9 ** torch.arange(INPUTS, dtype=torch.float64)
    weight = (normal(OUTPUTS, INPUTS) * decay) @ normal(INPUTS, INPUTS)
    x = (normal(TOKENS, INPUTS) * decay.sqrt()) @ normal(INPUTS, INPUTS)
    g = normal(TOKENS, OUTPUTS // 2) @ normal(OUTPUTS // 2, OUTPUTS) * normal(TOKENS, 1).exp()
    per_sequence = torch.stack([(b.mT @ a).square() for a, b in zip(x.split(32), g.split(32), strict=True)])
    stats = Stats(
        tokens=TOKENS,
        gram=x.mT @ x / TOKENS,
        mean=x.mean(0),
        mean_abs=x.abs().mean(0),
        output_grad=g.mT @ g / TOKENS,
        fisher=per_sequence.mean(0),
        slope=g.mT @ x / TOKENS,
    )
    return weight, stats


def shrunk(covariance: Tensor, ratio: float) -> Tensor:
    size = len(covariance)
    return (1 - ratio) * covariance + ratio * covariance.trace() / size * torch.eye(size, dtype=covariance.dtype)


def errors(method: LayerMethod) -> dict[str, dict[str, float]]:
    """Share of the weight's size that is lost, by rank, in the input Gram and in the default two-sided metric."""
    weight, stats = layer()
    assert stats.gram is not None
    assert stats.output_grad is not None
    a, b = shrunk(stats.gram, 0.01), shrunk(stats.output_grad, 0.2)

    def lost(difference: Tensor) -> tuple[float, float]:
        in_gram = (difference @ stats.gram * difference).sum() / (weight @ stats.gram * weight).sum()
        two_sided = ((b @ difference) * (difference @ a)).sum() / ((b @ weight) * (weight @ a)).sum()
        return float(in_gram), float(two_sided)

    table = {}
    for rank in RANKS:
        replacement = method.compress(weight, stats, Target(rank=rank, codec=method.storage))
        in_gram, two_sided = lost(weight - replacement.dense())
        table[str(rank)] = {"gram": float(f"{in_gram:.6g}"), "two_sided": float(f"{two_sided:.6g}")}
    return table


def cases() -> dict[str, LayerMethod]:
    found = {name: make_method(name) for name in METHODS}
    return found | {label: make_method(name, options=options) for label, (name, options) in VARIANTS.items()}


def measured() -> dict[str, dict[str, dict[str, float]]]:
    return {label: errors(method) for label, method in cases().items()}


def golden() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))["relative_error"]


@pytest.mark.golden
@pytest.mark.parametrize("label", [*METHODS, *VARIANTS])
def test_errors_are_the_recorded_ones(label):
    assert label in golden(), f"no golden numbers for {label}; {COMMAND}"
    recorded, now = golden()[label], errors(cases()[label])
    assert set(now) == set(recorded)
    for rank, values in now.items():
        assert values == pytest.approx(recorded[rank], rel=1e-5), f"{label} at rank {rank}; if wanted: {COMMAND}"


@pytest.mark.golden
def test_every_recorded_method_still_exists():
    assert set(golden()) == set(METHODS) | set(VARIANTS)


@pytest.mark.golden
def test_recorded_errors_are_in_the_order_that_theory_demands():
    table = golden()
    for rank in map(str, RANKS):
        assert table["svd-llm"][rank]["gram"] == min(row[rank]["gram"] for row in table.values())
        assert table["two-sided"][rank]["two_sided"] == min(row[rank]["two_sided"] for row in table.values())
        assert table["soco"][rank] == pytest.approx(table["two-sided"][rank], rel=1e-5)  # the same closed form


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    about = f"Written by `{COMMAND}`. Layer {OUTPUTS} x {INPUTS}, {TOKENS} tokens, float64; by method and rank."
    content = {"about": about, "relative_error": measured()}
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
