"""Which layers are found in each architecture, how they are described, which inputs they share, what is left alone."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from spectrim.errors import InputError, UsageError
from spectrim.models.walk import Layer, find_layers, is_linear, shared_inputs, stream_readers, weight_of
from tiny_models import CONFIGS, assert_same_state, state_of, tiny

Row = tuple[str, int, int, bool]  # name below its block, outputs, inputs, bias


def gated(*, heads: int = 4, key_heads: int = 2, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False):
    """The seven layers of a Llama-like block with head size 8."""
    return [
        ("self_attn.q_proj", 8 * heads, 32, qkv_bias),
        ("self_attn.k_proj", 8 * key_heads, 32, qkv_bias),
        ("self_attn.v_proj", 8 * key_heads, 32, qkv_bias),
        ("self_attn.o_proj", 32, 8 * heads, o_bias),
        ("mlp.gate_proj", 48, 32, mlp_bias),
        ("mlp.up_proj", 48, 32, mlp_bias),
        ("mlp.down_proj", 32, 48, mlp_bias),
    ]


GATED_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
EMBEDDING = ("model.embed_tokens.weight", 2048, "input embedding")
HEAD = ("lm_head.weight", 2048, "outside the decoder blocks")
STACKED = "stacked experts (3-D parameter) are not supported yet"


def block(
    prefix: str, rows: list[Row], groups: list[list[str]] | None, untouched: list[tuple[str, int, str]]
) -> dict[str, Any]:
    """What is expected of a model with the same layers in both blocks."""
    return {
        "blocks": (f"{prefix}.0", f"{prefix}.1"),
        "rows": [(f"{prefix}.{i}.{name}", *rest) for i in range(2) for name, *rest in rows],
        "groups": [[f"{prefix}.{i}.{n}" for n in g] for i in range(2) for g in groups or [[row[0]] for row in rows]],
        "untouched": untouched,
    }


def moe(name: str, gate: str, inner: int, blocks: tuple[int, ...]) -> list[tuple[str, int, str]]:
    """What is left alone in blocks with four experts."""
    found = []
    for i in blocks:
        path = f"model.layers.{i}.mlp"
        found.append((f"{path}.experts.gate_up_proj", 4 * 2 * inner * 32, STACKED))
        found.append((f"{path}.experts.down_proj", 4 * inner * 32, STACKED))
        found.append((f"{path}.{gate}.weight", 4 * 32, f"not a linear layer ({name})"))
    return found


EXPECTED: dict[str, dict[str, Any]] = {
    "llama": block("model.layers", gated(key_heads=4), GATED_GROUPS, [EMBEDDING]),
    "llama-gqa-bias": block(
        "model.layers", gated(qkv_bias=True, o_bias=True, mlp_bias=True), GATED_GROUPS, [EMBEDDING, HEAD]
    ),
    "mistral": block("model.layers", gated(), GATED_GROUPS, [EMBEDDING, HEAD]),
    "qwen2": block("model.layers", gated(qkv_bias=True), GATED_GROUPS, [EMBEDDING, HEAD]),
    "qwen3": block("model.layers", gated(), GATED_GROUPS, [EMBEDDING, HEAD]),
    "gemma": block("model.layers", gated(key_heads=1), GATED_GROUPS, [EMBEDDING]),
    "gemma3": block("model.layers", gated(key_heads=1), GATED_GROUPS, [EMBEDDING]),
    "opt": block(
        "model.decoder.layers",
        [
            ("self_attn.k_proj", 32, 32, True),
            ("self_attn.v_proj", 32, 32, True),
            ("self_attn.q_proj", 32, 32, True),
            ("self_attn.out_proj", 32, 32, True),
            ("fc1", 48, 32, True),
            ("fc2", 32, 48, True),
        ],
        [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.out_proj"], ["fc1"], ["fc2"]],
        [
            ("model.decoder.embed_tokens.weight", 64 * 16, "input embedding"),
            ("model.decoder.embed_positions.weight", 66 * 32, "outside the decoder blocks"),
            ("model.decoder.project_out.weight", 16 * 32, "outside the decoder blocks"),
            ("model.decoder.project_in.weight", 16 * 32, "outside the decoder blocks"),
        ],
    ),
    "gpt-neox": block(
        "gpt_neox.layers",
        [
            ("attention.query_key_value", 96, 32, True),
            ("attention.dense", 32, 32, True),
            ("mlp.dense_h_to_4h", 48, 32, True),
            ("mlp.dense_4h_to_h", 32, 48, True),
        ],
        None,
        [("gpt_neox.embed_in.weight", 2048, "input embedding"), HEAD],
    ),
    "gpt2": block(
        "transformer.h",
        [
            ("attn.c_attn", 96, 32, True),
            ("attn.c_proj", 32, 32, True),
            ("mlp.c_fc", 48, 32, True),
            ("mlp.c_proj", 32, 48, True),
        ],
        None,
        [
            ("transformer.wte.weight", 2048, "input embedding"),
            ("transformer.wpe.weight", 2048, "outside the decoder blocks"),
        ],
    ),
    # Phi-3 defines o_proj before qkv_proj: layers come as defined, groups as run.
    "phi3": block(
        "model.layers",
        [
            ("self_attn.o_proj", 32, 32, False),
            ("self_attn.qkv_proj", 64, 32, False),
            ("mlp.gate_up_proj", 96, 32, False),
            ("mlp.down_proj", 32, 48, False),
        ],
        [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        [EMBEDDING, HEAD],
    ),
    # Falcon's layers are a subclass of nn.Linear; attention and mlp read the same normalised states.
    "falcon": block(
        "transformer.h",
        [
            ("self_attention.query_key_value", 48, 32, False),
            ("self_attention.dense", 32, 32, False),
            ("mlp.dense_h_to_4h", 48, 32, False),
            ("mlp.dense_4h_to_h", 32, 48, False),
        ],
        [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], ["mlp.dense_4h_to_h"]],
        [("transformer.word_embeddings.weight", 2048, "input embedding")],
    ),
    # The first block is dense, the second has experts.
    "qwen3-moe": {
        "blocks": ("model.layers.0", "model.layers.1"),
        "rows": [(f"model.layers.0.{n}", *rest) for n, *rest in gated()]
        + [(f"model.layers.1.{n}", *rest) for n, *rest in gated()[:4]],
        "groups": [[f"model.layers.0.{n}" for n in g] for g in GATED_GROUPS]
        + [[f"model.layers.1.{n}" for n in g] for g in GATED_GROUPS[:2]],
        "untouched": [EMBEDDING, *moe("Qwen3MoeTopKRouter", "gate", 16, (1,)), HEAD],
    },
    "mixtral": block(
        "model.layers",
        gated()[:4],
        GATED_GROUPS[:2],
        [EMBEDDING, *moe("MixtralTopKRouter", "gate", 48, (0, 1)), HEAD],
    ),
    # Phi-MoE's router derives from nn.Linear but returns the choice of experts: it must not be replaced.
    "phimoe": block(
        "model.layers",
        gated()[:4],
        GATED_GROUPS[:2],
        [EMBEDDING, *moe("PhimoeTopKRouter", "router", 48, (0, 1)), HEAD],
    ),
}


@pytest.fixture(params=sorted(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.fault(56)
def test_layers_are_found_and_described(architecture):
    walk = find_layers(tiny(architecture))
    expected = EXPECTED[architecture]
    assert [(la.name, la.outputs, la.inputs, la.has_bias) for la in walk.layers] == expected["rows"]
    assert walk.block_names == expected["blocks"]
    assert [la.block for la in walk.layers] == [
        next(i for i, b in enumerate(expected["blocks"]) if la.name.startswith(b + ".")) for la in walk.layers
    ]


def test_everything_else_is_named_with_the_reason(architecture):
    walk = find_layers(tiny(architecture))
    assert sorted(walk.untouched) == sorted(EXPECTED[architecture]["untouched"])


def test_layers_and_untouched_cover_every_matrix_once(architecture):
    model = tiny(architecture)
    walk = find_layers(model)
    in_layers = sum(p.numel() for la in walk.layers for p in model.get_submodule(la.name).parameters())
    assert walk.numbers == in_layers
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert sum(la.weight_numbers for la in walk.layers) + sum(n for _, n, _ in walk.untouched) == matrices


def test_shared_inputs_are_grouped_in_running_order(architecture):
    model = tiny(architecture)
    before = state_of(model)
    groups = shared_inputs(model, find_layers(model).layers)
    assert groups == EXPECTED[architecture]["groups"]
    assert_same_state(before, state_of(model))  # hooks gone


def test_groups_really_read_equal_inputs(architecture):
    """The oracle: inputs compared by value, on other tokens than those that found the groups."""
    model = tiny(architecture)
    layers = find_layers(model).layers
    seen: dict[str, torch.Tensor] = {}
    for layer in layers:
        model.get_submodule(layer.name).register_forward_pre_hook(
            lambda _m, inputs, name=layer.name: seen.__setitem__(name, inputs[0].detach().flatten(0, -2).clone())
        )
    with torch.no_grad():
        model(input_ids=torch.randint(0, 64, (2, 11)), use_cache=False)
    groups = shared_inputs(model, layers)
    for group in groups:
        for name in group[1:]:
            assert torch.equal(seen[group[0]], seen[name])
    leaders = [seen[g[0]] for g in groups]
    for i, one in enumerate(leaders):
        assert not any(one.shape == other.shape and torch.equal(one, other) for other in leaders[:i]), groups[i]


def test_the_walk_needs_no_weights(architecture):
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny(architecture).config)
    assert find_layers(empty) == find_layers(tiny(architecture))


def test_phimoe_router_still_routes_after_compression():
    """Found as a plain linear layer, the router lost its routing and the model crashed."""
    import spectrim

    model = tiny("phimoe")
    ids = torch.randint(0, 64, (4, 8))
    small = spectrim.compress(model, keep=0.7, method="two-sided", calibration=ids).model
    assert torch.isfinite(small(ids).logits).all()
    assert type(small.model.layers[0].mlp.router) is type(model.model.layers[0].mlp.router)


def test_is_linear_refuses_what_only_derives_from_linear():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert is_linear(nn.Linear(2, 3))
    assert is_linear(Conv1D(3, 2))
    assert is_linear(Named(2, 3))
    assert not is_linear(Doubling(2, 3))
    assert not is_linear(nn.Embedding(2, 3))
    assert not is_linear(nn.Conv1d(2, 3, 1))


def test_weight_of_is_a_view_with_outputs_first():
    linear, conv = nn.Linear(2, 3), Conv1D(3, 2)
    x = torch.randn(4, 2)
    for module in (linear, conv):
        weight = weight_of(module)
        assert weight.shape == (3, 2)
        assert weight.data_ptr() == module.weight.data_ptr()
        torch.testing.assert_close(module(x), x @ weight.mT + module.bias)


def test_layer_counts_its_bias():
    assert Layer(name="a", block=0, outputs=3, inputs=5, has_bias=True).numbers == 18
    assert Layer(name="a", block=0, outputs=3, inputs=5, has_bias=False).numbers == 15


@pytest.mark.fault(68)
def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(UsageError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_layers(T5ForConditionalGeneration(config))


def test_a_model_without_blocks_is_refused():
    model = tiny("llama", num_hidden_layers=0)
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of blocks with linear layers"):
        find_layers(model)


@pytest.mark.fault(56, 72)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
        ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"),
    ],
)
def test_shared_weights_are_refused_by_name(first, second):
    model = tiny("llama")
    model.get_submodule(second).weight = model.get_submodule(first).weight
    with pytest.raises(InputError, match=rf"{second} shares its weight with {first}"):
        find_layers(model)


@pytest.mark.fault(56)
def test_one_module_in_two_blocks_is_refused():
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(InputError, match="shares its weight"):
        find_layers(model)


def test_hooks_are_removed_when_the_model_fails():
    model = tiny("llama")
    before = state_of(model)
    layers = find_layers(model).layers

    def broken(*_args, **_kwargs):
        raise RuntimeError("no forward today")

    model.model.norm.forward = broken
    with pytest.raises(RuntimeError, match="no forward today"):
        shared_inputs(model, layers)
    del model.model.norm.forward
    assert_same_state(before, state_of(model))


def test_equal_values_in_different_tensors_are_not_shared():
    """A copy is another tensor: its layers must not be grouped, even when every value is the same."""
    model = tiny("llama")
    inner = model.model.layers[0].mlp.up_proj
    inner.forward = lambda x: nn.functional.linear(x, inner.weight)
    inner.register_forward_pre_hook(lambda _m, inputs: (inputs[0].clone(),))
    groups = shared_inputs(model, find_layers(model).layers)
    assert ["model.layers.0.mlp.gate_proj"] in groups
    assert ["model.layers.0.mlp.up_proj"] in groups


@pytest.mark.fault(56)
def test_a_layer_that_does_not_run_stands_alone_at_the_end():
    model = tiny("llama")
    model.model.layers[0].mlp.spare = nn.Linear(32, 32)
    groups = shared_inputs(model, find_layers(model).layers)
    assert groups[-1] == ["model.layers.0.mlp.spare"]
    assert groups[:-1] == EXPECTED["llama"]["groups"]


READERS = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
    "gemma3": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
    "qwen3": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
    "opt": "self_attn.q_proj self_attn.k_proj self_attn.v_proj fc1",
    "gpt2": "attn.c_attn mlp.c_fc",
    "gpt-neox": "attention.query_key_value mlp.dense_h_to_4h",
    "phi3": "self_attn.qkv_proj mlp.gate_up_proj",
    "falcon": "self_attention.query_key_value mlp.dense_h_to_4h",
    "mixtral": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
}
"""By architecture, what reads the residual stream in every block; experts read rows that were picked out of it."""


@pytest.mark.parametrize("architecture", READERS)
def test_readers_of_the_residual_stream_are_those_that_read_a_norm(architecture):
    model = tiny(architecture)
    before = state_of(model)
    walk = find_layers(model)
    expected = {f"{block}.{name}" for block in walk.block_names for name in READERS[architecture].split()}
    assert stream_readers(model, walk.layers) == expected
    assert_same_state(before, state_of(model))


def test_every_architecture_has_its_expectation():
    assert EXPECTED.keys() == CONFIGS.keys()
