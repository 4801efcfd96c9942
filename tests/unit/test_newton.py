"""Newton steps on scores: the gradient against autograd, the step by hand, and that they only ever help."""

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines import measure, recompute
from spectrim.engines.layerwise import decompose_all
from spectrim.engines.learned import relax, skeleton, step_loss
from spectrim.engines.measure import frozen
from spectrim.engines.newton import (
    DAMPING,
    LARGEST_MOVE,
    LENGTHS,
    best_length,
    directions,
    newton_scores,
    score_gradients,
)
from spectrim.engines.newton_blocks import newton_blocks
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import Plan, plan_ranks
from spectrim.engines.relay import Relay
from spectrim.engines.shelf import SpectraShelf
from spectrim.errors import NumericalError
from spectrim.evaluate.language import evaluate
from spectrim.linalg.factor import Spectrum, truncate
from spectrim.methods.weights.soco import SoCo
from spectrim.models.walk import Walk, find_layers
from spectrim.nn.scored import ScoredLinear
from spectrim.registry import make_method
from tiny_models import assert_same_state, state_of, tiny, token_ids

IDS = token_ids(40)
KEEP = 0.5
METHOD = SoCo(rounds=0, coupling="none", propagate=0.0)


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic on machines with and without bf16 products."""
    monkeypatch.setattr(measure, "cpu_has_bf16", lambda: False)


def prepared(name: str = "llama-gqa-bias") -> tuple[PreTrainedModel, Walk, dict[str, Spectrum], Plan]:
    model = tiny(name)
    walk = find_layers(model)
    spectra = decompose_all(METHOD, model, walk, measure.measure(model, walk, IDS, METHOD.needs))
    plan = plan_ranks(METHOD, walk, {n: s.energy for n, s in spectra.items()}, KEEP)
    return model, walk, spectra, plan


def loss_of(model: PreTrainedModel, walk: Walk, spectra: dict[str, Spectrum], plan: Plan, ids: Tensor) -> float:
    """With plain linear layers: nothing of the scored layers is used."""
    student = skeleton(model)
    for layer in walk.layers:
        factors = truncate(spectra[layer.name], plan.targets[layer.name].rank)
        old = model.get_submodule(layer.name)
        new = nn.Linear(layer.inputs, layer.outputs, bias=False)
        new.weight = nn.Parameter((factors.left @ factors.right).float())
        new.bias = old.bias
        student.set_submodule(layer.name, new)
    return evaluate(student, ids, dense=model).kl or 0.0


def test_the_gradient_is_that_of_the_mean_loss_and_batches_do_not_matter():
    model, walk, spectra, plan = prepared()
    student = skeleton(model)
    scored = relax(student, walk, spectra)
    for name, layer in scored.items():
        layer.mask[plan.targets[name].rank :] = 0
    with frozen(student), frozen(model):
        found = score_gradients(METHOD, model, student, scored, IDS[:6], batch_size=4)
        again = score_gradients(METHOD, model, student, scored, IDS[:6], batch_size=1)
        for layer in scored.values():
            layer.scores.requires_grad_(True)
        step_loss(METHOD, student, model, IDS[:6]).backward()
    assert found.keys() == scored.keys()
    for name, layer in scored.items():
        torch.testing.assert_close(found[name], layer.scores.grad, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(again[name], found[name], rtol=1e-3, atol=1e-7)
    assert max(float(g.abs().max()) for g in found.values()) > 0


def one_layer(energy: list[float]) -> dict[str, ScoredLinear]:
    eye = torch.eye(len(energy), dtype=torch.float64)
    return {"a": ScoredLinear(Spectrum(eye, eye, torch.tensor(energy, dtype=torch.float64)), None)}


def test_the_step_by_hand():
    scored = one_layer([4.0, 2.0, 1.0, 1.0])
    scored["a"].mask[3] = 0
    step = directions(scored, {"a": torch.tensor([2.0, -0.3, 50.0, 9.0])})["a"]
    floor = DAMPING * 2.0
    expected = torch.tensor([-2.0 / (4 + floor), 0.3 / (2 + floor), -LARGEST_MOVE, 0.0])
    torch.testing.assert_close(step, expected)


def test_a_layer_of_zeros_does_not_move():
    scored = one_layer([0.0, 0.0])
    assert not directions(scored, {"a": torch.tensor([1.0, -1.0])})["a"].any()


def test_a_step_the_wrong_way_has_length_zero_and_nothing_moves():
    model, walk, spectra, _ = prepared()
    student = skeleton(model)
    scored = relax(student, walk, spectra)  # complete: every move away from 1 hurts
    moves = {name: torch.ones_like(layer.scores) for name, layer in scored.items()}
    with frozen(student), frozen(model):
        assert best_length(METHOD, model, student, scored, moves, IDS[:8], 4) == 0.0
    for layer in scored.values():
        torch.testing.assert_close(layer.scores.detach(), torch.ones_like(layer.mask), rtol=0, atol=1e-6)


def test_the_loss_falls_on_the_windows_that_chose_the_length_and_ranks_and_the_rest_stay():
    model, walk, spectra, plan = prepared()
    before = dict(spectra)
    state = state_of(model)
    held_out = IDS[-5:]  # one in eight
    start = loss_of(model, walk, spectra, plan, held_out)
    (length,) = newton_scores(METHOD, model, walk, spectra, plan, IDS, steps=1, batch_size=8)
    assert length in LENGTHS
    assert loss_of(model, walk, spectra, plan, held_out) < start
    for name, target in plan.targets.items():
        rank = target.rank
        assert torch.equal(spectra[name].right, before[name].right)
        assert torch.equal(spectra[name].left[:, rank:], before[name].left[:, rank:])  # what is cut stays
        assert not torch.equal(spectra[name].left[:, :rank], before[name].left[:, :rank])
        scores = (spectra[name].left / before[name].left)[0].nan_to_num(1.0)
        torch.testing.assert_close(spectra[name].energy, before[name].energy * scores.square())
    assert_same_state(state, state_of(model))


def test_in_a_whole_run_it_is_part_of_the_closed_form_and_meets_the_budget():
    model = tiny("llama")
    options = {"rounds": 0, "coupling": "none", "propagate": 0.0}
    found = {}
    for newton in (0, 2):
        method = make_method("soco", "fast", {**options, "newton": newton})
        outcome = compress_model(model, method, KEEP, IDS, gradient_windows=40)
        found[newton] = evaluate(outcome.model, IDS, dense=model).kl
        assert outcome.plan.keep <= KEEP
        assert ("newton" in outcome.seconds) == (newton > 0)
    assert found[2] < found[0]


def test_a_gradient_that_is_not_finite_names_its_layer(monkeypatch: pytest.MonkeyPatch):
    model, walk, spectra, plan = prepared()
    real = SoCo.loss
    monkeypatch.setattr(SoCo, "loss", lambda self, a, ids, b: real(self, a, ids, b) * torch.nan)
    with pytest.raises(NumericalError, match=r"model\.layers\.\d.*gradient of its scores is not finite.*newton=0"):
        newton_scores(METHOD, model, walk, spectra, plan, IDS, steps=1, batch_size=8)


@pytest.mark.parametrize("narrow", [False, True])
def test_there_and_back_block_by_block_is_the_same_step(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "fits_whole", lambda *_: not narrow)
    model, walk, made, plan = prepared()

    def kept(name: str) -> int | None:
        return None if plan.targets[name].codec == "dense" else plan.targets[name].rank

    whole, parts = (SpectraShelf(torch.device("cpu"), kept) for _ in range(2))
    for shelf in (whole, parts):
        shelf.update(made)
    before = {key: tensor.clone() for key, tensor in parts.shelf.kept.items()}
    state = state_of(model)
    told = {"steps": 2, "batch_size": 3}
    wanted = newton_scores(METHOD, model, walk, whole, plan, IDS, **told)
    found = newton_blocks(METHOD, Relay(model, walk), walk, parts, plan, IDS, **told)
    assert found == wanted
    assert max(found) > 0
    assert_same_state(state, state_of(model))
    for key, tensor in parts.shelf.kept.items():
        torch.testing.assert_close(tensor, whole.shelf.kept[key], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in parts.shelf.kept.items())
