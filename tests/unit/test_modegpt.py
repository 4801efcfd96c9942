"""MoDeGPT on whole models: what it keeps, what it stores, who is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError
from spectrim.integrations.folder import finalise, write_folder
from spectrim.linalg.pivot import unpack_mask
from spectrim.methods.weights.modegpt import MoDeGPT
from spectrim.models.walk import find_layers
from spectrim.nn.narrow import NarrowLinear
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids

KINDS = ["llama", "llama-gqa-bias", "mistral", "qwen2"]
UNIFORM = MoDeGPT(allocation="uniform")


def narrow(model, path: str) -> NarrowLinear:
    module = model.get_submodule(path)
    assert isinstance(module, NarrowLinear)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_as_it_was_made_and_leaves_the_dense_one_alone(kind, tmp_path):
    dense = tiny(kind)
    before = state_of(dense)
    outcome = compress_model(dense, UNIFORM, 0.7, token_ids(8))
    assert_same_state(before, state_of(dense))
    write_folder(tmp_path, finalise(outcome, torch.float32, base_model="tiny"), None)
    ids = token_ids(2)
    assert torch.allclose(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits_of(outcome.model, ids), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.9, 0.75, 0.5])
def test_the_budget_is_used_up_to_one_channel_a_block(kind, keep):
    dense = tiny(kind)
    walk = find_layers(dense)
    outcome = compress_model(dense, UNIFORM, keep, token_ids(8))
    channel = 3 * 32 + 2
    assert 0 <= int(keep * walk.numbers) - outcome.plan.numbers_after < 2 * channel + 2


def test_pairs_stay_together_and_queries_keep_those_of_their_key_head():
    model = compress_model(tiny("llama-gqa-bias"), UNIFORM, 0.6, token_ids(8)).model
    q, k = (narrow(model, f"model.layers.0.self_attn.{n}_proj") for n in "qk")
    keys = unpack_mask(k.rows, 16).view(2, 2, 4)  # head, half, pair
    assert torch.equal(keys[:, 0], keys[:, 1])
    assert keys[:, 0].sum(1).tolist() == [2, 2]
    queries = unpack_mask(q.rows, 32).view(2, 2, 8)  # key head, query head, dimension
    assert torch.equal(queries[:, 0], keys.view(2, 8))
    assert torch.equal(queries[:, 1], keys.view(2, 8))


def test_the_parts_of_the_mlp_keep_the_same_channels():
    model = compress_model(tiny("llama-gqa-bias"), UNIFORM, 0.6, token_ids(8)).model
    gate, up, down = (narrow(model, f"model.layers.1.mlp.{n}_proj") for n in ("gate", "up", "down"))
    assert torch.equal(gate.rows, up.rows)
    assert torch.equal(gate.rows, down.columns)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_nothing_uses_are_cut_without_loss(kind):
    """Pairs, values and channels that are 0 in the dense model go first, and the logits stay."""
    dense = tiny(kind)
    with torch.no_grad():
        for block in dense.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for module in (attention.q_proj, attention.k_proj, attention.v_proj):
                dead = torch.arange(module.out_features) % 4 == 1  # of 8 dimensions: 1 and 5, a rotation pair
                module.weight[dead] = 0
                if module.bias is not None:
                    module.bias[dead] = 0
            dead = torch.arange(48) % 3 == 0
            mlp.up_proj.weight[dead] = 0
            if mlp.up_proj.bias is not None:
                mlp.up_proj.bias[dead] = 0
    small = compress_model(dense, UNIFORM, 0.76, token_ids(16)).model
    ids = token_ids(4, seed=5)
    if kind != "llama":  # its heads are not shared, its 8 pairs of 32 are the same ones
        assert narrow(small, "model.layers.0.self_attn.k_proj").kept_rows == 12
    before = logits_of(dense, ids)
    assert float((logits_of(small, ids) - before).abs().max()) < 2e-3 * float(before.abs().max())


def test_blocks_that_do_little_lose_more():
    dense = tiny("llama")
    with torch.no_grad():
        dense.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
        dense.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
    model = compress_model(dense, MoDeGPT(temperature=1.0), 0.7, token_ids(8)).model
    widths = [narrow(model, f"model.layers.{i}.mlp.gate_proj").kept_rows for i in (0, 1)]
    assert widths[0] > widths[1]


def test_moments_lose_less_than_magnitude():
    """KL to the dense model, on text that was not calibrated on."""
    dense, ids = tiny("llama-gqa-bias"), token_ids(16, seed=7)
    log_q = logits_of(dense, ids).log_softmax(-1)

    def lost(method: MoDeGPT) -> float:
        small = compress_model(dense, method, 0.7, token_ids(32)).model
        return float((log_q.exp() * (log_q - logits_of(small, ids).log_softmax(-1))).sum(-1).mean())

    assert lost(UNIFORM) < 0.8 * lost(MoDeGPT(allocation="uniform", rule="magnitude"))


def test_at_keep_1_nothing_is_cut():
    dense, ids = tiny("llama"), token_ids(2)
    outcome = compress_model(dense, MoDeGPT(), 1.0, token_ids(4))
    assert torch.equal(logits_of(outcome.model, ids), logits_of(dense, ids))


def test_others_are_refused_by_name():
    for kind in ("qwen3", "gpt2", "opt", "phi3"):
        with pytest.raises(UsageError, match=rf"modegpt works on llama, mistral, qwen2; .*'{kind}'"):
            MoDeGPT().check_model(tiny(kind).config, find_layers(tiny(kind)), 0.8)


def test_a_budget_that_leaves_no_mlp_is_refused():
    with pytest.raises(UsageError, match=r"leave no channel to its MLP; raise --keep"):
        compress_model(tiny("llama"), UNIFORM, 0.04, token_ids(4))
