"""Ranks that hardware likes: multiples of 8 in wide layers, within the budget, and what was asked for elsewhere."""

import pytest
import torch

from command_line import PLAIN, call, small_model
from spectrim.engines.ranks import plan_ranks, rank_step
from spectrim.errors import UsageError
from spectrim.models.walk import Layer, Walk
from spectrim.registry import make_method


def layer(name: str, outputs: int, inputs: int) -> Layer:
    return Layer(name=name, block=0, outputs=outputs, inputs=inputs, has_bias=False)


def walk(*layers: Layer) -> Walk:
    return Walk(layers=layers, block_names=("b",), untouched=())


def falling(la: Layer) -> torch.Tensor:
    return 1.0 / torch.arange(1, min(la.outputs, la.inputs) + 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("asked", "side", "step"), [(0, 512, 8), (0, 511, 1), (16, 64, 16), (1, 4096, 1), (64, 24, 24)]
)
def test_the_step_of_a_layer(asked, side, step):
    assert rank_step(layer("a", side, 2 * side), asked) == step


@pytest.mark.parametrize("storage", ["factor", "pivot"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_wide_layers_get_multiples_of_eight_and_narrow_ones_any_rank(storage, allocation, keep):
    layers = walk(layer("wide", 640, 512), layer("tall", 1030, 600), layer("narrow", 96, 301))
    method = make_method("svd", None, {"storage": storage, "allocation": allocation})
    plan = plan_ranks(method, layers, {la.name: falling(la) for la in layers.layers}, keep)
    assert plan.numbers_after <= keep * plan.numbers_before
    # What no step of 8 fits into is lost: at most one step of each wide layer.
    lost = 8 * sum(la.outputs + la.inputs for la in layers.layers[:2])
    assert plan.numbers_after > keep * plan.numbers_before - lost
    for name in ("wide", "tall"):
        target = plan.targets[name]
        assert target.codec == "dense" or target.rank % 8 == 0


def test_any_rank_can_be_asked_for():
    layers = walk(layer("wide", 640, 512))
    free = make_method("svd", None, {"storage": "factor", "rank_multiple": 1})
    plan = plan_ranks(free, layers, {"wide": falling(layers.layers[0])}, 0.5)
    assert plan.targets["wide"].rank == 640 * 512 // 2 // 1152 == 142


def test_the_smallest_budget_can_still_be_met():
    layers = walk(layer("wide", 640, 512))
    method = make_method("svd", None, {"storage": "factor"})
    keep = 1160 / (640 * 512)  # rank 1 takes 1152 numbers, rank 8 takes 9216
    assert plan_ranks(method, layers, {"wide": falling(layers.layers[0])}, keep).targets["wide"].rank == 1


def test_a_multiple_out_of_range_is_refused():
    with pytest.raises(UsageError, match="rank_multiple"):
        make_method("svd", None, {"rank_multiple": -1})


def test_the_flag_is_the_option(tmp_path):
    model = small_model(tmp_path / "model")
    answer = call("plan", model, "--method", "svd", "--keep", "0.6", "--rank-multiple", "4", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["method"]["rank_multiple"] == 4
    assert {row["rank"] % 4 for row in answer.json["layers"] if row["codec"] != "dense"} == {0}
    made = call("compress", model, "--out", tmp_path / "out", *PLAIN, "--method", "svd", "--keep", "0.6", "--json",
                "--set", "rank_multiple=2", "--rank-multiple", "4")  # fmt: skip
    assert made.json["method"]["rank_multiple"] == 4
    assert [row["rank"] for row in made.json["layers"]] == [row["rank"] for row in answer.json["layers"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--any-size", "--method", "svd-llm"), "one order of all components"),
        (("--method", "acip"), "the masks that are left"),
        (("--method", "gptq", "--keep", "0.3"), "unknown option 'rank_multiple'"),
    ],
    ids=str,
)
def test_the_flag_is_refused_where_ranks_follow_from_something_else(tmp_path, words, said):
    answer = call("plan", small_model(tmp_path / "model"), *words, "--rank-multiple", "8")
    assert answer.code == 2
    assert said in answer.message
