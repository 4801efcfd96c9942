"""Block refinement: every architecture, the definition of its loss, what changes and what must not."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines import block as block_engine
from spectrim.engines.block import refine_blocks
from spectrim.engines.layerwise import apply_plan, decompose_all
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import plan_ranks
from spectrim.errors import NumericalError
from spectrim.evaluate.language import evaluate
from spectrim.models.load import load_dense, resolve
from spectrim.models.walk import Walk, find_layers
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.registry import make_method
from tiny_models import CONFIGS, assert_same_state, state_of, tiny, token_ids

IDS = token_ids(24, 16)


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    monkeypatch.setattr(block_engine, "autocast", lambda _device: nullcontext())


def compressed(
    architecture: str, *, storage: str = "pivot", keep: float = 0.5
) -> tuple[PreTrainedModel, PreTrainedModel, Walk]:
    teacher = tiny(architecture)
    method = make_method("svd", options={"storage": storage})
    return teacher, compress_model(teacher, method, keep, IDS).model, find_layers(teacher)


@torch.no_grad()
def outputs(model: PreTrainedModel, walk: Walk, ids: Tensor = IDS) -> list[Tensor]:
    """What each block gives on the windows, in a plain run of the whole model."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for name in walk.block_names
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_block_comes_nearer_to_the_dense_one_and_the_teacher_stays(architecture):
    teacher, student, walk = compressed(architecture)
    want, before = outputs(teacher, walk), outputs(student, walk)
    teacher.train()
    dense = state_of(teacher)
    losses = refine_blocks(student, teacher, walk, IDS, steps=12, batch_size=12, learning_rate=3e-3)
    assert_same_state(dense, state_of(teacher))
    assert [len(found) for found in losses] == [12, 12]
    after = outputs(student, walk)
    for block in range(2):
        assert F.mse_loss(after[block], want[block]) < 0.93 * F.mse_loss(before[block], want[block]), block


def test_the_loss_is_the_error_of_the_block_on_what_the_refined_blocks_before_it_give():
    teacher, student, walk = compressed("llama")
    losses = refine_blocks(student, teacher, walk, IDS, steps=2, batch_size=24, learning_rate=1e-2)
    refined = copy.deepcopy(student)
    for path, own in compressed("llama")[1].named_parameters():  # the second block as it was before
        if path.startswith(walk.block_names[1]):
            refined.get_parameter(path).data.copy_(own)
    expected = F.mse_loss(outputs(refined, walk)[1], outputs(teacher, walk)[1])
    assert losses[1][0] == pytest.approx(float(expected), rel=1e-5)


def test_a_mixed_target_is_partly_what_the_dense_block_makes_of_the_compressed_input():
    """With the whole target from there, the error of block 2 is that of its own compression, not of block 1's."""
    teacher, student, walk = compressed("llama")
    losses = refine_blocks(student, teacher, walk, IDS, steps=1, batch_size=24, learning_rate=1e-9, mixed=1.0)
    compressed_first = copy.deepcopy(teacher)
    compressed_first.set_submodule(walk.block_names[0], student.get_submodule(walk.block_names[0]))
    expected = F.mse_loss(outputs(student, walk)[1], outputs(compressed_first, walk)[1])
    assert losses[1][0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_factors_their_biases_and_norms_change_and_nothing_else(storage):
    teacher, student, walk = compressed("llama-gqa-bias", storage=storage)
    student.model.layers[1].mlp.up_proj = copy.deepcopy(teacher.model.layers[1].mlp.up_proj)  # a layer left dense
    low_rank = {n: m for n, m in student.named_modules() if isinstance(m, LowRankLinear | PivotLinear)}
    own = {f"{n}.{p}" for n, m in low_rank.items() for p, _ in m.named_parameters()}
    own |= {
        f"{block}.{n}.weight" for block in walk.block_names for n in ("input_layernorm", "post_attention_layernorm")
    }
    before = state_of(student)
    refine_blocks(student, teacher, walk, IDS, steps=3, batch_size=8)
    after = state_of(student)
    assert {n for n, t in before["tensors"].items() if not torch.equal(t, after["tensors"][n])} == own
    assert len(own) == 13 * 3 + 4
    for key in before.keys() - {"tensors"}:
        assert after[key] == before[key], key


def test_norms_of_the_student_are_its_own_and_the_last_norm_is_still_shared():
    teacher, student, walk = compressed("qwen3")
    refine_blocks(student, teacher, walk, IDS, steps=1, batch_size=8)
    for name in walk.block_names:
        for norm in ("input_layernorm", "self_attn.q_norm"):
            path = f"{name}.{norm}.weight"
            assert student.get_parameter(path) is not teacher.get_parameter(path)
    assert student.model.norm.weight is teacher.model.norm.weight


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    runs = []
    for seed in (0, 0, 1):
        teacher, student, walk = compressed("llama")
        losses = refine_blocks(student, teacher, walk, IDS, steps=4, batch_size=4, seed=seed)
        runs.append((losses, state_of(student)["tensors"]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(t, runs[1][1][n]) for n, t in runs[0][1].items())
    assert runs[0][0] != runs[2][0]


def test_no_more_windows_are_run_than_the_steps_can_use():
    teacher, student, walk = compressed("llama")
    rows: list[int] = []
    handle = teacher.register_forward_pre_hook(lambda _m, _a, kw: rows.append(len(kw["input_ids"])), with_kwargs=True)
    refine_blocks(student, teacher, walk, IDS, steps=2, batch_size=3)
    handle.remove()
    assert rows == [3, 3]


def test_blocks_without_low_rank_layers_are_left_alone():
    teacher = tiny("llama")
    student = skeleton(teacher)
    before = state_of(student)
    assert refine_blocks(student, teacher, find_layers(teacher), IDS, steps=3) == [[], []]
    assert_same_state(before, state_of(student))
    teacher, student, walk = compressed("llama")
    student.set_submodule(walk.block_names[0], copy.deepcopy(teacher.get_submodule(walk.block_names[0])))
    first = copy.deepcopy(student.get_submodule(walk.block_names[0]).state_dict())
    losses = refine_blocks(student, teacher, walk, IDS, steps=2, batch_size=8)
    assert [len(found) for found in losses] == [0, 2]
    assert all(torch.equal(t, first[n]) for n, t in student.get_submodule(walk.block_names[0]).state_dict().items())


def test_a_loss_that_is_not_finite_names_the_block_and_leaves_it_as_it_was():
    teacher, student, walk = compressed("llama")
    bad = f"{walk.block_names[1]}.mlp.down_proj"
    teacher.get_submodule(bad).weight.data[0, 0] = torch.nan
    before = state_of(student)["tensors"]
    with pytest.raises(
        NumericalError, match=rf"block refinement of {walk.block_names[1]}: the loss is nan at step 0 of 3"
    ):
        refine_blocks(student, teacher, walk, IDS, steps=3, batch_size=8)
    after = state_of(student)["tensors"]
    assert all(torch.equal(t, after[n]) for n, t in before.items() if n.startswith(walk.block_names[1]))
    assert all(p.grad is None for p in student.parameters())


def test_on_the_embedded_model_held_out_text_comes_nearer_to_the_dense_model():
    source = resolve("builtin:tiny")
    dense = load_dense(source, torch.device("cpu"))
    words = load_tokenizer(source.folder)
    texts = {s: load_texts("builtin:stdlib", split=s, max_chars=20_000) for s in ("calibration", "evaluation")}
    ids = calibration_windows(texts["calibration"], words, length=32, count=32, seed=0).ids
    held_out = evaluation_windows(texts["evaluation"], words, length=32, count=16).ids
    method, walk = make_method("svd-llm"), find_layers(dense)
    spectra = decompose_all(method, dense, walk, measure(dense, walk, ids, method.needs))
    student = skeleton(dense)
    apply_plan(student, walk, plan_ranks(method, walk, {n: s.energy for n, s in spectra.items()}, 0.5), spectra)
    want, before = outputs(dense, walk, held_out), outputs(student, walk, held_out)
    kl = evaluate(student, held_out, dense=dense).kl
    refine_blocks(student, dense, walk, ids, steps=6, batch_size=8, learning_rate=5e-4)
    after = outputs(student, walk, held_out)
    ratios = [float(F.mse_loss(a, w) / F.mse_loss(b, w)) for a, b, w in zip(after, before, want, strict=True)]
    assert max(ratios) < 0.97
    assert evaluate(student, held_out, dense=dense).kl < 0.97 * kl


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_held_in_bfloat16_trains_in_float32_and_is_rounded_after(architecture, storage, monkeypatch):
    """In bfloat16 most steps of 1e-4 are rounded away: there these losses rise."""
    seen: list[set[torch.dtype]] = []
    train = block_engine.train

    def spied(training, *given, **named):
        def loss(batch):
            seen.append({p.dtype for group in training.groups for p in group.parameters.values()})
            return training.loss(batch)

        return train(dataclasses.replace(training, loss=loss), *given, **named)

    monkeypatch.setattr(block_engine, "train", spied)
    losses = {}
    for held in (torch.float32, torch.bfloat16):
        teacher = nn.Module.to(tiny(architecture).bfloat16(), held)
        student = compress_model(teacher, make_method("svd", options={"storage": storage}), 0.5, IDS).model
        losses[held] = refine_blocks(student, teacher, find_layers(teacher), IDS, steps=40, batch_size=8)
        assert {p.dtype for p in student.parameters()} == {held}
        assert {p.dtype for p in teacher.parameters()} == {held}
    assert len(seen) == 2 * 2 * 40
    assert all(dtypes == {torch.float32} for dtypes in seen)
    for wide, narrow in zip(*losses.values(), strict=True):
        assert sum(narrow[-3:]) == pytest.approx(sum(wide[-3:]), rel=0.01)


def test_a_model_held_in_bfloat16_is_in_bfloat16_again_where_training_stops(monkeypatch):
    teacher = tiny("llama").bfloat16()
    student = compress_model(teacher, make_method("svd"), 0.5, IDS).model

    def fails(*_given, **_named):
        raise NumericalError("stopped")

    monkeypatch.setattr(block_engine, "train", fails)
    with pytest.raises(NumericalError, match="stopped"):
        refine_blocks(student, teacher, find_layers(teacher), IDS, steps=4)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
