"""Refitting left factors against direct least squares, and distillation."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines import measure as measure_engine
from spectrim.engines import refit as refit_engine
from spectrim.engines.distil import distil
from spectrim.engines.pipeline import compress_model
from spectrim.engines.refit import reconstruct, refit
from spectrim.errors import NumericalError
from spectrim.models.walk import Walk, find_layers, weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.registry import make_method
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

ARCHITECTURES = ("llama", "llama-gqa-bias", "gemma3", "opt", "gpt-neox", "gpt2", "phi3", "falcon", "qwen3-moe")
IDS = token_ids(24, 16)
RIDGE = 1e-3  # of linalg/factor.refit_left


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    for engine in (refit_engine, measure_engine):
        monkeypatch.setattr(engine, "autocast", lambda _device: nullcontext())


def compressed(
    architecture: str, *, storage: str = "pivot", keep: float = 0.5
) -> tuple[PreTrainedModel, PreTrainedModel, Walk]:
    """Teacher, student (which shares what is not compressed with the teacher, as in a real run), walk."""
    teacher = tiny(architecture)
    method = make_method("svd", options={"storage": storage})
    return teacher, compress_model(teacher, method, keep, IDS).model, find_layers(teacher)


def low_rank(model: PreTrainedModel) -> dict[str, LowRankLinear | PivotLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}


@torch.no_grad()
def seen_at(model: PreTrainedModel, names: list[str], *, inputs: bool = False) -> dict[str, Tensor]:
    """What modules give (or take) on the calibration windows, as float64 rows."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(_module, args, output):
            value = args[0] if inputs else output[0] if isinstance(output, tuple) else output
            seen[name] = value.flatten(0, -2).double()

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def right_factor(module: LowRankLinear | PivotLinear) -> Tensor:
    return (module.V if isinstance(module, LowRankLinear) else module.pivot).weight.detach().double()


# Refit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_refit_brings_every_block_nearer_to_the_dense_model(architecture):
    teacher, student, walk = compressed(architecture)
    want = seen_at(teacher, list(walk.block_names))
    before = seen_at(student, list(walk.block_names))
    refit(student, teacher, walk, IDS)
    after = seen_at(student, list(walk.block_names))
    for name in walk.block_names:
        error_before = (before[name] - want[name]).square().sum()
        error_after = (after[name] - want[name]).square().sum()
        assert error_after < 0.9 * error_before, name
        assert error_after > 0, name


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_ranks_codecs_and_everything_else_stay(storage):
    teacher, student, walk = compressed("llama-gqa-bias", storage=storage)
    student.model.layers[0].mlp.up_proj = copy.deepcopy(teacher.model.layers[0].mlp.up_proj)  # a layer left dense
    before, modules = state_of(student), {n: (type(m), m.rank) for n, m in low_rank(student).items()}
    assert len(modules) == 13
    refit(student, teacher, walk, IDS)
    after = state_of(student)
    assert {n: (type(m), m.rank) for n, m in low_rank(student).items()} == modules
    for key in before.keys() - {"tensors"}:
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    changed = set()
    for name, tensor in before["tensors"].items():
        assert after["tensors"][name].shape == tensor.shape
        if not torch.equal(after["tensors"][name], tensor):
            changed.add(
                name.rpartition(".")[0]
                .removesuffix(".U")
                .removesuffix(".V")
                .removesuffix(".rest")
                .removesuffix(".pivot")
            )
        if name.endswith("bias"):
            assert torch.equal(after["tensors"][name], tensor), name
    assert changed == modules.keys()


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_the_row_space_of_every_layer_stays(storage):
    """Only left factors are free: new rows are combinations of the old ones."""
    teacher, student, walk = compressed("llama", storage=storage)
    before = {n: right_factor(m) for n, m in low_rank(student).items()}
    refit(student, teacher, walk, IDS)
    for name, module in low_rank(student).items():
        weight = module.dense_weight().double()
        onto = torch.linalg.pinv(before[name]) @ before[name]
        assert (weight @ onto - weight).abs().max() < 1e-5 * weight.abs().max(), name


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_the_first_group_equals_direct_least_squares(architecture, storage):
    """At the first layers both models see the same input x: min_B || W x - B A x ||^2 is an ordinary lstsq."""
    teacher, student, walk = compressed(architecture, storage=storage)
    first = [la.name for la in walk.layers[: 3 if architecture.startswith("llama") else 1]]
    right = {n: right_factor(m) for n, m in low_rank(student).items()}
    old = {n: student.get_submodule(n).dense_weight() for n in first}
    x = seen_at(teacher, first, inputs=True)
    refit(student, teacher, walk, IDS)
    for name in first:
        target = x[name] @ weight_of(teacher.get_submodule(name)).detach().double().mT
        left = torch.linalg.lstsq(x[name] @ right[name].mT, target, driver="gelsd").solution.mT
        got, want = student.get_submodule(name).dense_weight().double(), left @ right[name]
        assert (got - want).abs().max() < 1e-4 * want.abs().max(), name
        assert (old[name] - want).abs().max() > 1e-2 * want.abs().max(), name  # there was something to refit


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "phi3", "opt", "gpt-neox"])
def test_every_layer_is_optimal_for_the_inputs_of_the_final_model(architecture, storage):
    """The definition, solved directly: x from the dense model, x' from the student, all before it refitted.

    min_B  || W x - B A x' ||^2 / tokens + damping || B - B0 ||^2,   B0 = argmin || W x' - B0 A x' ||^2
    A layer's input depends only on what runs before it, so the final student has the x' of each refit. Found: Phi-3
    defines o_proj before qkv_proj, and was refitted in that order.
    """
    teacher, student, walk = compressed(architecture, storage=storage)
    names = list(low_rank(student))
    right = {n: right_factor(m) for n, m in low_rank(student).items()}
    refit(student, teacher, walk, IDS)
    dense, small = (seen_at(model, names, inputs=True) for model in (teacher, student))
    for name in names:
        weight = weight_of(teacher.get_submodule(name)).detach().double()
        reduced, tokens = small[name] @ right[name].mT, len(small[name])
        damping = RIDGE * reduced.square().sum(0).mean() / tokens
        anchor = torch.linalg.lstsq(reduced, small[name] @ weight.mT, driver="gelsd").solution  # B0^T
        eye = torch.eye(len(right[name]), dtype=torch.float64)
        system = torch.cat([reduced / tokens**0.5, damping.sqrt() * eye])
        target = torch.cat([dense[name] @ weight.mT / tokens**0.5, damping.sqrt() * anchor])
        want = torch.linalg.lstsq(system, target, driver="gelsd").solution.mT @ right[name]
        got = student.get_submodule(name).dense_weight().double()
        assert (got - want).abs().max() < 1e-3 * want.abs().max(), name


def test_reconstruct_solves_for_both_factors_of_the_first_group():
    """Where nothing has drifted yet, left then right by least squares; against lstsq on the inputs themselves."""
    dense, student, walk = compressed("llama", storage="factor")
    name = "model.layers.0.self_attn.q_proj"
    before = student.get_submodule(name)
    right = before.V.weight.detach().double()
    x = seen_at(dense, [name], inputs=True)[name]
    weight = weight_of(dense.get_submodule(name)).detach().double()
    left = torch.linalg.lstsq(x @ right.mT, x @ weight.mT).solution.mT
    expected = left @ torch.linalg.lstsq(left, weight).solution
    reconstruct(student, dense, walk, IDS)
    found = student.get_submodule(name).dense_weight().double()
    error = ((x @ (found - weight).mT).square().sum() / (x @ weight.mT).square().sum()) ** 0.5
    best = ((x @ (expected - weight).mT).square().sum() / (x @ weight.mT).square().sum()) ** 0.5
    assert float(error) == pytest.approx(float(best), rel=0.02)


def test_the_batch_size_does_not_matter_to_refit():
    teacher, student, walk = compressed("llama")
    other = copy.deepcopy(student)
    refit(student, teacher, walk, IDS, batch_size=24)
    refit(other, teacher, walk, IDS, batch_size=5)
    torch.testing.assert_close(logits_of(student, IDS), logits_of(other, IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_refit_leaves_the_teacher_alone(architecture):
    teacher, student, walk = compressed(architecture)
    teacher.train()
    before = state_of(teacher)
    refit(student, teacher, walk, IDS)
    assert_same_state(before, state_of(teacher))


def test_refit_reports_blocks():
    teacher, student, walk = compressed("llama")
    seen = []
    refit(student, teacher, walk, IDS, progress=lambda *step: seen.append(step))
    assert seen == [("refit", 1, 2), ("refit", 2, 2)]


def test_refit_of_a_model_without_low_rank_layers_changes_nothing():
    teacher = tiny("llama")
    student = copy.deepcopy(teacher)
    before = state_of(student)
    refit(student, teacher, find_layers(teacher), IDS)
    assert_same_state(before, state_of(student))


def test_refit_gives_hooks_and_flags_back_after_an_error(monkeypatch):
    teacher, student, walk = compressed("llama")
    before, after = (state_of(teacher), state_of(student)), []

    def fail(*_args: object) -> None:
        raise RuntimeError("no solution today")

    monkeypatch.setattr(refit_engine, "refit_left", fail)
    with pytest.raises(RuntimeError, match="no solution today"):
        refit(student, teacher, walk, IDS)
    after = (state_of(teacher), state_of(student))
    assert_same_state(before[0], after[0])
    assert_same_state(before[1], after[1])


# Distillation


def kl(student: PreTrainedModel, teacher: PreTrainedModel) -> float:
    """Mean KL(teacher || student) over the windows, in float64, by another route than the engine's."""
    p, q = (torch.log_softmax(logits_of(m, IDS).double(), -1) for m in (teacher, student))
    return float(torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean"))


@pytest.mark.parametrize(
    ("architecture", "storage"), [("llama-gqa-bias", "pivot"), ("llama", "factor"), ("gpt2", "pivot")]
)
def test_distillation_lowers_the_divergence(architecture, storage):
    teacher, student, walk = compressed(architecture, storage=storage)
    before = kl(student, teacher)
    losses = distil(student, teacher, walk, IDS, steps=30, batch_size=8, learning_rate=0.03)
    assert len(losses) == 30
    assert kl(student, teacher) < 0.8 * before
    assert losses[-1] < losses[0]


def test_the_loss_is_the_divergence_on_the_batch():
    teacher, student, walk = compressed("llama")
    with torch.no_grad():
        log_q = student(input_ids=IDS).logits[:, :-1].log_softmax(-1)
        log_p = teacher(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    labels = -log_q.gather(-1, IDS[:, 1:, None]).mean()
    (loss,) = distil(student, teacher, walk, IDS, steps=1, batch_size=len(IDS), label_share=0.25)
    assert loss == pytest.approx(float(0.75 * divergence + 0.25 * labels), rel=1e-5)


def test_only_the_factors_change():
    teacher, student, walk = compressed("llama-gqa-bias")
    student.model.layers[1].mlp.up_proj = copy.deepcopy(teacher.model.layers[1].mlp.up_proj)  # a layer left dense
    # Its rows of pivots may be others afterwards, and with them mask and order.
    own = {f"{n}.{p}" for n, m in low_rank(student).items() for p, _ in m.named_parameters()}
    place = {f"{n}.{p}" for n in low_rank(student) for p in ("mask", "order")}
    before, teacher_before = state_of(student), state_of(teacher)
    distil(student, teacher, walk, IDS, steps=3, batch_size=4)
    after = state_of(student)
    changed = {n for n, t in before["tensors"].items() if not torch.equal(t, after["tensors"][n])}
    assert own <= changed <= own | place
    assert len(own) == 13 * 3
    for key in before.keys() - {"tensors"}:  # flags, hooks, no gradients left
        assert after[key] == before[key], key
    assert_same_state(teacher_before, state_of(teacher))


def test_distillation_is_deterministic_given_the_seed():
    runs = []
    for seed in (0, 0, 1):
        teacher, student, walk = compressed("llama")
        losses = distil(student, teacher, walk, IDS, steps=4, batch_size=4, seed=seed)
        runs.append((losses, state_of(student)["tensors"]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(t, runs[1][1][n]) for n, t in runs[0][1].items())
    assert runs[0][0] != runs[2][0]


def test_every_window_is_used_before_one_comes_again():
    teacher, student, walk = compressed("llama")
    seen: list[Tensor] = []
    handle = teacher.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["input_ids"]), with_kwargs=True)
    distil(student, teacher, walk, IDS, steps=4, batch_size=6)
    handle.remove()
    rows = torch.cat(seen)
    assert sorted(rows.tolist()) == sorted(IDS.tolist())
    assert rows.tolist() != IDS.tolist()  # in a shuffled order


def test_a_batch_larger_than_the_text_repeats_it():
    teacher, student, walk = compressed("llama")
    assert len(distil(student, teacher, walk, IDS[:3], steps=2, batch_size=8)) == 2


def test_no_steps_and_no_factors_change_nothing():
    teacher, student, walk = compressed("llama")
    before = state_of(student)
    assert distil(student, teacher, walk, IDS, steps=0) == []
    assert_same_state(before, state_of(student))
    same = copy.deepcopy(teacher)
    before = state_of(same)
    assert distil(same, teacher, walk, IDS, steps=3, batch_size=4) == []
    assert_same_state(before, state_of(same))


def test_progress_counts_steps():
    teacher, student, walk = compressed("llama")
    seen = []
    distil(student, teacher, walk, IDS, steps=2, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [("distil", 1, 2), ("distil", 2, 2)]


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights():
    teacher, student, walk = compressed("llama")
    poisoned = IDS
    with torch.no_grad():
        teacher.lm_head.weight = nn.Parameter(teacher.lm_head.weight.clone())  # no longer shared with the student
        teacher.lm_head.weight[63] = torch.nan
    before = state_of(student)["tensors"]
    flags = state_of(student)["requires_grad"], state_of(teacher)["requires_grad"]
    with pytest.raises(NumericalError, match=r"distillation: the loss is nan at step 0 of 5.*learning rate"):
        distil(student, teacher, walk, poisoned, steps=5, batch_size=4)
    after = state_of(student)["tensors"]
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert flags == (state_of(student)["requires_grad"], state_of(teacher)["requires_grad"])
    assert all(p.grad is None for p in student.parameters())
