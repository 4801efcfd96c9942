"""How strong an adapter is at each size: the least loss decides, ends are given, only the adapter's scores change."""

from typing import cast

import pytest
import torch

from spectrim.engines.fade import STRENGTHS, fade, text_loss, with_strengths
from spectrim.engines.order import Order
from spectrim.linalg.divergence import mean_kl
from spectrim.methods.weights.acip import ACIP
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

ANCHORS = (1.0, 0.9, 0.6, 0.4)
RANK = 2


def order() -> Order:
    scores = {"a": torch.ones(4, 5), "b": torch.ones(4, 3)}
    return Order(spectra={}, anchors=ANCHORS, scores=scores, levels={}, adapter_rank=RANK, details={"old": 1})


def test_each_anchor_gets_the_strength_of_least_loss_and_the_ends_are_given():
    asked: list[tuple[float, float]] = []

    def loss(candidate: Order, size: float) -> float:
        strength = float(candidate.scores["a"][candidate.anchors.index(size), 0])
        asked.append((size, strength))
        return abs(strength - {0.9: 0.3, 0.6: 0.8}[size])

    seen: list[tuple[str, int, int]] = []
    given = order()
    found = fade(given, loss, progress=lambda *at: seen.append(at))
    assert found.details == {"old": 1, "adapter_strengths": {"1": 0.0, "0.9": 0.25, "0.6": 0.75, "0.4": 1.0}}
    for name, score in found.scores.items():
        assert score[:, :RANK].tolist() == [[0.0] * RANK, [0.25] * RANK, [0.75] * RANK, [1.0] * RANK]
        assert bool((score[:, RANK:] == 1).all())
        assert bool((given.scores[name] == 1).all())  # what was given is as it was
    assert asked == [(size, strength) for size in (0.9, 0.6) for strength in STRENGTHS]
    assert seen == [("fade", 1, 2), ("fade", 2, 2)]


def test_of_equal_losses_the_weaker_adapter_is_taken():
    assert fade(order(), lambda *_: 1.0).details["adapter_strengths"] == {"1": 0.0, "0.9": 0.0, "0.6": 0.0, "0.4": 1.0}


def test_without_anchors_between_only_the_ends_are_set():
    two = Order(spectra={}, anchors=(1.0, 0.4), scores={"a": torch.ones(2, 3)}, levels={}, adapter_rank=1)
    assert fade(two, lambda *_: pytest.fail("nothing is to be judged")).scores["a"].tolist() == [[0, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("target", ["labels", "dense"])
def test_the_loss_is_the_methods_own_whatever_the_batch(target):
    method = cast(ACIP, make_method("acip", options={"target": target}))
    dense, small, ids = tiny("llama"), tiny("llama", seed=5), token_ids(35, 12)
    with torch.no_grad():
        own, given = small(input_ids=ids[:32]).logits, dense(input_ids=ids[:32]).logits
        if target == "dense":
            expected = mean_kl(own, given)
        else:
            expected = torch.nn.functional.cross_entropy(own[:, :-1].flatten(0, 1), ids[:32, 1:].flatten())
    assert text_loss(method, small, dense, ids) == pytest.approx(float(expected), rel=2e-3)  # bfloat16 products


def test_strengths_stand_in_the_rows_of_the_anchors():
    assert with_strengths(order(), (0.0, 0.5, 0.25, 1.0)).scores["b"][:, 0].tolist() == [0.0, 0.5, 0.25, 1.0]
