"""ACIP in all sizes from one run: the order of extinction as steps, adapters first and counted, loaded, exported."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from command_line import PLAIN, call, small_model
from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim import any_size_job
from spectrim.engines.any_size import AnySize, build, compress_any_size
from spectrim.engines.layerwise import decompose_all
from spectrim.engines.learned import skeleton
from spectrim.engines.masked import Pressing, relax
from spectrim.engines.masked_order import order_by_extinction
from spectrim.engines.pipeline import compress_model
from spectrim.errors import InputError, UsageError
from spectrim.integrations.export import export_size
from spectrim.integrations.folder import copy_in, write_nested
from spectrim.linalg.extinction import counts_within, first_of_each
from spectrim.linalg.ladder import are_levels, ladder_costs
from spectrim.methods.weights.acip import ACIP
from spectrim.models.load import resolve
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.registry import make_method
from spectrim.replacement import Storage
from spectrim.stats import Stats
from tiny_models import logits_of, tiny, token_ids

ANCHORS = (0.9, 0.6, 0.4)
RANK = 2
SMALL: dict[str, Any] = {"adapter_rank": RANK, "adapter_alpha": 1.0, "batch_size": 4, "pressure_every": 2}
ARCHITECTURES = ["llama-gqa-bias", "gpt2"]
every_storage = pytest.mark.parametrize("storage", ["factor", "pivot"])
IDS = token_ids(3, 12, seed=2)


@functools.lru_cache
def sizes_of(architecture: str, storage: str, dtype: torch.dtype = torch.float32) -> AnySize:
    method = make_method("acip", options={**SMALL, "storage": storage})
    return compress_any_size(tiny(architecture), method, token_ids(8), anchors=ANCHORS, steps=12, dtype=dtype, seed=1)


@functools.lru_cache
def pressed(storage: Storage) -> tuple[Pressing, AnySize]:
    """Masks that went out in an order that is drawn, some at the same step, some still there; adapters that are not 0.

    Stored in float64: slices are compared with products of the components themselves.
    """
    method, dense = ACIP(**SMALL, steps=10, storage=storage), tiny("llama-gqa-bias")
    walk = find_layers(dense)
    spectra = decompose_all(method, dense, walk, {la.name: Stats(tokens=1) for la in walk.layers})
    masked = relax(method, skeleton(dense), walk, spectra, 0)
    generator = torch.Generator().manual_seed(7)
    for layer in masked.values():
        count = len(layer.m)
        with torch.no_grad():
            layer.m.copy_(torch.randn(count, generator=generator))
            layer.up.copy_(0.1 * torch.randn(layer.up.shape, generator=generator))
        layer.died.copy_(torch.randint(0, 6, (count,), generator=generator).where(layer.m <= 0, -1))
    pressing = Pressing(method, walk, masked, ANCHORS[-1])
    pressing.finish()
    order = order_by_extinction(pressing, (1.0, *ANCHORS), ())
    return pressing, build(dense, method, walk, order, torch.float64)


# The order


def test_the_first_components_of_each_layer_in_their_order():
    layer = torch.tensor([1, 0, 1, 1, 0, 2, 0, 2])
    assert first_of_each(layer, [2, 1, 5]).tolist() == [1, 0, 0, 2, 2]
    assert first_of_each(layer, [0, 0, 0]).tolist() == []


@every_storage
@pytest.mark.parametrize("first", [1, 3, 12, 40])
def test_a_ladder_that_starts_at_the_adapters_rank(storage, first):
    whole, found = ladder_costs(20, 12, storage), ladder_costs(20, 12, storage, first)
    assert found.tolist() == [*whole.tolist()[first - 1 : -1], 240]


@every_storage
@pytest.mark.parametrize("size", [0.35, 0.4, 0.47, 0.6, 0.8, 0.93, 1.0])
def test_a_size_is_the_cut_of_the_order_of_extinction(storage, size):
    """Oracle: the search of a run for one size (`counts_within`), and the weight summed up component by component."""
    pressing, sizes = pressed(storage)
    plan, model = sizes.plan(size), sizes.at(size)
    owner, position = pressing.order()
    biases = sum(la.numbers - la.weight_numbers for la in sizes.walk.layers)
    counts = counts_within(owner, pressing.tables, int(size * sizes.walk.numbers) - biases)
    present = min(1.0, (1.0 - size) / (1.0 - ANCHORS[0]))  # of the adapters: they fade above the first anchor
    for index, layer in enumerate(sizes.walk.layers):
        own, count, target = pressing.masked[layer.name], int(counts[index]), plan.targets[layer.name]
        module = model.get_submodule(layer.name)
        places = position[owner == index]
        if int(pressing.tables[index][count]) == layer.weight_numbers:
            assert target.codec == "dense"
            places = places[: len(own.m)]
            weight = weight_of(module).detach()
        else:
            assert (target.codec, target.rank) == (storage, RANK + count)
            places = places[:count]
            assert isinstance(module, LowRankLinear | PivotLinear)
            weight = module.dense_weight()
        expected = present * own.scale * own.up.detach().double() @ own.down.detach().double()
        for place in places.tolist():
            expected = expected + torch.outer(own.left[:, place].double(), own.right[place].double())
        torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=1e-4)


def test_what_went_out_earlier_is_kept_later():
    pressing, sizes = pressed("factor")
    owner, position = pressing.order()
    for index, layer in enumerate(sizes.walk.layers):
        own, places = pressing.masked[layer.name], position[owner == index]
        when = own.died[places].where(own.died[places] >= 0, 1000)
        assert bool((when[1:] <= when[:-1]).all())
        adapter = sizes.layers[layer.name].left[:RANK].mT @ sizes.layers[layer.name].right[:RANK]
        torch.testing.assert_close(adapter.float(), own.scale * own.up.detach() @ own.down.detach())


# A run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every_storage
def test_ranks_grow_with_the_size_and_all_that_is_stored_is_counted(architecture, storage):
    sizes = sizes_of(architecture, storage)
    assert sizes.adapter_rank == RANK
    assert len(sizes.losses) == 12
    assert are_levels([nested.levels for nested in sizes.layers.values()])
    largest_step = max(layer.outputs + layer.inputs for layer in sizes.walk.layers)
    before = dict.fromkeys(sizes.layers, RANK)
    for size in (0.4, 0.45, 0.5, 0.6, 0.75, 0.9, 0.97, 1.0):
        plan, model = sizes.plan(size), sizes.at(size)
        stored = sum(p.numel() for n in sizes.layers for p in model.get_submodule(n).state_dict().values())
        assert stored == plan.numbers_after <= size * sizes.walk.numbers < plan.numbers_after + largest_step + 1
        ranks = {name: target.rank for name, target in plan.targets.items()}
        assert all(ranks[name] >= before[name] for name in ranks)
        before = ranks
    assert {target.codec for target in plan.targets.values()} == {"dense"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every_storage
def test_at_size_one_the_model_is_the_dense_one_and_below_the_first_anchor_it_has_its_adapters(architecture, storage):
    sizes = sizes_of(architecture, storage)
    torch.testing.assert_close(logits_of(sizes.at(1.0), IDS), logits_of(sizes.dense, IDS), atol=1e-4, rtol=1e-4)
    for nested in sizes.layers.values():
        assert nested.scores.shape == (4, len(nested.left))
        assert not nested.scores[0, :RANK].any()
        assert bool((nested.scores[-1] == 1).all())
        assert bool((nested.scores[:, RANK:] == 1).all())
        assert nested.scores[:, 0].tolist() == list(sizes.details["adapter_strengths"].values())
        assert bool((nested.scores[:, :RANK] == nested.scores[:, :1]).all())
        assert bool(nested.left[:RANK].any())  # the adapters were trained


def test_the_smallest_anchor_is_what_a_run_for_that_size_trains_to():
    """The same masks and adapters: one descent, and its end is the last slice."""
    sizes = sizes_of("llama-gqa-bias", "factor")
    method = cast(ACIP, dataclasses.replace(cast(Any, sizes.method), steps=12))
    single = compress_model(tiny("llama-gqa-bias"), method, ANCHORS[-1], token_ids(8), seed=1)
    assert single.learned is not None
    assert single.learned.losses == sizes.losses
    assert single.plan == sizes.plan(ANCHORS[-1])
    torch.testing.assert_close(
        logits_of(single.model, IDS), logits_of(sizes.at(ANCHORS[-1]), IDS), atol=1e-3, rtol=1e-3
    )


def test_adapters_that_are_above_the_smallest_anchor_are_refused_with_the_smallest_size_that_there_is():
    method = make_method("acip", options={**SMALL, "adapter_rank": 8})
    run = functools.partial(compress_any_size, tiny("llama"), method, token_ids(8), steps=3)
    with pytest.raises(UsageError, match=r"adapters of rank 8 alone take [\d,]+ \(they are counted\)") as caught:
        run(anchors=(0.9, 0.1))
    found = re.search(r"the smallest reachable is (0\.\d+)$", str(caught.value))
    assert found is not None
    smallest = float(found[1])
    assert run(anchors=(0.9, smallest)).plan(smallest).keep <= smallest
    with pytest.raises(UsageError, match="alone take"):
        run(anchors=(0.9, smallest - 1e-3))


def test_without_training_it_is_the_closed_form_and_has_no_adapters():
    method = make_method("acip", options={**SMALL, "steps": 0})
    sizes = compress_any_size(tiny("llama"), method, token_ids(8), anchors=ANCHORS)
    assert sizes.adapter_rank == 0
    assert all(bool((nested.scores == 1).all()) for nested in sizes.layers.values())


def test_killed_and_gone_on_with_is_bit_for_bit_the_whole():
    def run(checkpoint: MemoryCheckpoint | None = None, **options: Any) -> AnySize:
        method = make_method("acip", options=SMALL)
        return compress_any_size(
            tiny("llama"), method, token_ids(8), anchors=ANCHORS, steps=9, seed=1, checkpoint=checkpoint, **options
        )

    whole = run()
    for step in (2, 6, 9):
        checkpoint = MemoryCheckpoint(every=1)
        with pytest.raises(Killed):
            run(checkpoint, progress=kill_at("learn masks", step))
        again = run(checkpoint)
        for name, nested in whole.layers.items():
            for part in ("left", "right", "scores", "levels"):
                assert torch.equal(getattr(again.layers[name], part), getattr(nested, part)), (name, part, step)
        assert (again.losses, again.warnings, again.details) == (whole.losses, whole.warnings, whole.details)


# The folder


def same(one: Any, other: Any) -> None:
    """Bit for bit, names and all."""
    a, b = cast(dict[str, Tensor], one.state_dict()), cast(dict[str, Tensor], other.state_dict())
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acip") / "all"
    folder.mkdir()
    write_nested(folder, sizes_of("llama-gqa-bias", "pivot", torch.bfloat16), torch.bfloat16, 0.6, None, "tiny")
    return folder


def load(folder: Path, size: float) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, size_ratio=size)


@pytest.mark.parametrize("size", [0.4, 0.65, 0.95, 1.0])
def test_loading_a_size_is_bitwise_what_the_run_measured_and_what_export_writes(folder, tmp_path, size):
    sizes = sizes_of("llama-gqa-bias", "pivot", torch.bfloat16)
    loaded = load(folder, size)
    same(loaded, copy_in(sizes.at(size), torch.bfloat16))
    facts = export_size(resolve(str(folder)), tmp_path / "one", size=size)
    same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "one"))
    assert facts["stored"]["linear_numbers"] == sizes.plan(size).numbers_after


def test_the_folder_says_how_many_components_are_the_adapters(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["any_size"] == {"storage": "pivot", "anchors": [1.0, *ANCHORS], "adapter_rank": RANK}
    tensors = load_file(folder / "model.safetensors")
    for path, entry in config["modules"].items():
        rows = {len(tensors[f"{path}.{part}"]) for part in ("left", "right")}
        assert rows == {entry["rank"]} == {tensors[f"{path}.scores"].shape[1]}


@pytest.mark.parametrize("value", [0, 1, 3, 65_536, 65_537, -1, 2.0, True, "2", None, [2]], ids=repr)
def test_a_damaged_adapter_rank_is_refused(folder, tmp_path, value):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["any_size"]["adapter_rank"] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError):
        load(tmp_path, 0.6)


def test_a_size_that_adapters_alone_exceed_is_refused_by_a_folder_that_claims_it(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["any_size"]["anchors"][-1] = 0.13
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"adapters of rank 2 alone take .* smallest reachable size is 0\.\d{4}$"):
        load(tmp_path, 0.13)


# On the command line


def test_the_command_line_makes_loads_and_exports_all_sizes(tmp_path):
    dense = small_model(tmp_path / "model")
    options = ("--method", "acip", "--set", "adapter_rank=2", "--set", "batch_size=2", "--train-windows", "8")
    sizes = ("--any-size", "--anchors", "0.9,0.6", "--any-size-steps", "8")
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        answer = call("compress", dense, "--out", tmp_path / "all", *PLAIN, "--json", *options, *sizes)
    assert answer.code == 0, answer.err
    report = answer.json
    assert [row["size"] for row in report["sizes"]] == [0.9, 0.6]
    assert all(row["size"] - 0.03 < row["keep"] <= row["size"] for row in report["sizes"])
    assert len(report["learning"]["losses"]) == 8
    assert 0 < report["learning"]["details"]["fixed_at_step"] <= 8
    assert report["text"]["training"]["windows"] == 8
    assert call("inspect", tmp_path / "all", "--size", "0.7", "--json").code == 0
    assert call("export", tmp_path / "all", "--keep", "0.7", "--out", tmp_path / "one").code == 0
    same(load(tmp_path / "all", 0.7), AutoModelForCausalLM.from_pretrained(tmp_path / "one"))


def test_the_command_line_refuses_adapters_that_do_not_fit_before_weights_are_read(tmp_path):
    dense = small_model(tmp_path / "model")
    with mock.patch.object(any_size_job, "load_dense", side_effect=AssertionError("loaded")):
        answer = call("compress", dense, "--out", tmp_path / "all", "--method", "acip", "--any-size")
    assert answer.code == 2
    assert "adapters of rank 32 alone take" in answer.message
    assert "the smallest reachable is" in answer.message
