"""Probed models: what is set is what is meant, in weights stored either way, and what is said of the choice."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from spectrim.engines.forms import DENSE, Form, Menu
from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import compress_model
from spectrim.engines.probe import Noise, Probed
from spectrim.linalg.allocate import Options
from spectrim.linalg.knapsack import Settled, settle
from spectrim.methods.weights import trellis
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

IDS = token_ids(2, 16)


class Same:
    """Noise of size 0: the weight itself (O, I)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().clone()

    def stand_in(self, _form: Form, _loss: float) -> Tensor:
        return self.weight


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_layer_set_to_its_own_weight_changes_nothing_and_neither_does_setting_it_back(architecture: str) -> None:
    dense = tiny(architecture)
    names = [layer.name for layer in find_layers(dense).layers]
    noises = {name: cast(Noise, Same(weight_of(dense.get_submodule(name)))) for name in names}
    menus = [Menu(forms=[DENSE], options=Options(torch.zeros(1), torch.ones(1, dtype=torch.long))) for _ in names]
    probed = Probed(dense, skeleton(dense), names, noises, menus)
    assert probed.kl(dict.fromkeys(names, 0), IDS) == pytest.approx(0, abs=1e-6)
    for name in names:
        stored, own = (cast(nn.Linear, m.get_submodule(name)).weight for m in (probed.student, dense))
        assert torch.equal(stored, own), name
    probed.noises = {name: cast(Noise, Same(-noise.weight)) for name, noise in cast(dict[str, Same], noises).items()}
    assert probed.kl({}, IDS) == pytest.approx(0, abs=1e-6)
    assert probed.kl(dict.fromkeys(names, 0), IDS) > 1e-4
    assert probed.kl({}, IDS) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("gaps", "said"), [((0.5, 0.0), 0), ((0.0, 0.25), 1)])
def test_the_gap_that_is_told_is_that_of_the_choice_that_is_taken(
    gaps: tuple[float, float], said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(gaps)

    def settled(layers: list[Options], budget: int, *, gap: float) -> Settled:
        return Settled(settle(layers, budget, gap=gap).choice, left.pop(0))

    monkeypatch.setattr(trellis, "settle", settled)
    method = make_method("trellis", options={"allocation": "probed", "forms": "codes", "window": 8})
    found = compress_model(tiny("gpt2"), method, 0.4, token_ids(4, 16))
    assert not left
    told = [text for text in found.warnings if "choice of forms" in text]
    assert len(told) == said
    assert all("25.00%" in text for text in told)
