"""Calibration statistics against slow float64 oracles, and that measuring leaves nothing behind."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spectrim.engines import measure as engine
from spectrim.engines.measure import autocast, frozen, measure
from spectrim.engines.pipeline import compress_model
from spectrim.errors import InputError, NumericalError
from spectrim.integrations.transformers import make_dense
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

INPUTS = frozenset({Stat.GRAM, Stat.MEAN, Stat.MEAN_ABS})
GRADIENTS = frozenset({Stat.OUTPUT_GRAD, Stat.FISHER})
EVERYTHING = INPUTS | GRADIENTS
ARCHITECTURES = ("llama-gqa-bias", "gpt2", "opt", "phi3")  # plain, transposed weights, flattened inputs, other order
IDS = token_ids(6, 10)


def fixed_labels(batch: Tensor) -> Tensor:
    """Labels that depend on the token alone, so that batches of any size agree."""
    return (batch * 5 + 3) % 64


def backward_from_fixed_labels(model: PreTrainedModel, batch: Tensor, _generator: object = None) -> None:
    with torch.enable_grad():
        logits = model(input_ids=batch, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), fixed_labels(batch).flatten(), reduction="sum").backward()


@pytest.fixture(autouse=True)
def float32_throughout(monkeypatch):
    """Products in bf16, where the CPU has them, would hide errors of a per cent."""
    monkeypatch.setattr(engine, "autocast", lambda _device: nullcontext())


@pytest.fixture
def known_labels(monkeypatch):
    monkeypatch.setattr(engine, "backward_from_sampled_labels", backward_from_fixed_labels)


def oracle(model: PreTrainedModel, ids: Tensor, *, clip: float | None = None) -> dict[str, dict[str, Tensor]]:
    """All statistics, window by window in float64; FISHER from autograd's own weight gradients."""
    wide = copy.deepcopy(model).double()
    names = [la.name for la in find_layers(model).layers]
    inputs: dict[str, list[Tensor]] = {n: [] for n in names}
    outputs: dict[str, list[Tensor]] = {n: [] for n in names}
    squares: dict[str, list[Tensor]] = {n: [] for n in names}

    def keep(name):
        def hook(_module, x, y):
            y.retain_grad()
            inputs[name].append(x[0].detach().flatten(0, -2))
            outputs[name].append(y)

        return hook

    for name in names:
        wide.get_submodule(name).register_forward_hook(keep(name))
    for window in ids.split(1):
        wide.zero_grad()
        backward_from_fixed_labels(wide, window)
        for name in names:
            module = wide.get_submodule(name)
            gradient = module.weight.grad
            squares[name].append((gradient.mT if isinstance(module, Conv1D) else gradient).square())
    found = {}
    for name in names:
        x, g = torch.cat(inputs[name]), torch.cat([y.grad.flatten(0, -2) for y in outputs[name]])
        if clip is not None:
            limit = clip * g.norm(dim=1).square().mean().sqrt()
            g = g * (limit / g.norm(dim=1, keepdim=True)).clamp(max=1)
        found[name] = {
            "gram": x.mT @ x / len(x),
            "mean": x.mean(0),
            "mean_abs": x.abs().mean(0),
            "output_grad": g.mT @ g / len(g),
            "fisher": torch.stack(squares[name]).mean(0),
        }
    return found


def assert_close(got: Tensor, want: Tensor, *, tolerance: float, what: str) -> None:
    """Largest difference relative to the largest entry."""
    assert got.shape == want.shape, what
    assert got.dtype == torch.float64, what
    difference = float((got - want).abs().max() / want.abs().max())
    assert difference <= tolerance, f"{what}: {difference:.2e}"


def assert_equal_stats(one: dict[str, Stats], other: dict[str, Stats], *, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        for stat in Stat:
            a, b = getattr(one[name], stat.value), getattr(other[name], stat.value)
            assert (a is None) == (b is None)
            if a is not None:
                assert_close(a, b, tolerance=tolerance, what=f"{name} {stat.value}")


# Values


@pytest.mark.fault(50)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_statistics_equal_the_float64_oracle(architecture, batch_size, known_labels):
    model = tiny(architecture)
    walk = find_layers(model)
    stats = measure(model, walk, IDS, EVERYTHING, batch_size=batch_size)
    expected = oracle(model, IDS)
    assert list(stats) == [la.name for la in walk.layers]
    for layer in walk.layers:
        assert stats[layer.name].tokens == IDS.numel()  # no padding: every token counts
        assert stats[layer.name].fisher.shape == (layer.outputs, layer.inputs)
        for key, want in expected[layer.name].items():
            assert want.abs().max() > 0 or "k_proj" in layer.name
            assert_close(getattr(stats[layer.name], key), want, tolerance=2e-5, what=f"{layer.name} {key}")


def test_large_gradients_are_clipped(known_labels, monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(engine, "GRADIENT_CLIP", 0.8)
    stats = measure(model, find_layers(model), IDS, frozenset({Stat.OUTPUT_GRAD}), batch_size=len(IDS))
    clipped, whole = oracle(model, IDS, clip=0.8), oracle(model, IDS)
    for name, found in stats.items():
        assert_close(found.output_grad, clipped[name]["output_grad"], tolerance=2e-5, what=name)
        assert found.output_grad.trace() < 0.95 * whole[name]["output_grad"].trace()


@pytest.mark.parametrize("needs", [{s} for s in Stat], ids=lambda needs: next(iter(needs)).value)
def test_only_what_was_asked_for_is_measured(needs, known_labels):
    model = tiny("llama")
    together = frozenset({Stat.SLOPE}) | INPUTS if Stat.SLOPE in needs else EVERYTHING  # labels of one kind in a pass
    everything = measure(model, find_layers(model), IDS, together)
    for name, stats in measure(model, find_layers(model), IDS, frozenset(needs)).items():
        for stat in Stat:
            value = getattr(stats, stat.value)
            if stat in needs:
                assert torch.equal(value, everything[name].get(stat))
            else:
                assert value is None


def test_no_needs_no_forward_pass():
    model = tiny("llama")
    model.forward = None  # calling it would fail
    stats = measure(model, find_layers(model), IDS, frozenset())
    assert all(s == Stats(tokens=60) for s in stats.values())
    assert len(stats) == 14


def test_a_compressed_model_measures_as_the_dense_one_it_stands_for(known_labels):
    model = tiny("llama-gqa-bias")
    small = compress_model(model, make_method("two-sided"), 0.6, IDS).model
    same = make_dense(copy.deepcopy(small))
    walk = find_layers(model)
    assert_equal_stats(measure(small, walk, IDS, EVERYTHING), measure(same, walk, IDS, EVERYTHING), tolerance=1e-4)


# Shared inputs, windows, batches


def test_shared_inputs_are_measured_once(monkeypatch):
    calls = []
    real = engine.add_gram
    monkeypatch.setattr(
        engine, "add_gram", lambda total, rows, **told: (calls.append(len(rows)), real(total, rows, **told))
    )
    model = tiny("llama")
    stats = measure(model, find_layers(model), IDS, INPUTS, batch_size=3)
    assert calls == [30] * 16  # two batches, two blocks, four inputs: q k v, o, gate up, down
    for i in range(2):
        block = f"model.layers.{i}"
        for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            first, *others = (stats[f"{block}.{n}"] for n in names)
            assert all(other.gram is first.gram and other.mean_abs is first.mean_abs for other in others)
        assert not torch.equal(stats[f"{block}.self_attn.q_proj"].gram, stats[f"{block}.self_attn.o_proj"].gram)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("windows", [1, 3, 5])
def test_gradient_windows_limit_gradients_only(windows, batch_size, known_labels):
    """Found: a batch that began inside the limit gave gradients of all its windows."""
    model = tiny("llama")
    walk = find_layers(model)
    limited = measure(model, walk, IDS, EVERYTHING, batch_size=batch_size, gradient_windows=windows)
    alone = measure(model, walk, IDS[:windows], EVERYTHING, batch_size=batch_size)
    whole = measure(model, walk, IDS, EVERYTHING, batch_size=batch_size)
    for name, stats in limited.items():
        assert stats.tokens == IDS.numel()
        for key, from_there in (("gram", whole), ("mean_abs", whole), ("output_grad", alone), ("fisher", alone)):
            want = getattr(from_there[name], key)
            assert_close(getattr(stats, key), want, tolerance=1e-6, what=f"{name} {key}")


def test_gradient_windows_beyond_the_text_mean_all(known_labels):
    model = tiny("llama")
    walk = find_layers(model)
    assert_equal_stats(
        measure(model, walk, IDS, EVERYTHING, gradient_windows=99), measure(model, walk, IDS, EVERYTHING), tolerance=0
    )


@pytest.mark.fault(55, 59)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_batch_size_does_not_matter(architecture, known_labels):
    model = tiny(architecture)
    walk = find_layers(model)
    one = measure(model, walk, IDS, EVERYTHING, batch_size=1)
    for batch_size in (2, 5, 6):
        assert_equal_stats(measure(model, walk, IDS, EVERYTHING, batch_size=batch_size), one, tolerance=1e-5)


@pytest.mark.fault(55, 59)
def test_the_batch_size_does_not_change_the_sampled_labels():
    model = tiny("llama")
    walk = find_layers(model)
    one = measure(model, walk, IDS, EVERYTHING, batch_size=1, seed=3)
    assert_equal_stats(measure(model, walk, IDS, EVERYTHING, batch_size=4, seed=3), one, tolerance=1e-5)


def test_progress_counts_windows():
    model, seen = tiny("llama"), []
    measure(model, find_layers(model), IDS, INPUTS, batch_size=4, progress=lambda *step: seen.append(step))
    assert seen == [("calibrate", 4, 6), ("calibrate", 6, 6)]
    seen.clear()
    measure(
        model, find_layers(model), IDS, EVERYTHING, batch_size=4, gradient_windows=3, progress=lambda *s: seen.append(s)
    )
    assert seen == [("calibrate", 3, 6), ("calibrate", 6, 6)]


@pytest.mark.fault(56)
def test_a_layer_that_never_runs_is_an_error():
    model = tiny("llama")
    model.model.layers[0].mlp.spare = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"model.layers.0.mlp.spare: no calibration token"):
        measure(model, find_layers(model), IDS, INPUTS)


def test_a_layer_that_gradients_never_reach_is_an_error():
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.spare = nn.Linear(32, 32)
    mlp.register_forward_pre_hook(lambda m, inputs: (m.spare(inputs[0].detach()), None)[1])
    with pytest.raises(InputError, match=r"model.layers.1.mlp.spare: no gradient reached"):
        measure(model, find_layers(model), IDS, EVERYTHING)


# Sampled labels


def sampled_labels(model: PreTrainedModel, batch: Tensor, generator: torch.Generator) -> Tensor:
    """The labels behind a backward pass: the gradient at the logits is `softmax - one_hot(label)`."""
    caught: dict[str, Tensor] = {}

    def hook(_module, _inputs, output):
        caught["logits"] = output.detach()
        output.register_hook(lambda g: caught.__setitem__("gradient", g))

    handle = model.lm_head.register_forward_hook(hook)
    engine.backward_from_sampled_labels(model, batch, generator)
    handle.remove()
    one_hot = caught["logits"].softmax(-1) - caught["gradient"]
    assert_one_hot(one_hot)
    return one_hot.argmax(-1)


def assert_one_hot(rows: Tensor) -> None:
    assert (rows.max(-1).values - 1).abs().max() < 1e-4
    assert (rows.sum(-1) - 1).abs().max() < 1e-4


def test_labels_follow_the_models_distribution():
    """Pearson's chi-square with 7 degrees of freedom: above 29.9 once in 10,000 honest runs."""
    model = tiny("llama", vocab_size=8, initializer_range=0.15, tie_word_embeddings=False)
    count = 20_000
    batch = torch.tensor([[5, 2]]).repeat(count, 1)
    p = logits_of(model, batch[:1])[0].softmax(-1)  # (2, 8)
    assert p.min() > 0.01
    assert (p[0] - p[1]).abs().max() > 0.02
    assert p.max() > 2 / 8  # far from uniform, or the test would see nothing
    labels = sampled_labels(model, batch, torch.Generator().manual_seed(0))
    for position in range(2):
        observed = torch.bincount(labels[:, position], minlength=8).double()
        expected = count * p[position].double()
        assert ((observed - expected).square() / expected).sum() < 29.9
    # Positions are drawn independently of each other: 63 degrees of freedom, once in a million above 63 + 5 deviations.
    pairs = torch.bincount(labels[:, 0] * 8 + labels[:, 1], minlength=64).double()
    expected = count * torch.outer(p[0], p[1]).flatten().double()
    assert ((pairs - expected).square() / expected).sum() < 63 + 5 * 126**0.5


def test_labels_are_seeded_and_go_on_from_batch_to_batch():
    model = tiny("llama")
    one, two = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    first = sampled_labels(model, IDS, one)
    assert torch.equal(first, sampled_labels(model, IDS, two))
    assert not torch.equal(first, sampled_labels(model, IDS, one))
    assert not torch.equal(first, sampled_labels(model, IDS, torch.Generator().manual_seed(1)))


def test_a_certain_model_always_gives_its_label():
    """The clamps of the Gumbel trick do not let an impossible token through."""
    model = tiny("llama", tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 64, bias=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.fill_(-100.0)
        model.lm_head.bias[17] = 0.0
    logits = logits_of(model, IDS)
    assert (logits.argmax(-1) == 17).all()
    stats = measure(model, find_layers(model), IDS, frozenset({Stat.OUTPUT_GRAD}))
    assert all(float(s.output_grad.abs().max()) < 1e-20 for s in stats.values())  # certain: no surprise, no gradient


# Not finite


@pytest.mark.fault(45)
@pytest.mark.parametrize(
    ("architecture", "damage", "first"),
    [
        ("llama", "model.layers.1.input_layernorm", "model.layers.1.self_attn.q_proj"),
        ("llama", "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.gate_proj"),
        ("llama", "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"),
        ("llama", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
        ("phi3", "model.layers.1.input_layernorm", "model.layers.1.self_attn.qkv_proj"),  # o_proj is defined before it
    ],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("needs", [INPUTS, EVERYTHING], ids=["inputs", "everything"])
def test_the_first_layer_that_is_not_finite_is_named(architecture, damage, first, value, needs):
    model = tiny(architecture)
    with torch.no_grad():
        model.get_submodule(damage).weight.view(-1)[3] = value
    before = state_of(model)
    with pytest.raises(NumericalError, match=rf"^{first}: the inputs are not finite .*calibration window 0 "):
        measure(model, find_layers(model), IDS, needs)
    for key in ("hooks", "training", "requires_grad", "grad"):
        assert state_of(model)[key] == before[key]


@pytest.mark.fault(45)
def test_the_batch_that_is_not_finite_is_named():
    model = tiny("llama")
    ids = IDS.clone()
    ids[ids == 63] = 0
    ids[4, 7] = 63
    with torch.no_grad():
        model.model.embed_tokens.weight[63, 2] = torch.nan
    with pytest.raises(NumericalError, match=r"layers.0.self_attn.q_proj.*calibration window 4 \(\d+ of 1024"):
        measure(model, find_layers(model), ids, frozenset({Stat.GRAM}), batch_size=2)


def change_gradient(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Put `change` between the gradient at a module's output and all that is before it."""

    def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(change)

    module.register_forward_hook(hook)


@pytest.mark.fault(45)
def test_a_bad_gradient_is_traced_to_where_it_began():
    """Gradients go backwards: the last bad layer in running order is the first that went bad."""
    model = tiny("llama")
    change_gradient(model.model.layers[0], lambda gradient: gradient * torch.nan)
    with pytest.raises(NumericalError, match=r"^model.layers.0.mlp.down_proj: the output gradients are not finite"):
        measure(model, find_layers(model), IDS, EVERYTHING)


@pytest.mark.fault(45)
def test_a_bad_fisher_entry_off_the_diagonal_is_seen():
    """Found: of the (48, 32) Fisher matrix only the diagonal was looked at, which ends at output 31."""
    model = tiny("llama")

    def spoil(gradient: Tensor) -> Tensor:
        spoiled = gradient.clone()
        spoiled[..., 40] = torch.nan
        return spoiled

    change_gradient(model.model.layers[1].mlp.up_proj, spoil)
    with pytest.raises(NumericalError, match=r"^model.layers.1.mlp.up_proj: the output gradients"):
        measure(model, find_layers(model), IDS, frozenset({Stat.FISHER}))


# Nothing is left behind


def mixed_state(architecture: str) -> PreTrainedModel:
    """A model in the middle of someone's fine-tuning: parts frozen, parts in evaluation mode."""
    model = tiny(architecture).train()
    blocks = model.get_submodule(find_layers(model).block_names[0].rpartition(".")[0])
    blocks[0].eval()
    for parameter in blocks[1].parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_model_is_as_before(architecture):
    """Found: a part in evaluation mode inside a model in training mode came back in training mode."""
    model = mixed_state(architecture)
    before = state_of(model)
    measure(model, find_layers(model), IDS, EVERYTHING, batch_size=2)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("needs", [INPUTS, EVERYTHING], ids=["inputs", "everything"])
def test_the_model_is_as_before_after_an_error(error, needs):
    model = mixed_state("llama")
    before = state_of(model)

    def stop(_stage: str, done: int, _total: int) -> None:
        if done >= 4:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        measure(model, find_layers(model), IDS, needs, batch_size=2, progress=stop)
    assert_same_state(before, state_of(model))


def test_training_mode_does_not_change_the_statistics(known_labels):
    """OPT in training mode drops activations and whole layers."""
    model = tiny("opt", dropout=0.5, layerdrop=0.9)
    walk = find_layers(model)
    want = measure(model, walk, IDS, EVERYTHING)
    for _ in range(3):
        assert_equal_stats(measure(model.train(), walk, IDS, EVERYTHING), want, tolerance=0)


def test_frozen_freezes_and_restores():
    model = mixed_state("llama")
    before = state_of(model)
    with frozen(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in model.modules())
    assert_same_state(before, state_of(model))


def test_weights_are_not_touched_by_gradients():
    model = tiny("llama")
    measure(model, find_layers(model), IDS, EVERYTHING)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("has_bf16", [True, False])
def test_autocast_follows_the_hardware(has_bf16, monkeypatch):
    monkeypatch.setattr(engine, "cpu_has_bf16", lambda: has_bf16)
    with autocast(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if has_bf16 else torch.float32)


def test_bf16_statistics_are_near_the_float32_ones(monkeypatch, known_labels):
    model = tiny("llama")
    walk = find_layers(model)
    exact = measure(model, walk, IDS, INPUTS)
    monkeypatch.setattr(engine, "autocast", lambda _device: torch.autocast("cpu", dtype=torch.bfloat16))
    rounded = measure(model, walk, IDS, INPUTS)
    assert_equal_stats(rounded, exact, tolerance=0.03)
    name = "model.layers.1.mlp.down_proj"
    assert not torch.equal(rounded[name].gram, exact[name].gram)
    assert weight_of(model.get_submodule(name)).dtype == torch.float32
