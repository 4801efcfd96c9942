"""Golden numbers of compactifai and dsformer: what a fixed tiny model stores and loses, before any training.

After a wanted change of arithmetic, write them anew and say so in the changelog:
    PYTHONPATH=tests python tests/golden/test_golden_networks.py --write
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from spectrim.engines.pipeline import compress_model
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids

FILE = Path(__file__).with_name("network_methods.json")
COMMAND = "PYTHONPATH=tests python tests/golden/test_golden_networks.py --write"
KEEPS = (0.4, 0.7)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "compactifai": ("compactifai", {}),
    "compactifai allocation=uniform": ("compactifai", {"allocation": "uniform"}),
    "compactifai sites=3": ("compactifai", {"sites": 3}),
    "dsformer": ("dsformer", {}),
    "dsformer solver=straight-through": ("dsformer", {"solver": "straight-through"}),
}


def measured(label: str) -> dict[str, dict[str, float]]:
    """Stored numbers and KL(dense || compressed) in nats a token on other windows, by keep."""
    name, options = CASES[label]
    dense, table = tiny("llama"), {}
    for keep in KEEPS:
        outcome = compress_model(dense, make_method(name, options=options), keep, token_ids(16), seed=2)
        p, q = (logits_of(m, token_ids(16, seed=9)).double().log_softmax(-1) for m in (dense, outcome.model))
        lost = float((p.exp() * (p - q)).sum(-1).mean())
        table[str(keep)] = {"numbers": outcome.plan.numbers_after, "kl": float(f"{lost:.5g}")}
    return table


@pytest.mark.golden
@pytest.mark.parametrize("label", CASES)
def test_numbers_and_losses_are_the_recorded_ones(label):
    recorded = json.loads(FILE.read_text(encoding="utf-8"))["by_case"][label]
    now = measured(label)
    for keep in map(str, KEEPS):
        assert now[keep]["numbers"] == recorded[keep]["numbers"], f"{label} at {keep}; if wanted: {COMMAND}"
        assert now[keep]["kl"] == pytest.approx(recorded[keep]["kl"], rel=2e-3), f"{label} at {keep}"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    about = f"Written by `{COMMAND}`. A random Llama of two blocks; stored numbers and KL by case and keep."
    content = {"about": about, "by_case": {label: measured(label) for label in CASES}}
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
