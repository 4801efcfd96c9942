"""Low-rank parts of a fused layer: what an engine's loader does, then the dense product, whole and split over devices.

The engines themselves are in tests/matrix; here is the arithmetic, and the plugins against modules of the same
interface that hold nothing else.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectrim.errors import InputError
from spectrim.integrations.serving import ServedLinear, Share, check_served, parts_of
from spectrim.linalg.pivot import pack_mask
from spectrim.nn.linears import LINEARS, LowRankLinear, PivotLinear
from spectrim.nn.shared import InputPivots, SharedLinear, SharedPivotLinear

INPUTS, HEAD = 24, 8
SIZES = {"q": 4 * HEAD, "k": 2 * HEAD, "v": 2 * HEAD}
ALLOWED = 2e-5


def stored(codec: str, outputs: int, inputs: int, rank: int, *, bias: bool = False, seed: int = 0) -> nn.Module:
    """A random layer as it is in a file."""
    generator = torch.Generator().manual_seed(seed)
    if codec == "dense":
        layer: Any = nn.Linear(inputs, outputs, bias=bias)
    else:
        layer = LINEARS[codec](inputs, outputs, rank, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if codec == "pivot":
        mask = torch.zeros(8 * len(layer.mask), dtype=torch.uint8)
        mask[torch.randperm(outputs, generator=generator)[:rank]] = 1
        layer.mask.copy_((mask.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8))
        layer.refresh_order()
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    return layer.weight.detach() if isinstance(layer, nn.Linear) else layer.dense_weight()


def entry_of(layer: nn.Module) -> dict[str, Any] | None:
    return layer.entry() if isinstance(layer, LowRankLinear | PivotLinear | SharedLinear) else None


def served(parts: dict[Any, nn.Module], share: Share, *, bias: nn.Parameter | None = None) -> tuple[Any, nn.Module]:
    """Attach, hand over every tensor of the parts as an engine's loader would, finish."""
    layer = nn.Module()
    layer.register_parameter("bias", bias)
    made = ServedLinear("a.qkv_proj", [entry_of(part) for part in parts.values()], share)
    made.attach(layer, torch.float32)
    for shard, part in parts.items():
        for key, tensor in part.state_dict().items():
            if key == "bias" and bias is None and isinstance(part, PivotLinear):
                continue  # engines pass over a bias that their layer has not
            parameter = layer.get_parameter(key)
            arguments = () if shard is None else (shard,)
            parameter.weight_loader(parameter, tensor, *arguments)
    made.finish(layer)
    return made, layer


COMBINATIONS = [
    ("factor", "factor", "factor"),
    ("pivot", "pivot", "pivot"),
    ("factor", "dense", "pivot"),
    ("pivot", "factor", "dense"),
    ("dense", "pivot", "dense"),
]


@pytest.mark.parametrize("codecs", COMBINATIONS, ids=" ".join)
@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (2, 1), (4, 2)])
def test_a_fused_layer_split_over_outputs_is_the_dense_product(codecs, devices, replicas):
    """Ranks differ between the parts; with four devices, two hold the same k and v heads."""
    parts = {
        shard: stored(codec, SIZES[shard], INPUTS, 5 + i, seed=i)
        for i, (shard, codec) in enumerate(zip(SIZES, codecs, strict=True))
    }
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(9))
    own = [SIZES["q"] // devices, SIZES["k"] * replicas // devices, SIZES["v"] * replicas // devices]
    found: dict[str, dict[int, Tensor]] = {shard: {} for shard in SIZES}
    for rank in range(devices):
        share = Share(inputs=INPUTS, outputs=tuple(own), rank=rank, replicas=replicas, over_outputs=devices > 1)
        made, layer = served(parts, share)
        for shard, y in zip(SIZES, made.forward(layer, x).split(own, -1), strict=True):
            found[shard][rank if shard == "q" else rank // replicas] = y
    for shard, pieces in found.items():
        y = torch.cat([pieces[i] for i in sorted(pieces)], -1)
        torch.testing.assert_close(y, x @ weight_of(parts[shard]).mT, atol=ALLOWED, rtol=ALLOWED)


def sharing(codec: str, shards: Sequence[str], rank: int) -> dict[str, SharedLinear]:
    """Parts that share their first factor."""
    kind = SharedPivotLinear if codec == "shared-pivot" else SharedLinear
    torch.manual_seed(3)
    parts = {s: kind(INPUTS, SIZES[s], rank, bias=False, basis=f"a.{shards[0]}_proj" if i else None)
             for i, s in enumerate(shards)}  # fmt: skip
    owner = parts[shards[0]]
    if isinstance(basis := owner.V, InputPivots):
        mask = torch.zeros(INPUTS, dtype=torch.bool)
        mask[torch.randperm(INPUTS)[:rank]] = True
        basis.mask.copy_(pack_mask(mask))
        basis.refresh_order()
    for shard in shards[1:]:
        parts[shard].borrow(owner)
    return parts


@pytest.mark.parametrize("codec", ["shared", "shared-pivot"])
@pytest.mark.parametrize(("devices", "dense"), [(1, None), (2, None), (1, "q"), (1, "v")])
def test_parts_that_share_their_first_factor(codec, devices, dense):
    shards = [shard for shard in SIZES if shard != dense]
    parts: dict[str, Any] = {**sharing(codec, shards, 7)}
    if dense is not None:
        parts = {s: parts.get(s) or stored("dense", SIZES[s], INPUTS, 0) for s in SIZES}
    x = torch.randn(3, INPUTS)
    own = [SIZES[s] // devices for s in SIZES]
    found: dict[str, list[Tensor]] = {shard: [] for shard in SIZES}
    for rank in range(devices):
        share = Share(inputs=INPUTS, outputs=tuple(own), rank=rank, over_outputs=devices > 1)
        made, layer = served(parts, share)
        assert layer.first.shape == (7, INPUTS)  # once
        for shard, y in zip(SIZES, made.forward(layer, x).split(own, -1), strict=True):
            found[shard].append(y)
    for shard, pieces in found.items():
        torch.testing.assert_close(torch.cat(pieces, -1), x @ weight_of(parts[shard]).mT, atol=ALLOWED, rtol=ALLOWED)


def test_a_first_factor_that_another_layer_holds_is_refused():
    parts = sharing("shared", list(SIZES), 7)
    modules = {f"a.{shard}_proj": part.entry() for shard, part in parts.items()}
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert parts_of(modules, "a.qkv_proj", fused) == list(modules.values())
    assert parts_of(modules, "a.q_proj", {}) == [modules["a.q_proj"]]
    with pytest.raises(InputError, match=r"a.k_proj: k_proj has its first factor from a.q_proj"):
        parts_of(modules, "a.k_proj", {})
    with pytest.raises(InputError, match="in the same layer before it"):
        parts_of({**modules, "a.q_proj": {**modules["a.q_proj"], "rank": 6}}, "a.qkv_proj", fused)


def test_a_mask_of_a_shared_factor_that_does_not_fit_is_refused():
    parts = sharing("shared-pivot", list(SIZES), 7)
    parts["q"].V.mask.zero_()
    with pytest.raises(InputError, match="marks 0 inputs, the shared factor has rank 7"):
        served(parts, Share(inputs=INPUTS, outputs=tuple(SIZES.values())))


@pytest.mark.parametrize("codec", ["factor", "pivot"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_layer_split_over_inputs_sums_to_the_dense_product(codec, devices):
    part = stored(codec, 20, INPUTS, 7)
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(9))
    own, total = INPUTS // devices, torch.zeros(3, 20)
    for rank in range(devices):
        share = Share(inputs=own, outputs=(20,), rank=rank, over_inputs=devices > 1)
        made, layer = served({None: part}, share)
        total += made.forward(layer, x[:, rank * own : (rank + 1) * own])
    torch.testing.assert_close(total, x @ weight_of(part).mT, atol=ALLOWED, rtol=ALLOWED)


def test_numbers_held_are_those_of_the_file():
    """Whole on one device: no dense matrix, and no copy of what was loaded."""
    parts = {0: stored("factor", 24, INPUTS, 5), 1: stored("pivot", 24, INPUTS, 6)}
    made, layer = served(parts, Share(inputs=INPUTS, outputs=(24, 24)))
    held = sum(p.numel() for p in layer.parameters())
    assert held == 5 * (24 + INPUTS) + 6 * (24 + INPUTS - 6)
    assert all(not found for found in made.loaded)
    assert {name for name, _ in layer.named_parameters()} == {"first", "second_0", "second_1"}


def test_one_stored_matrix_for_several_parts():
    """Phi-3 stores q, k and v as one; on one device that is one part."""
    part = stored("pivot", 48, INPUTS, 9)
    x = torch.randn(2, INPUTS)
    made, layer = served({None: part}, Share(inputs=INPUTS, outputs=(32, 8, 8)))
    torch.testing.assert_close(made.forward(layer, x), x @ weight_of(part).mT, atol=ALLOWED, rtol=ALLOWED)
    with pytest.raises(InputError, match="cannot be cut for several devices"):
        served({None: part}, Share(inputs=INPUTS, outputs=(16, 4, 4), over_outputs=True))


def test_the_bias_of_a_factor_is_the_layers():
    part = stored("factor", 16, INPUTS, 5, bias=True)
    bias = nn.Parameter(torch.zeros(16))
    bias.weight_loader = lambda parameter, tensor: parameter.data.copy_(tensor)
    made, layer = served({None: part}, Share(inputs=INPUTS, outputs=(16,)), bias=bias)
    x = torch.randn(2, INPUTS)
    torch.testing.assert_close(made.forward(layer, x, bias), part(x), atol=ALLOWED, rtol=ALLOWED)


@pytest.mark.parametrize("codec", ["factor", "pivot"])
def test_a_bias_that_the_architecture_lacks_is_refused(codec):
    part = stored(codec, 16, INPUTS, 5, bias=True)
    with pytest.raises(InputError, match=r"a.qkv_proj: has a bias that the architecture has no place for"):
        served({None: part}, Share(inputs=INPUTS, outputs=(16,)))


def test_what_was_not_loaded_is_named():
    part = stored("factor", 16, INPUTS, 5)
    made, layer = ServedLinear("a.up_proj", [entry_of(part)], Share(inputs=INPUTS, outputs=(16,))), nn.Module()
    made.attach(layer, torch.float32)
    layer.V.weight.weight_loader(layer.V.weight, part.V.weight)
    with pytest.raises(InputError, match=r"a.up_proj: part 0 \(factor\): the files do not hold U.weight"):
        made.finish(layer)


def test_tensors_that_do_not_fit_config_are_refused():
    part = stored("factor", 16, INPUTS, 5)
    entries = [{"codec": "factor", "rank": 4, "bias": False}, {"codec": "pivot", "rank": 4, "bias": False}]
    made, layer = ServedLinear("a.x", entries, Share(inputs=INPUTS, outputs=(16, 16))), nn.Module()
    made.attach(layer, torch.float32)
    with pytest.raises(InputError, match=r"part 0 has rank 4 by config.json, V.weight has shape \[5, 24\]"):
        layer.V.weight.weight_loader(layer.V.weight, part.V.weight, 0)
    with pytest.raises(InputError, match=r"part 1 is pivot by config.json, the file holds a U.weight"):
        layer.U.weight.weight_loader(layer.U.weight, part.U.weight, 1)


def test_a_damaged_mask_is_refused():
    part = stored("pivot", 16, INPUTS, 5)
    part.mask.fill_(255)
    with pytest.raises(InputError, match="pivot mask marks 16 rows"):
        served({None: part}, Share(inputs=INPUTS, outputs=(16,)))


def test_layers_are_found_by_their_path_or_the_parts_that_are_fused():
    modules = {"m.q_proj": {"codec": "factor"}, "m.o_proj": {"codec": "pivot"}}
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert parts_of(modules, "m.o_proj", fused) == [{"codec": "pivot"}]
    assert parts_of(modules, "m.qkv_proj", fused) == [{"codec": "factor"}, None, None]
    assert parts_of(modules, "n.qkv_proj", fused) is None
    assert parts_of(modules, "m.k_proj", fused) is None


def test_folders_that_are_not_served_say_what_to_do():
    with pytest.raises(InputError, match=r"layers stored as mpo, packed are not served.*--to dense"):
        check_served({"a": {"codec": "packed"}, "b": {"codec": "mpo"}, "c": {"codec": "pivot"}}, None, "vLLM")
    with pytest.raises(InputError, match="all sizes; write the one to serve"):
        check_served({}, SimpleNamespace(), "vLLM")
