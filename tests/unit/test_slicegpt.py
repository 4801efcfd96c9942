"""SliceGPT on whole models: what a rotation leaves alone, what the narrow model is, who is refused."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from spectrim.engines.pipeline import compress_model
from spectrim.engines.residual import block_influence, normalised_gram
from spectrim.errors import NumericalError, UsageError
from spectrim.integrations.folder import finalise, write_folder
from spectrim.linalg.slicing import principal_basis
from spectrim.methods.weights.slicegpt import SliceGPT, sliced, sliced_numbers
from spectrim.models.walk import find_layers
from tiny_models import assert_same_state, logits_of, state_of, tiny, token_ids, transformers_alone

KINDS = ["llama", "llama-gqa-bias", "mistral", "qwen2", "qwen3"]
NORMS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("input_layernorm", "post_attention_layernorm")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotation_alone_leaves_the_logits(kind):
    """The promise of the paper: to 1e-4 of the largest logit."""
    dense = tiny(kind)
    gram = normalised_gram(dense, [*NORMS, "model.norm"], token_ids(8))
    turned = sliced(dense, find_layers(dense), principal_basis(gram, 32))
    ids = token_ids(4, seed=5)
    before = logits_of(dense, ids)
    assert not torch.equal(turned.model.embed_tokens.weight, dense.model.embed_tokens.weight)
    assert float((logits_of(turned, ids) - before).abs().max()) < 1e-4 * max(1.0, float(before.abs().max()))


def test_cutting_directions_that_nothing_uses_changes_nothing():
    """A stream that lies in 24 of 32 dimensions is cut to 24 without loss, whatever the axes it is written in."""
    dense = tiny("llama-gqa-bias")
    basis = torch.linalg.qr(torch.randn(32, 24, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        dense.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight @ basis @ basis.mT)
        for block in dense.model.layers:
            for module in (block.self_attn.o_proj, block.mlp.down_proj):
                module.weight.copy_(basis @ basis.mT @ module.weight)
                module.bias.copy_(basis @ basis.mT @ module.bias)
    small = compress_model(dense, SliceGPT(), 0.78, token_ids(8)).model
    assert small.config.hidden_size == 24
    ids = token_ids(4, seed=5)
    # Where products are in bf16, measured directions are off by its rounding.
    assert torch.allclose(logits_of(small, ids), logits_of(dense, ids), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_model_stays_as_it_was_its_config_too(kind):
    dense = tiny(kind)
    before = state_of(dense)
    compress_model(dense, SliceGPT(), 0.8, token_ids(4))
    assert_same_state(before, state_of(dense))


def test_what_is_written_loads_without_spectrim(tmp_path):
    outcome = compress_model(tiny("llama"), SliceGPT(), 0.8, token_ids(8))
    write_folder(tmp_path / "out", finalise(outcome, torch.float32, base_model="tiny"), None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["hidden_size"], config["head_dim"], config["tie_word_embeddings"]) == (24, 8, False)
    with transformers_alone():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(found) is LlamaForCausalLM
    assert {type(m).__module__.split(".")[0] for m in found.modules()} == {"torch", "transformers"}
    there = logits_of(found, torch.arange(16)[None])
    assert torch.allclose(there, logits_of(outcome.model, torch.arange(16)[None]), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loads_as_it_was_made(kind, tmp_path):
    outcome = compress_model(tiny(kind), SliceGPT(), 0.8, token_ids(8))
    write_folder(tmp_path, finalise(outcome, torch.float32, base_model="tiny"), None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = token_ids(2)
    assert torch.allclose(logits_of(again, ids), logits_of(outcome.model, ids), atol=1e-5)
    assert again.config.hidden_size % again.config.num_attention_heads == 0


def test_a_tied_head_is_untied_and_that_is_said():
    dense = tiny("llama")
    outcome = compress_model(dense, SliceGPT(), 0.8, token_ids(8))
    said = [w for w in outcome.warnings if "shared one matrix of 2,048 numbers" in w]
    assert len(said) == 1
    assert "3,072 numbers in both" in said[0]
    assert outcome.model.lm_head.weight is not outcome.model.model.embed_tokens.weight
    untied = compress_model(tiny("qwen2"), SliceGPT(), 0.8, token_ids(8))
    assert not [w for w in untied.warnings if "shared one matrix" in w]


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7, 0.5])
def test_the_hidden_size_is_the_largest_within_the_budget(keep):
    dense = tiny("llama-gqa-bias")
    walk = find_layers(dense)
    outcome = compress_model(dense, SliceGPT(), keep, token_ids(4))
    width, allowed = outcome.model.config.hidden_size, int(keep * walk.numbers)
    counted = sum(p.numel() for n, p in outcome.model.named_parameters() if "_proj" in n)
    assert counted == sliced_numbers(walk, 32, width) == outcome.plan.numbers_after <= allowed
    assert sliced_numbers(walk, 32, width + 4) > allowed


def test_a_multiple_is_kept_to():
    assert compress_model(tiny("llama"), SliceGPT(multiple=16), 0.9, token_ids(4)).model.config.hidden_size == 16


def test_principal_directions_are_better_than_others():
    """Within the stream: the other bases lose more of it. (Perplexity of a random model says nothing.)"""
    dense = tiny("llama")
    gram = normalised_gram(dense, [*NORMS, "model.norm"], token_ids(8))
    kept = {}
    for basis in ("pca", "variance", "random"):
        q = SliceGPT(basis=basis).directions(gram, 16, 0)
        kept[basis] = float((q.mT @ gram @ q).trace())
    assert kept["pca"] > kept["variance"] > kept["random"]


def test_others_are_refused_by_name():
    for kind in ("gpt2", "opt", "gemma", "phi3"):
        name = {"phi3": "phi3"}.get(kind, kind)
        with pytest.raises(UsageError, match=rf"slicegpt works on llama, mistral, qwen2, qwen3; .*'{name}'"):
            SliceGPT().check_model(tiny(kind).config, find_layers(tiny(kind)), 0.8)


def test_a_budget_that_no_width_fits_is_refused_with_the_least():
    dense = tiny("llama-gqa-bias")
    with pytest.raises(UsageError, match=r"multiples of 4 .* smallest stores [\d,]+ numbers .* raise --keep"):
        SliceGPT().check_model(dense.config, find_layers(dense), 0.05)


# ---------- what is measured


def test_the_gram_is_that_of_the_normalised_stream_token_by_token():
    dense, ids = tiny("llama"), token_ids(3, 5).clamp(min=1)  # token 0 pads: its embedding is 0
    seen: list[torch.Tensor] = []
    handles = [
        dense.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(i[0].reshape(-1, 32)))
        for name in (*NORMS, "model.norm")
    ]
    logits_of(dense, ids)
    for handle in handles:
        handle.remove()
    slow = torch.zeros(32, 32, dtype=torch.float64)
    for rows in seen:
        for row in rows.double():
            unit = row / row.square().mean().sqrt()
            slow += torch.outer(unit, unit)
    found = normalised_gram(dense, [*NORMS, "model.norm"], ids)
    assert torch.allclose(found, slow / (15 * 5), atol=0.02)  # products in bf16 where the hardware has them


def test_influence_is_one_minus_the_mean_cosine():
    dense, ids = tiny("llama"), token_ids(3, 5).clamp(min=1)
    hidden = []
    handles = [
        block.register_forward_hook(lambda m, i, o: hidden.append((i[0], o if isinstance(o, torch.Tensor) else o[0])))
        for block in dense.model.layers
    ]
    logits_of(dense, ids)
    for handle in handles:
        handle.remove()
    slow = []
    for before, after in hidden:
        pairs = zip(before.reshape(-1, 32).double(), after.reshape(-1, 32).double(), strict=True)
        slow.append(1 - sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / 15)
    assert block_influence(dense, find_layers(dense), ids).tolist() == pytest.approx(slow, abs=5e-3)


def test_a_stream_that_is_not_finite_is_refused():
    dense = tiny("llama")
    with torch.no_grad():
        assert isinstance(dense.model.embed_tokens, nn.Embedding)
        dense.model.embed_tokens.weight[3, 0] = float("nan")
    with pytest.raises(NumericalError, match="residual stream is not finite"):
        normalised_gram(dense, ["model.norm"], torch.full((2, 4), 3))
