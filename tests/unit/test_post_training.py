"""What the engines do for methods of the post-training family, against each method's own `compress`."""

import pytest
import torch

from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

IDS = token_ids(8, 16)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("name", ["fwsvd", "tfwsvd"])
def test_the_pipeline_places_what_compress_gives_at_the_planned_rank(name, storage):
    model = tiny("llama")
    method = make_method(name, options={"storage": storage})
    outcome = compress_model(model, method, 0.6, IDS, gradient_windows=8, seed=3)
    stats = measure(model, find_layers(model), IDS, method.needs, seed=3)
    low_rank = [n for n, target in outcome.plan.targets.items() if target.codec != "dense"]
    assert len(low_rank) > 10
    for layer in low_rank:
        weight = weight_of(model.get_submodule(layer)).detach()
        alone = method.compress(weight, stats[layer], outcome.plan.targets[layer])
        assert torch.allclose(outcome.placed[layer].dense(), alone.dense(), atol=1e-5), layer


def test_tfwsvd_is_not_its_start():
    model = tiny("llama")
    outcome = {
        name: compress_model(model, make_method(name), 0.6, IDS, gradient_windows=8) for name in ("fwsvd", "tfwsvd")
    }
    assert outcome["fwsvd"].plan == outcome["tfwsvd"].plan
    for layer, placed in outcome["tfwsvd"].placed.items():
        assert not torch.allclose(placed.dense(), outcome["fwsvd"].placed[layer].dense(), atol=1e-4)
    assert outcome["tfwsvd"].seconds["solve"] > 0


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_mpifa_is_whitened_svd_in_pivot_storage_with_its_reconstruction(architecture):
    model = tiny(architecture)
    plain = compress_model(model, make_method("svd-llm", options={"storage": "pivot"}), 0.6, IDS)
    mpifa = compress_model(model, make_method("mpifa"), 0.6, IDS)
    asked = compress_model(
        model, make_method("svd-llm", options={"storage": "pivot"}), 0.6, IDS, recovery=("reconstruct",)
    )
    assert mpifa.plan == plain.plan
    assert [str(done.step) for done in mpifa.recovered] == ["reconstruct"]
    assert mpifa.seconds["reconstruct"] > 0
    ours, theirs, before = (outcome.model.state_dict() for outcome in (mpifa, asked, plain))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(not torch.allclose(ours[key], before[key], atol=1e-3) for key in ours if "pivot" in key)
