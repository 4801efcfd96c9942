"""Feature mimicking: equal to whitened SVD where nothing is centred, and a bias that keeps the mean where it is."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spectrim
from memory_checkpoint import MemoryCheckpoint
from spectrim.engines.pipeline import compress_model
from spectrim.engines.plan import estimate
from spectrim.errors import UsageError
from spectrim.integrations.export import export_dense
from spectrim.models.load import resolve
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from spectrim.replacement import Target
from spectrim.request import Request
from spectrim.stats import Stats
from spectrim.store import open_checkpoint
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feature_projection(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """U U^T W with U the strongest eigenvectors of the outputs' second moment: no root, no inverse."""
    y = x @ weight.mT
    vectors = torch.linalg.eigh(y.mT @ y).eigenvectors[:, -rank:]
    return vectors @ (vectors.mT @ weight)


def stats_of(x: Tensor) -> Stats:
    return Stats(tokens=len(x), gram=x.mT @ x / len(x), mean=x.mean(0))


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
def test_feature_projection_equals_whitened_svd(shape):
    weight, x = normal(0, *shape), normal(1, 400, shape[1]) @ normal(2, shape[1], shape[1])
    for rank in (1, 4, 9):
        expected = feature_projection(weight, x, rank)
        whitened = make_method("svd-llm").compress(weight, stats_of(x), Target(rank=rank, codec="factor")).dense()
        assert float((whitened - expected).norm() / expected.norm()) < 1e-6
        centred = x - x.mean(0)
        afm = make_method("afm").compress(weight, stats_of(centred), Target(rank=rank, codec="factor"))
        expected = feature_projection(weight, centred, rank)
        assert float((afm.dense() - expected).norm() / expected.norm()) < 1e-6
        assert float(afm.bias.abs().max()) < 1e-9


def test_a_mean_far_from_zero_costs_no_rank():
    """svd-llm spends its first component on the mean; centred, the error is that of the best affine map."""
    weight, x = normal(0, 10, 8), normal(1, 500, 8) + 5
    stats, target = stats_of(x), Target(rank=2, codec="factor")
    y = x @ weight.mT
    afm, plain = (make_method(name).compress(weight, stats, target) for name in ("afm", "svd-llm"))
    assert afm.bias is not None
    optimum = float(torch.linalg.svdvals(y - y.mean(0))[2:].square().sum()) / len(x)
    assert float((y - x @ afm.dense().mT - afm.bias).square().sum()) / len(x) == pytest.approx(optimum, rel=1e-6)
    assert afm.predicted_error == pytest.approx(optimum, rel=1e-6)
    assert optimum < 0.9 * float((y - x @ plain.dense().mT).square().sum()) / len(x)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("architecture", ["llama", "llama-gqa-bias", "gpt2", "opt", "mixtral"])
def test_new_biases_are_counted_stored_and_loaded(architecture, storage, tmp_path):
    dense = tiny(architecture)
    options = {"storage": storage}
    small = spectrim.compress(dense, keep=0.6, method="afm", options=options, calibration=token_ids(16, 24))
    folder = small.save_pretrained(tmp_path / "small")
    walk = find_layers(dense)
    tensors = open_checkpoint(folder).tensors
    counted = sum(t.numel for n, t in tensors.items() if n.startswith(tuple(la.name + "." for la in walk.layers)))
    assert 0.58 * walk.numbers <= counted <= 0.6 * walk.numbers
    assert counted == small.outcome.plan.numbers_after
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = token_ids(3, 12, seed=2)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(small.model, ids), atol=1e-5, rtol=0)
    for layer in walk.layers:
        placed = small.outcome.placed[layer.name]
        assert (placed.bias is not None) == (layer.has_bias or placed.codec != "dense")
        if placed.codec != "dense":
            module = dense.get_submodule(layer.name)
            before = module.bias.detach() if layer.has_bias else torch.zeros(layer.outputs)
            assert not torch.allclose(placed.bias, before, atol=1e-4)


def test_the_bias_keeps_the_mean_output_of_the_dense_models_inputs():
    model = tiny("llama")
    outcome = compress_model(model, make_method("afm"), 0.6, IDS)
    name = "model.layers.1.mlp.up_proj"
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, x, _y: seen.append(x[0].detach()))
    logits_of(model, IDS)
    handle.remove()
    x = torch.cat(seen).flatten(0, 1)
    with torch.no_grad():
        mine, dense = outcome.model.get_submodule(name)(x).mean(0), model.get_submodule(name)(x).mean(0)
    torch.testing.assert_close(mine, dense, atol=1e-2 * float(dense.abs().max()), rtol=0)  # measured in bf16


def test_the_plan_counts_new_biases(tmp_path):
    folder = tmp_path / "dense"
    model = tiny("llama")
    model.save_pretrained(folder)
    asked = Request(model=str(folder), keep=0.6, method="afm", calib_windows=2, calib_length=8)
    facts = estimate(resolve(str(folder)), make_method("afm"), asked, dtype=torch.float32, device=torch.device("cpu"))
    outcome = compress_model(model, make_method("afm"), 0.6, IDS)
    assert facts["linear_numbers"]["after"] == outcome.plan.numbers_after
    assert {row["name"]: row["numbers"] for row in facts["layers"]} == {n: p.numbers for n, p in outcome.placed.items()}


def test_a_run_goes_on_with_the_means_of_its_checkpoint():
    checkpoint, model, method = MemoryCheckpoint(), tiny("llama"), make_method("afm")
    first = compress_model(model, method, 0.6, IDS, recovery=("kl:2",), checkpoint=checkpoint)
    again = compress_model(model, method, 0.6, IDS, recovery=("kl:2",), checkpoint=checkpoint)
    for name, placed in first.placed.items():
        assert torch.equal(placed.bias, again.placed[name].bias)


def test_what_cannot_be_done_with_moved_biases_is_refused(tmp_path: Path):
    model = tiny("llama")
    with pytest.raises(UsageError, match="refit and reconstruct solve for factors without the bias"):
        compress_model(model, make_method("afm"), 0.6, IDS, recovery=("refit",))
    small = spectrim.compress(model, keep=0.6, method="afm", calibration=IDS)
    folder = resolve(str(small.save_pretrained(tmp_path / "small")))
    with pytest.raises(
        UsageError, match=r"14 layers have a bias that the architecture has no place for \(first: model"
    ):
        export_dense(folder, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
