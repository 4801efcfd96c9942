"""Prune, factorise, fine-tune: each stage against what it is made of, and what the whole keeps to."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines import mixed
from spectrim.engines.learned import skeleton
from spectrim.engines.mixed import Choices, low_share, train_mixed
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.engines.prune import prune, scheduled
from spectrim.engines.ranks import plan_ranks, uniform_plan
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.divergence import distillation_loss
from spectrim.linalg.factor import truncate
from spectrim.linalg.movement import sparse_spectrum
from spectrim.models.walk import find_layers
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.mixed import MixedLinear
from spectrim.nn.pruned import PrunedLinear
from spectrim.nn.spectral import SpectralLinear
from spectrim.registry import make_method
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

IDS = token_ids(8, 16)
SMALL = {"prune_steps": 6, "mixed_steps": 5, "batch_size": 4}
PRUNE = {"sparsity": 0.6, "steps": 6, "batch_size": 4, "learning_rate": 0.01, "label_share": 0.5}


def compressed(
    name: str = "llama-gqa-bias",
    keep: float = 0.6,
    checkpoint: MemoryCheckpoint | None = None,
    progress: Any = None,
    **options: Any,
) -> Outcome:
    method = make_method("lpaf", options={**SMALL, **options})
    return compress_model(tiny(name), method, keep, IDS[:4], IDS, seed=1, checkpoint=checkpoint, progress=progress)


# The pruned layer


def slow_pruned_steps(weight: torch.Tensor, x: torch.Tensor, sparsity: float, steps: int, rate: float):
    """Movement pruning of y = W x under the loss |y|^2 / 2, entry by entry, with plain gradient descent."""
    weight, scores = weight.clone(), torch.zeros_like(weight)
    for _ in range(steps):
        order = sorted(range(weight.numel()), key=lambda k: (float(scores.flatten()[k]), k))
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[order[: int(sparsity * weight.numel())]] = False
        mask = mask.view_as(weight)
        gradient = (x @ (weight * mask).mT).mT @ x  # of every entry, as if none were pruned
        scores -= weight * gradient
        weight -= rate * gradient * mask
    return weight, scores, mask


def test_scores_masks_and_weights_equal_a_loop_over_entries():
    torch.manual_seed(0)
    weight, x, rate = torch.randn(4, 5), torch.randn(9, 5), 0.01
    layer = PrunedLinear(weight, None)
    for _ in range(5):
        layer.prune(0.4)
        layer.weight.grad = None
        (layer(x).square().sum() / 2).backward()
        layer.tally()
        with torch.no_grad():
            layer.weight -= rate * layer.weight.grad
    expected, scores, mask = slow_pruned_steps(weight, x, 0.4, 5, rate)
    assert torch.allclose(layer.weight, expected, atol=1e-5)
    assert torch.allclose(layer.scores, scores, atol=1e-4)
    assert torch.equal(layer.mask, mask)


def test_pruned_entries_are_zero_in_the_product_and_keep_their_value_and_their_score():
    layer = PrunedLinear(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))
    layer.scores.copy_(torch.tensor([[-1.0, 1.0]]))
    layer.prune(0.5)
    assert torch.equal(layer(torch.ones(1, 2)), torch.tensor([[5.0]]))
    layer(torch.ones(1, 2)).sum().backward()
    layer.tally()
    assert layer.scores.tolist() == [[-2.0, -1.0]]  # -W g, also where it is pruned
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[0.0, 1.0]]
    assert layer.weight.tolist() == [[1.0, 2.0]]
    assert layer.pruned().tolist() == [[0.0, 2.0]]
    layer.prune(0.5, "size")
    assert layer.mask.tolist() == [[False, True]]


def test_the_schedule_collects_scores_first_and_settles_at_the_end():
    assert scheduled(0, 20) is None
    assert scheduled(1, 20) is None
    assert scheduled(2, 20) == 0.0
    assert scheduled(9, 20) == pytest.approx(0.5)
    assert scheduled(16, 20) == scheduled(19, 20) == 1.0
    assert scheduled(0, 1) is None


# The stages


@pytest.mark.parametrize("scores", ["movement", "size"])
def test_pruning_reaches_the_sparsity_in_every_layer_and_leaves_the_teacher_alone(scores):
    dense = tiny("llama-gqa-bias")
    before = state_of(dense)
    student = skeleton(dense)
    layers = prune(student, dense, find_layers(dense), IDS, scores=scores, **PRUNE)
    assert_same_state(before, state_of(dense))
    assert len(layers) == 14
    for name, layer in layers.items():
        zeros = int((layer.pruned() == 0).sum())
        assert zeros == int(0.6 * layer.weight.numel()), name
        assert student.get_submodule(name) is layer
        kept = layer.pruned()[layer.mask]
        assert not torch.equal(kept, dense.get_submodule(name).weight[layer.mask]), name  # trained


def test_pruning_learns():
    """The loss of the pruned model is below that of the same masks on the dense weights."""
    dense = tiny("llama")
    student = skeleton(dense)
    changed = {"steps": 60, "label_share": 0.0, "learning_rate": 0.05}
    layers = prune(student, dense, find_layers(dense), IDS, **{**PRUNE, **changed})
    bare = skeleton(dense)
    for name, layer in layers.items():
        bare.set_submodule(name, linear := nn.Linear(layer.in_features, layer.out_features, bias=False))
        linear.weight.data = dense.get_submodule(name).weight.detach() * layer.mask

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            log_p, log_q = (logits_of(m, IDS).log_softmax(-1) for m in (dense, model))
            return float(F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"))

    assert divergence(student) < 0.85 * divergence(bare)


def test_a_loss_that_is_not_finite_stops_the_run():
    dense, teacher = tiny("llama"), tiny("llama")
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match=r"pruning: the loss is nan at step 0 of 6; .*--set learning_rate=0\.0033"):
        prune(skeleton(dense), teacher, find_layers(dense), IDS, **PRUNE)


def mixed_layer() -> MixedLinear:
    torch.manual_seed(0)
    spectrum = sparse_spectrum(torch.randn(6, 5).double(), torch.ones(6, 5, dtype=torch.bool))
    return MixedLinear(SpectralLinear(truncate(spectrum, 2), torch.randn(6)), torch.randn(6, 5))


def test_the_mixed_layer_uses_one_weight_or_the_other():
    layer, x = mixed_layer(), torch.randn(3, 5)
    assert torch.allclose(layer(x), layer.low(x))
    layer.full = True
    assert torch.allclose(layer(x), F.linear(x, layer.full_weight, layer.low.bias_now()))
    layer(x).sum().backward()
    assert layer.low.U.grad is None  # nothing of the factors was used


def test_the_share_of_factors_rises_from_half_to_all():
    shares = [low_share(step, 100) for step in range(100)]
    assert shares[0] == 0.5
    assert shares[40] == pytest.approx(0.75)
    assert shares[80:] == [1.0] * 20
    assert shares == sorted(shares)


def test_choices_have_their_frequency_differ_between_passes_and_depend_on_seed_and_step_only():
    layers = {str(i): layer for i, layer in enumerate(map(copy.copy, [mixed_layer()] * 400))}
    now = Choices(layers, 100, seed=3)
    now.draw(0)
    assert now.passes == 2
    drawn = now.full.clone()
    assert 150 < int(drawn[0].sum()) < 250
    assert not torch.equal(drawn[0], drawn[1])
    now.choose(1)
    assert [layer.full for layer in layers.values()] == drawn[1].tolist()
    now.draw(40)
    assert 60 < int(now.full[0].sum()) < 140
    now.draw(0)
    assert torch.equal(now.full, drawn)
    now.draw(80)
    assert now.passes == 1
    assert not bool(now.full.any())


def test_mixed_training_restores_the_layers_on_an_error():
    dense = tiny("llama")
    student = compressed("llama", mixed_steps=0).model
    before = state_of(student)
    full = {layer.name: torch.full((layer.outputs, layer.inputs), torch.nan) for layer in find_layers(dense).layers}
    with pytest.raises(NumericalError, match="mixed-rank fine-tuning"):
        train_mixed(
            student, dense, find_layers(dense), full, IDS, steps=3, batch_size=4, learning_rate=0.01, label_share=0.1,
            consistency=0.1,
        )  # fmt: skip
    assert_same_state(before, state_of(student))


# The method


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_without_fine_tuning_layers_are_cuts_of_the_pruned_weights(storage):
    outcome = compressed(mixed_steps=0, storage=storage)
    dense = tiny("llama-gqa-bias")
    layers = prune(
        skeleton(dense), dense, find_layers(dense), IDS, sparsity=0.7, steps=6, batch_size=4, learning_rate=0.01,
        label_share=0.1, seed=1,
    )  # fmt: skip
    for name, layer in layers.items():
        module = outcome.model.get_submodule(name)
        assert isinstance(module, LowRankLinear if storage == "factor" else PivotLinear)
        cut = truncate(sparse_spectrum(layer.weight.detach().double(), layer.mask), module.rank)
        assert torch.allclose(module.dense_weight().double(), cut.left @ cut.right, atol=1e-4), name
        assert torch.allclose(module.bias, layer.bias), name
        assert not torch.allclose(module.bias, dense.get_submodule(name).bias)


@pytest.mark.parametrize("keep", [0.97, 0.6, 0.3])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt"])
def test_the_budget_is_met_and_nothing_full_remains(architecture, keep):
    dense = tiny(architecture)
    before = state_of(dense)
    method = make_method("lpaf", options=SMALL)
    outcome = compress_model(dense, method, keep, IDS[:4], IDS)
    assert_same_state(before, state_of(dense))
    stored = sum(
        t.numel() for la in outcome.walk.layers for t in outcome.model.get_submodule(la.name).state_dict().values()
    )
    assert keep - 0.05 < stored / outcome.walk.numbers <= keep
    assert not any(isinstance(m, PrunedLinear | MixedLinear | SpectralLinear) for m in outcome.model.modules())
    assert bool(torch.isfinite(logits_of(outcome.model, IDS)).all())


def test_fine_tuning_changes_the_factors_and_recovery_can_follow():
    bare, tuned = compressed(mixed_steps=0), compressed()
    assert bare.plan == tuned.plan
    name = "model.layers.0.mlp.up_proj"
    assert not torch.allclose(
        bare.model.get_submodule(name).dense_weight(), tuned.model.get_submodule(name).dense_weight()
    )
    method = make_method("lpaf", options=SMALL)
    followed = compress_model(tiny("llama-gqa-bias"), method, 0.6, IDS[:4], IDS, seed=1, recovery=("kl:2",))
    assert len(followed.distil_losses) == 2


def test_equal_shares_are_those_of_methods_for_single_layers():
    walk = find_layers(tiny("llama-gqa-bias"))
    energies = {la.name: torch.ones(min(la.outputs, la.inputs), dtype=torch.float64) for la in walk.layers}
    for storage in ("factor", "pivot"):
        method = make_method("svd", options={"storage": storage})
        for keep in (0.3, 0.62, 0.95):
            assert uniform_plan(walk, storage, energies, keep) == plan_ranks(method, walk, energies, keep)


def test_keep_1_is_the_dense_model():
    outcome = compressed(keep=1.0)
    assert torch.equal(logits_of(outcome.model, IDS), logits_of(tiny("llama-gqa-bias"), IDS))


@pytest.fixture(scope="module")
def whole() -> Outcome:
    return compressed()


@pytest.mark.parametrize(("stage", "step"), [("prune", 3), ("prune", 6), ("mixed rank", 2), ("mixed rank", 5)])
def test_killed_and_gone_on_with_is_bit_for_bit_the_whole(whole, stage, step):
    checkpoint = MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        compressed(checkpoint=checkpoint, progress=kill_at(stage, step))
    mine, theirs = whole.model.state_dict(), compressed(checkpoint=checkpoint).model.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_after_a_loss_that_was_not_finite_the_same_step_has_the_same_choices(whole, monkeypatch):
    drawn: list[int] = []
    choose, at = Choices.choose, {"nan": True}

    def noted(self: Choices, turn: int) -> None:
        choose(self, turn)
        drawn.append(int(self.full[turn].sum()))

    def once(*given: Any) -> torch.Tensor:
        loss = distillation_loss(*given)
        return loss * (torch.nan if at["nan"] and len(drawn) >= 5 else 1)

    monkeypatch.setattr(Choices, "choose", noted)
    monkeypatch.setattr(mixed, "distillation_loss", once)
    checkpoint = MemoryCheckpoint(every=1)
    with pytest.raises(NumericalError, match="mixed-rank"):
        compressed(checkpoint=checkpoint)
    at["nan"] = False
    mine, theirs = whole.model.state_dict(), compressed(checkpoint=checkpoint).model.state_dict()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@pytest.mark.parametrize("options", [{"sparsity": 1.0}, {"scores": "random"}, {"prune_steps": 0}, {"storage": "dense"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UsageError):
        make_method("lpaf", options=options)
