"""Coupled covariances against weight gradients of whole windows, from autograd, in float64."""

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.engines import couple as engine
from spectrim.engines import measure as measure_engine
from spectrim.engines.couple import couple
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.errors import NumericalError
from spectrim.linalg.curvature import toward, window_share
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from spectrim.stats import Coupling, Stat, Stats
from tiny_models import assert_same_state, state_of, tiny, token_ids

PLAIN = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
HOW = Coupling(0.01, 0.2)
IDS = token_ids(6, 10)


def backward_from_fixed_labels(model: PreTrainedModel, batch: Tensor, _generator: object = None) -> None:
    with torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ((batch * 5 + 3) % 64).flatten(), reduction="sum").backward()


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    for module in (engine, measure_engine):
        monkeypatch.setattr(module, "autocast", lambda _device: nullcontext())


@pytest.fixture
def known_labels(monkeypatch):
    monkeypatch.setattr(measure_engine, "backward_from_sampled_labels", backward_from_fixed_labels)


def shrunk(covariance: Tensor, ratio: float) -> Tensor:
    return (1 - ratio) * covariance + ratio * covariance.trace() / len(covariance) * torch.eye(len(covariance))


def oracle(model: PreTrainedModel, ids: Tensor, plain: dict[str, Stats]) -> dict[str, tuple[Tensor, Tensor]]:
    wide = copy.deepcopy(model).double()
    sums = {name: [0.0, 0.0, 0.0] for name in plain}
    inverses = {
        name: (torch.linalg.inv(shrunk(s.get(Stat.GRAM), 0.01)), torch.linalg.inv(shrunk(s.get(Stat.OUTPUT_GRAD), 0.2)))
        for name, s in plain.items()
    }
    for window in ids.split(1):
        wide.zero_grad()
        backward_from_fixed_labels(wide, window)
        for name, (a_inverse, b_inverse) in inverses.items():
            module = wide.get_submodule(name)
            g = module.weight.grad.mT if isinstance(module, Conv1D) else module.weight.grad
            outputs, inputs = g.shape
            sums[name][0] += g.mT @ b_inverse @ g / outputs
            sums[name][1] += g @ a_inverse @ g.mT / inputs
            sums[name][2] += float((b_inverse @ g @ a_inverse * g).sum()) / (outputs * inputs)
    n = ids.numel()
    return {name: (a / n, b / c) for name, (a, b, c) in sums.items()}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2", "opt", "phi3"])
def test_the_pair_equals_the_oracle(architecture, batch_size, known_labels):
    model = tiny(architecture)
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN, batch_size=batch_size)
    found = couple(model, walk, IDS, plain, HOW, batch_size=batch_size)
    expected, share = oracle(model, IDS, plain), window_share(len(IDS))
    assert list(found) == [la.name for la in walk.layers]
    for name, stats in found.items():
        for stat, coupled in zip((Stat.GRAM, Stat.OUTPUT_GRAD), expected[name], strict=True):
            got, want = stats.get(stat), toward(plain[name].get(stat), coupled, share)
            assert got.dtype == torch.float64
            assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max()), name
        assert stats.tokens == plain[name].tokens


@pytest.mark.parametrize(("half", "end"), [(0, "coupled"), (1e12, "plain")])
def test_the_two_ends_are_the_coupled_pair_and_the_plain_one(half, end, known_labels, monkeypatch):
    monkeypatch.setattr("spectrim.linalg.curvature.HALF_TRUST", half)
    model = tiny("llama")
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    found, coupled = couple(model, walk, IDS, plain, HOW), oracle(model, IDS, plain)
    for name, stats in found.items():
        both = plain[name].get(Stat.GRAM), plain[name].get(Stat.OUTPUT_GRAD)
        wants = coupled[name] if end == "coupled" else both
        for got, want in zip((stats.get(Stat.GRAM), stats.get(Stat.OUTPUT_GRAD)), wants, strict=True):
            assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max()), name


def test_layers_that_share_an_input_no_longer_share_its_matrix(known_labels):
    model = tiny("llama")
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    found = couple(model, walk, IDS, plain, HOW)
    q, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qv")
    assert plain[q].gram is plain[v].gram
    assert not torch.allclose(found[q].get(Stat.GRAM), found[v].get(Stat.GRAM), rtol=0.05)


def test_labels_are_those_of_the_first_pass(monkeypatch):
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_model: PreTrainedModel, batch: Tensor, generator: torch.Generator) -> None:
        seen.append((batch, torch.rand(3, generator=generator)))
        backward_from_fixed_labels(_model, batch)

    monkeypatch.setattr(measure_engine, "backward_from_sampled_labels", note)
    model = tiny("llama")
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN, batch_size=2, gradient_windows=3, seed=5)
    first, seen[:] = list(seen), []
    couple(model, walk, IDS[:3], plain, HOW, batch_size=2, seed=5)
    assert len(first) == len(seen) == 2
    assert all(torch.equal(a, b) for pair in zip(first, seen, strict=True) for a, b in zip(*pair, strict=True))


def test_gradients_are_clipped_as_in_the_first_pass(known_labels, monkeypatch):
    monkeypatch.setattr("spectrim.linalg.curvature.HALF_TRUST", 0)  # the plain pair is that of unclipped gradients
    model = tiny("llama")
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    whole = couple(model, walk, IDS, plain, HOW)
    monkeypatch.setattr(measure_engine, "GRADIENT_CLIP", 0.5)
    clipped = couple(model, walk, IDS, plain, HOW)
    for name in plain:
        assert float(clipped[name].get(Stat.GRAM).trace()) < 0.95 * float(whole[name].get(Stat.GRAM).trace())


@pytest.mark.parametrize("scale", [1e-12, 1e8])
def test_tiny_and_huge_gradients_only_scale_the_output_side(scale, monkeypatch):
    """Inverses are taken in units of the mean: 1 / 1e-24 squared does not fit float32."""

    def scaled(model: PreTrainedModel, batch: Tensor, _generator: object, factor: float) -> None:
        with torch.enable_grad():
            logits = model(input_ids=batch, use_cache=False).logits
            (factor * F.cross_entropy(logits.flatten(0, 1), batch.flatten(), reduction="sum")).backward()

    model = tiny("llama")
    walk = find_layers(model)
    found = []
    for factor in (1.0, scale):
        monkeypatch.setattr(measure_engine, "backward_from_sampled_labels", lambda *a, f=factor: scaled(*a, f))
        found.append(couple(model, walk, IDS, measure(model, walk, IDS, PLAIN), HOW))
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name].get(Stat.GRAM), one.get(Stat.GRAM), rtol=1e-3, atol=1e-6)
        b = found[1][name].get(Stat.OUTPUT_GRAD) / scale**2
        assert float((b - one.get(Stat.OUTPUT_GRAD)).abs().max()) < 1e-3 * float(one.get(Stat.OUTPUT_GRAD).abs().max())


def test_a_layer_without_any_gradient_keeps_the_plain_pair(known_labels):
    model = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    assert couple(model, walk, IDS, plain, HOW) == plain


def test_what_is_not_finite_is_an_error_that_names_the_layer(known_labels):
    model = tiny("llama")
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.self_attn\.q_proj: the coupled covariances"):
        couple(model, walk, IDS, plain, HOW)


def test_the_model_is_left_alone_and_progress_counts_windows():
    model, seen = tiny("opt").train(), []
    walk = find_layers(model)
    plain = measure(model, walk, IDS, PLAIN)
    before = state_of(model)
    couple(model, walk, IDS, plain, HOW, batch_size=4, progress=lambda *step: seen.append(step))
    assert_same_state(before, state_of(model))
    assert seen == [("couple", 4, 6), ("couple", 6, 6)]


class Expert(nn.Module):
    """Sees half of the tokens, in no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 32)
        chosen = rows[:, 0] > 0
        out = torch.zeros_like(rows)
        out[chosen] = self.up(rows[chosen])
        return out.view_as(x)


def test_tokens_of_an_expert_count_as_one_sequence_a_batch(known_labels):
    model = tiny("llama")
    model.model.layers[1].mlp = Expert()
    walk = find_layers(model)
    name = "model.layers.1.mlp.up"
    plain = measure(model, walk, IDS, PLAIN, batch_size=len(IDS))
    found = couple(model, walk, IDS, plain, HOW, batch_size=len(IDS))
    assert plain[name].tokens < IDS.numel()
    wide = copy.deepcopy(model).double()
    backward_from_fixed_labels(wide, IDS)
    g = wide.get_submodule(name).weight.grad
    want = g.mT @ torch.linalg.inv(shrunk(plain[name].get(Stat.OUTPUT_GRAD), 0.2)) @ g / 32 / plain[name].tokens
    want = toward(plain[name].get(Stat.GRAM), want, window_share(1))
    assert float((found[name].get(Stat.GRAM) - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_every_round_couples_over_the_gradient_windows(monkeypatch):
    calls = []
    real = engine.couple

    def note(model, walk, ids, *rest, **options):
        calls.append((len(ids), options["seed"], rest[1]))
        return real(model, walk, ids, *rest, **options)

    monkeypatch.setattr("spectrim.engines.run.couple", note)
    method = make_method("two-sided", options={"output_shrinkage": 0.3})
    outcome = compress_model(tiny("llama"), method, 0.6, IDS, gradient_windows=3, seed=7)
    assert calls == [(3, 7, Coupling(0.01, 0.3)), (3, 8, Coupling(0.01, 0.3))]
    assert "couple" in outcome.seconds
    compress_model(tiny("llama"), dataclasses.replace(method, coupling="none"), 0.6, IDS)
    assert len(calls) == 2
