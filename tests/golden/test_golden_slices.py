"""Golden numbers of the methods that make layers narrower: KL to a fixed random model, to three digits.

After a wanted change, write them anew and say so in the changelog:  python tests/golden/test_golden_slices.py --write
"""

import json
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from spectrim.engines.pipeline import compress_model
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids

FILE = Path(__file__).with_name("slices.json")
COMMAND = "python tests/golden/test_golden_slices.py --write"
KEEPS = (0.9, 0.75, 0.5)
CASES = {
    "slicegpt": ("slicegpt", {}),
    "slicegpt basis=variance": ("slicegpt", {"basis": "variance"}),
    "slicegpt basis=random": ("slicegpt", {"basis": "random"}),
    "modegpt": ("modegpt", {}),
    "modegpt allocation=uniform": ("modegpt", {"allocation": "uniform"}),
    "modegpt rule=magnitude": ("modegpt", {"allocation": "uniform", "rule": "magnitude"}),
}


def losses(label: str) -> dict[str, dict[str, float]]:
    """KL in nats a token on held-out ids, and the share of numbers stored, by keep."""
    name, options = CASES[label]
    dense, ids = tiny("llama-gqa-bias"), token_ids(16, seed=7)
    log_q = logits_of(dense, ids).log_softmax(-1)
    table = {}
    for keep in KEEPS:
        outcome = compress_model(dense, make_method(name, options=dict(options)), keep, token_ids(32))
        log_p = logits_of(outcome.model, ids).log_softmax(-1)
        kl = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
        stored = outcome.plan.numbers_after / outcome.plan.numbers_before
        table[str(keep)] = {"kl": float(f"{kl:.4g}"), "stored": float(f"{stored:.6g}")}
    return table


def golden() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))["loss"]


@pytest.mark.golden
@pytest.mark.parametrize("label", CASES)
def test_losses_are_the_recorded_ones(label):
    recorded, now = golden()[label], losses(label)
    assert set(now) == set(recorded)
    for keep, values in now.items():
        assert values["stored"] == pytest.approx(recorded[keep]["stored"], rel=1e-5), f"{label}; if wanted: {COMMAND}"
        # Statistics are in bf16 products where the hardware has them.
        assert values["kl"] == pytest.approx(recorded[keep]["kl"], rel=0.05), f"{label} at {keep}; if wanted: {COMMAND}"


@pytest.mark.golden
def test_recorded_losses_are_in_the_order_that_is_promised():
    table = golden()
    assert set(table) == set(CASES)
    for keep in map(str, KEEPS):
        assert table["modegpt allocation=uniform"][keep]["kl"] < table["modegpt rule=magnitude"][keep]["kl"]
        assert table["slicegpt"][keep]["kl"] < table["slicegpt basis=random"][keep]["kl"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    torch.set_num_threads(1)
    about = f"Written by `{COMMAND}`. tiny llama-gqa-bias, 32 windows of 16 tokens; KL to the dense model."
    content = {"about": about, "loss": {label: losses(label) for label in CASES}}
    FILE.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
