"""What a plan counts is what a run does: tokens through blocks, stage by stage, counted in both."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from spectrim.engines.passes import Passes, clock_passes
from spectrim.engines.pipeline import compress_model
from spectrim.engines.plan_costs import Costs, Sizes, coordinates, distinct_inputs
from spectrim.engines.plan_layers import LayerSeconds
from spectrim.engines.plan_memory import KERNEL_BYTES, MOST_KERNELS, kernels
from spectrim.engines.plan_time import seconds_by_stage, step_of
from spectrim.engines.run import CPU_BATCH
from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import root_of
from spectrim.machine import Rates
from spectrim.method import Method
from spectrim.models.walk import find_layers, shared_inputs
from spectrim.nn.spectral import SpectralLinear
from spectrim.options import RECOVERY_BATCH, recovery_of
from spectrim.registry import make_method
from tiny_models import tiny, token_ids

FOREVER = Rates(
    device="cpu", computing_dtype="float32", products=1e30, full_products=1e30, copied=1e30, softmax=1e30, eigen=0.0
)
ONE_A_TOKEN = Passes(
    tokens=1, block=1.0, block_back=1.0, block_trained=1.0, head=0, head_back=0, sampled=0, compared=0, judged=0,
    short=0, short_head=0,
)  # fmt: skip
BACK_ALONE = dataclasses.replace(ONE_A_TOKEN, block=0.0)
WINDOWS, GRADIENTS, LENGTH = 16, 6, 24


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tokens that went through blocks, with and without gradients being kept."""
    found: Counter[str] = Counter()
    own = LlamaDecoderLayer.forward

    def counted(self: LlamaDecoderLayer, hidden_states: Tensor, *rest: Any, **kwargs: Any) -> Any:
        out = own(self, hidden_states, *rest, **kwargs)
        given = out[0] if isinstance(out, tuple) else out
        found["all"] += hidden_states.shape[:-1].numel()
        found["back"] += hidden_states.shape[:-1].numel() if given.requires_grad else 0
        return out

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    return found


def sizes_of(method: Method, recovery: tuple[str, ...], windows: int) -> Sizes:
    model = tiny("llama")
    return Sizes(
        walk=find_layers(model), hidden=model.config.hidden_size, vocabulary=model.config.vocab_size, keep=0.6,
        windows=WINDOWS, gradient_windows=GRADIENTS, length=LENGTH, eval_windows=0, bytes_read=0, bytes_written=0,
        training_windows=windows, batch=CPU_BATCH, steps=recovery_of(method, recovery),
    )  # fmt: skip


def planned(method: Method, sizes: Sizes, passes: Passes) -> float:
    """Tokens, since every pass takes a second a token and all else takes none."""
    stages, _ = seconds_by_stage(method, sizes, FOREVER, passes, start=0.0)
    return sum(seconds for stage, seconds in stages.items() if stage != "text")


@pytest.mark.parametrize(
    ("name", "options", "recovery"),
    [
        ("svd-llm", {}, ()),
        ("two-sided", {"coupling": "none", "propagate": 0.0}, ()),
        ("two-sided", {"propagate": 0.0}, ()),
        ("soco", {"coupling": "none", "propagate": 0.0, "steps": 3, "batch_size": 5}, ()),
        ("acip", {"steps": 4, "batch_size": 3, "adapter_rank": 2}, ()),
        ("acip", {"steps": 4, "batch_size": 3, "adapter_rank": 2, "target": "dense"}, ()),
        ("svd-llm", {}, ("kl:2",)),
        ("svd-llm", {}, ("block:3",)),
    ],
    ids=str,
)
def test_tokens_through_blocks(
    tokens: Counter[str], name: str, options: dict[str, Any], recovery: tuple[str, ...]
) -> None:
    method, model = make_method(name, options=options), tiny("llama")
    training = token_ids(RECOVERY_BATCH * 3, LENGTH)
    sizes = sizes_of(method, recovery, len(training))
    tokens.clear()
    compress_model(
        model, method, 0.6, training[:WINDOWS], training, recovery=recovery, gradient_windows=GRADIENTS
    )  # fmt: skip
    few = 8 * 40 * sizes.blocks  # of looking at how layers share inputs
    assert planned(method, sizes, ONE_A_TOKEN) == pytest.approx(tokens["all"], abs=few)
    assert planned(method, sizes, BACK_ALONE) == pytest.approx(tokens["back"], abs=few)


def test_newton_passes_no_more_than_planned(tokens: Counter[str]) -> None:
    method = make_method("soco", preset="fast", options={"propagate": 0.0})
    plain = dataclasses.replace(method, newton=0)
    sizes, ids = sizes_of(method, (), 0), token_ids(WINDOWS, LENGTH)
    counts = []
    for own in (method, plain):
        tokens.clear()
        compress_model(tiny("llama"), own, 0.6, ids, gradient_windows=GRADIENTS)
        counts.append((tokens["all"], tokens["back"]))
    stages = [seconds_by_stage(method, sizes, FOREVER, passes, start=0.0)[0] for passes in (ONE_A_TOKEN, BACK_ALONE)]
    most, back = stages[0]["newton"], stages[1]["newton"]
    assert counts[0][1] - counts[1][1] == back
    assert 0.5 * most <= counts[0][0] - counts[1][0] <= most  # the length is looked for until the loss rises


@pytest.mark.parametrize("option", [{"propagate": 0.5}, {"update": "sequential"}], ids=str)
def test_pairs_of_inputs(tokens: Counter[str], option: dict[str, Any]) -> None:
    """Blocks are left half-way, on average: the count is near, not exact."""
    name = "svd-llm" if "update" in option else "two-sided"
    method = make_method(name, options={**option, **({} if name == "svd-llm" else {"coupling": "none"})})
    tokens.clear()
    compress_model(tiny("llama"), method, 0.6, token_ids(WINDOWS, LENGTH), gradient_windows=GRADIENTS)
    # Passes that are left before their end are not counted above: of two models to every group of layers.
    sizes = sizes_of(method, (), 0)
    groups = sum(len(block) for block in distinct_inputs(sizes.walk)) / sizes.blocks
    windows = WINDOWS if "update" in option else GRADIENTS
    left = windows * LENGTH * sizes.blocks * groups
    assert planned(method, sizes, ONE_A_TOKEN) == pytest.approx(tokens["all"] + left, rel=0.05)


@pytest.mark.parametrize("kind", ["llama"])
def test_groups_that_share_an_input(kind: str) -> None:
    model = tiny(kind)
    walk = find_layers(model)
    assert sum(map(len, distinct_inputs(walk))) == len(shared_inputs(model, walk.layers))


def test_forming_weights_is_counted() -> None:
    """Operations on paper: a component of a weight (O, I) takes 2 O I of them, going back as many."""
    method = make_method("soco", options={"steps": 1, "batch_size": 1})
    sizes = sizes_of(method, (), 0)
    by_hand = sum(2 * min(la.outputs, la.inputs) * la.outputs * la.inputs for la in sizes.walk.layers)
    assert step_of(Costs(sizes, FOREVER, ONE_A_TOKEN), method).full == 2 * by_hand  # type: ignore[arg-type]


def test_coordinates_of_a_metric_are_counted() -> None:
    layer = SpectralLinear(
        Factors(torch.randn(12, 4).double(), torch.randn(4, 20).double()), None,
        root_of(torch.eye(12).double()), root_of(torch.eye(20).double()),
    )  # fmt: skip
    by_hand = 2 * layer.rank * (12**2 + 20**2)
    walk = find_layers(tiny("llama"))
    one = dataclasses.replace(walk.layers[0], outputs=12, inputs=20)
    only = dataclasses.replace(walk, layers=(one,))
    assert coordinates(only, keep=layer.rank * (12 + 20) / (12 * 20)) == pytest.approx(by_hand)


def test_passes_are_clocked_on_a_model_of_the_same_shapes() -> None:
    model = tiny("llama")
    walk = find_layers(model)
    before = torch.get_rng_state()
    given = {"windows": 4, "length": 64, "numbers": 1000}
    passes = clock_passes(model.config, walk, torch.device("cpu"), **given)
    assert isinstance(passes, Passes)
    assert torch.equal(torch.get_rng_state(), before)
    assert passes.tokens == 256
    assert all(value > 0 for value in dataclasses.asdict(passes).values())
    assert passes.block < passes.block_back <= passes.block_trained
    assert passes.head < passes.head_back
    assert passes.short > passes.block  # a whole pass of few tokens beside a single token of many
    assert model.config.num_hidden_layers == len(walk.block_names)  # the config that is given stays as it is


def test_a_block_too_large_for_a_plan_is_not_clocked() -> None:
    walk = find_layers(tiny("llama"))
    wide = tuple(dataclasses.replace(layer, outputs=1_000_000, inputs=1000) for layer in walk.layers)
    walk = dataclasses.replace(walk, layers=wide)
    told = clock_passes(tiny("llama").config, walk, torch.device("cpu"), windows=1, length=64, numbers=1)
    assert isinstance(told, str)
    assert "too many to be clocked" in told


def test_kernels_of_a_cpu_by_shapes() -> None:
    """Ranks of one share repeat shapes; ranks of their own make two products of every layer, in each stage."""
    uniform, own = (sizes_of(method, (), 0) for method in (make_method("svd"), make_method("asvd")))
    counts = [kernels(make_method("svd"), uniform), kernels(make_method("asvd", options={"allocation": "global"}), own)]
    shapes, layers = len({(la.outputs, la.inputs) for la in own.walk.layers}) + 1, len(own.walk.layers)
    assert counts[0] == {
        "calibrate": 0, "learn": 0, "recover": 0, "evaluate": KERNEL_BYTES * (2 * shapes + 2 * 2 * shapes)
    }  # fmt: skip
    assert counts[1]["calibrate"] == KERNEL_BYTES * shapes
    assert counts[1]["evaluate"] == KERNEL_BYTES * (shapes + 2 * shapes + 2 * 2 * layers)
    deep = dataclasses.replace(own, walk=dataclasses.replace(own.walk, layers=own.walk.layers * 100))
    most = kernels(make_method("asvd", options={"allocation": "global"}), deep)["evaluate"]
    assert most == KERNEL_BYTES * MOST_KERNELS


@pytest.mark.parametrize("name", ["trellis", "gptq"])
def test_tokens_of_methods_of_few_bits(tokens: Counter[str], name: str) -> None:
    """Of passes in running order those that are left before their end are not counted, as above."""
    options: dict[str, object] = {"window": 8} if name == "trellis" else {"group_size": 8}
    method, model = make_method(name, options=options), tiny("llama")
    tokens.clear()
    compress_model(model, method, 0.6, token_ids(WINDOWS, LENGTH), gradient_windows=GRADIENTS)
    sizes = sizes_of(method, (), 0)
    nothing = LayerSeconds(once={}, each_pass=0.0)
    stages, known = seconds_by_stage(method, sizes, FOREVER, ONE_A_TOKEN, nothing, start=0.0)
    assert known
    told = sum(seconds for stage, seconds in stages.items() if stage != "text")
    groups = sum(len(block) for block in distinct_inputs(sizes.walk)) / sizes.blocks
    left = WINDOWS * LENGTH * sizes.blocks * groups if name == "trellis" else 0
    assert told == pytest.approx(tokens["all"] + left, abs=8 * 40 * sizes.blocks)
