"""Statistics behind compressed blocks, against hooks on the whole compressed model."""

import pytest
import torch

from spectrim.engines.blockwise import block_by_block
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.models.walk import find_layers, weight_of
from spectrim.registry import make_method
from spectrim.stats import Stat
from tiny_models import tiny, token_ids

IDS = token_ids(6, 16)
NEEDS = frozenset({Stat.GRAM, Stat.MEAN_ABS})


@pytest.mark.parametrize("architecture", ["llama-gqa-bias", "gpt2"])
def test_untouched_blocks_have_the_statistics_of_the_whole_model(architecture):
    model = tiny(architecture)
    walk, found = find_layers(model), {}
    block_by_block(model, walk, IDS, NEEDS, found.update, batch_size=4)
    whole = measure(model, walk, IDS, NEEDS)
    assert found.keys() == whole.keys()
    for name, own in found.items():
        assert own.tokens == whole[name].tokens
        torch.testing.assert_close(own.gram, whole[name].gram, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own.mean_abs, whole[name].mean_abs, rtol=1e-5, atol=1e-6)


def test_a_block_sees_what_the_changed_blocks_before_it_make_and_its_own_layers_as_they_were():
    dense = tiny("llama")
    walk = find_layers(dense)
    blocks = {layer.name: layer.block for layer in walk.layers}
    model, found = skeleton(dense), {}

    def place(stats):
        found.update(stats)
        for name in stats:
            halved = torch.nn.Linear(*reversed(weight_of(dense.get_submodule(name)).shape), bias=False)
            halved.weight.data = 0.5 * weight_of(dense.get_submodule(name)).detach()
            model.set_submodule(name, halved)

    block_by_block(model, walk, IDS, NEEDS, place)
    for last in range(len(walk.block_names)):
        partly = skeleton(dense)
        for name, block in blocks.items():
            if block < last:
                partly.set_submodule(name, model.get_submodule(name))
        expected = measure(partly, walk, IDS, NEEDS)
        for name, block in blocks.items():
            if block == last:
                torch.testing.assert_close(found[name].gram, expected[name].gram, rtol=1e-5, atol=1e-6)
    first = walk.layers[0].name
    assert torch.equal(weight_of(dense.get_submodule(first)), weight_of(tiny("llama").get_submodule(first)))


@pytest.mark.parametrize("name", ["gptq", "eora"])
def test_methods_differ_after_the_first_block_only(name):
    dense = tiny("llama")
    options = {"group_size": 8, "search": False}
    once, behind = (
        compress_model(dense, make_method(name, options={**options, "sequential": value}), 0.9, IDS).model.state_dict()
        for value in (False, True)
    )
    codes = [key for key in once if key.endswith("codes")]
    assert all(torch.equal(once[key], behind[key]) for key in codes if ".0.self_attn.q" in key)
    assert any(not torch.equal(once[key], behind[key]) for key in codes if ".layers.1." in key)
