"""The modules that hold compressed weights: same outputs as the dense product, documented tensors, refused damage."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spectrim.linalg.factor import Spectrum, decompose, truncate
from spectrim.linalg.pivot import from_pivots, pack_mask, to_pivots, unpack_mask
from spectrim.nn.linears import LINEARS, LowRankLinear, PivotLinear
from spectrim.nn.scored import ScoredLinear
from spectrim.replacement import Codec, encode

OUTPUTS, INPUTS, RANK = 13, 9, 4
CODECS: tuple[Codec, ...] = ("factor", "pivot")


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectrum(seed: int, outputs: int = OUTPUTS, inputs: int = INPUTS) -> Spectrum:
    return decompose(normal(seed, outputs, inputs, dtype=torch.float64))


def state_for(codec: Codec, seed: int, *, bias: bool, dtype: torch.dtype = torch.float32) -> tuple[dict, Tensor]:
    """A state dict in the documented names, and the dense weight it stands for."""
    full = spectrum(seed)
    replacement = encode(truncate(full, RANK), codec, like=torch.empty(0, dtype=dtype))
    state = {**replacement.tensors, "weight": torch.empty(0, dtype=dtype)}
    if bias:
        state["U.bias" if codec == "factor" else "bias"] = normal(seed + 1, OUTPUTS, dtype=dtype)
    return state, full.left[:, :RANK] @ full.right[:RANK]


def filled(codec: Codec, seed: int, *, bias: bool = True, dtype: torch.dtype = torch.float32):
    state, dense = state_for(codec, seed, bias=bias, dtype=dtype)
    module = LINEARS[codec](INPUTS, OUTPUTS, RANK, bias=bias, dtype=dtype)
    module.load_state_dict(state)
    return module, dense


# ---------- both codecs


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_forward_is_the_dense_product(codec, bias, shape):
    module, dense = filled(codec, 1, bias=bias)
    x = normal(2, *shape, INPUTS)
    expected = x.double() @ dense.mT + (module.bias.detach().double() if bias else 0.0)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.dense_weight().double(), dense, rtol=1e-5, atol=1e-5)
    assert module(x).shape == (*shape, OUTPUTS)
    assert (module.bias is not None) == bias


@pytest.mark.parametrize("codec", CODECS)
def test_bfloat16_in_bfloat16_out_and_dense_weight_in_float32(codec):
    module, dense = filled(codec, 3, dtype=torch.bfloat16)
    x = normal(4, 6, INPUTS, dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    wide = module.dense_weight()
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), dense, rtol=0, atol=0.03 * float(dense.abs().max()))
    expected = x.double() @ wide.double().mT + module.bias.detach().double()
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("codec", CODECS)
def test_dense_weight_of_float64_stays_float64(codec):
    module, dense = filled(codec, 5, dtype=torch.float64)
    assert module.dense_weight().dtype == torch.float64
    torch.testing.assert_close(module.dense_weight(), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("codec", CODECS)
def test_gradients_reach_every_stored_tensor(codec):
    module, _ = filled(codec, 6, dtype=torch.float64)
    module(normal(7, 5, INPUTS, dtype=torch.float64)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().min()) > 0, name


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_has_exactly_the_documented_names_and_shapes(bias):
    def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}

    factor = {"V.weight": (RANK, INPUTS), "U.weight": (OUTPUTS, RANK), "weight": (0,)}
    pivot = {"pivot.weight": (RANK, INPUTS), "rest.weight": (OUTPUTS - RANK, RANK), "mask": (2,), "weight": (0,)}
    if bias:
        factor["U.bias"], pivot["bias"] = (OUTPUTS,), (OUTPUTS,)
    assert shapes(LowRankLinear(INPUTS, OUTPUTS, RANK, bias=bias)) == factor
    assert shapes(PivotLinear(INPUTS, OUTPUTS, RANK, bias=bias)) == pivot
    assert PivotLinear(INPUTS, OUTPUTS, RANK, bias=bias).mask.dtype == torch.uint8


@pytest.mark.parametrize("codec", CODECS)
def test_the_guard_stops_a_program_that_expects_a_dense_weight(codec):
    module, dense = filled(codec, 8)
    plain = nn.Linear(INPUTS, OUTPUTS)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        plain.load_state_dict(module.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        module.load_state_dict({"weight": dense.float()}, strict=False)


@pytest.mark.parametrize("codec", CODECS)
def test_children_are_real_linears_and_sizes_are_told(codec):
    module, _ = filled(codec, 9)
    assert [type(child) for child in module.children()] == [nn.Linear, nn.Linear]
    assert (module.in_features, module.out_features, module.rank) == (INPUTS, OUTPUTS, RANK)
    assert f"in_features={INPUTS}, out_features={OUTPUTS}, rank={RANK}" in repr(module)
    assert module.codec == codec
    assert LINEARS[codec] is type(module)


@pytest.mark.parametrize("codec", CODECS)
def test_dtype_and_device_arguments_reach_every_tensor(codec):
    module = LINEARS[codec](INPUTS, OUTPUTS, RANK, bias=True, device="meta", dtype=torch.bfloat16)
    floating = [t for t in module.state_dict().values() if t.is_floating_point()]
    assert {t.dtype for t in floating} == {torch.bfloat16}
    assert all(t.is_meta for t in module.state_dict().values())


# ---------- pivot only


def test_stored_numbers_of_a_pivot_layer():
    module = PivotLinear(INPUTS, OUTPUTS, RANK, bias=False)
    floats = sum(p.numel() for p in module.parameters())
    assert floats == RANK * (OUTPUTS + INPUTS - RANK)
    assert module.mask.numel() == 2


def test_outputs_stand_where_the_mask_says():
    module = PivotLinear(3, 5, 2, bias=True, dtype=torch.float64)
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0]], dtype=torch.float64)
    rest = torch.tensor([[10.0, 0], [0, 20], [1, 1]], dtype=torch.float64)
    mask = torch.tensor([False, True, False, False, True])
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    module.load_state_dict(
        {"pivot.weight": rows, "rest.weight": rest, "mask": pack_mask(mask), "weight": module.weight, "bias": bias}
    )
    y = module(torch.tensor([2.0, 3.0, 99.0], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([20.1, 2.2, 60.3, 5.4, 3.5], dtype=torch.float64))


def test_loading_refreshes_the_order():
    first, second = filled("pivot", 10)[0], filled("pivot", 20)[0]
    assert not torch.equal(first.order, second.order)  # else the test shows nothing
    x = normal(11, 4, INPUTS)
    before = first(x)
    wanted = second(x)
    assert not torch.allclose(before, wanted)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.order, second.order)
    assert torch.equal(first(x), wanted)


def test_loading_through_a_parent_and_by_assignment_refreshes_the_order_too():
    source = filled("pivot", 12)[0]
    state = {f"0.{name}": tensor for name, tensor in source.state_dict().items()}
    x = normal(13, 4, INPUTS)
    for assign in (False, True):
        parent = nn.Sequential(PivotLinear(INPUTS, OUTPUTS, RANK, bias=True))
        parent.load_state_dict(state, assign=assign)
        assert torch.equal(parent(x), source(x))
    on_meta = nn.Sequential(PivotLinear(INPUTS, OUTPUTS, RANK, bias=True, device="meta"))
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), source(x))


def test_the_order_is_not_stored_and_follows_a_deep_copy():
    module = filled("pivot", 14)[0]
    assert "order" not in module.state_dict()
    clone = copy.deepcopy(module)
    x = normal(15, 2, INPUTS)
    assert torch.equal(clone(x), module(x))


@pytest.mark.parametrize("flip", range(OUTPUTS))
def test_a_damaged_mask_is_refused_whatever_bit_is_flipped(flip):
    module = filled("pivot", 16)[0]
    state = module.state_dict()
    mask = unpack_mask(state["mask"], OUTPUTS)
    mask[flip] = ~mask[flip]
    found = RANK + (1 if mask[flip] else -1)
    with pytest.raises(ValueError, match=rf"marks {found} rows, the layer has rank {RANK}: damaged"):
        module.load_state_dict({**state, "mask": pack_mask(mask)})


def test_pivot_layer_equals_the_pure_function():
    pivots = to_pivots(truncate(spectrum(17), RANK))
    module = PivotLinear(INPUTS, OUTPUTS, RANK, bias=False, dtype=torch.float64)
    state = {"pivot.weight": pivots.rows, "rest.weight": pivots.coefficients, "mask": pack_mask(pivots.mask)}
    module.load_state_dict({**state, "weight": module.weight})
    torch.testing.assert_close(module.dense_weight(), from_pivots(pivots), rtol=0, atol=1e-14)


# ---------- scored


def scored(seed: int, *, bias: bool = True, masked: tuple[int, ...] = (1, 4, 8)) -> ScoredLinear:
    layer = ScoredLinear(spectrum(seed), normal(seed + 1, OUTPUTS) if bias else None)
    layer.mask[list(masked)] = 0
    with torch.no_grad():
        layer.scores.copy_(1 + 0.3 * normal(seed + 2, INPUTS))
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_scored_layer_starts_as_the_dense_layer(bias):
    full, b = spectrum(30), normal(31, OUTPUTS) if bias else None
    layer = ScoredLinear(full, b)
    assert torch.equal(layer.scores.detach(), torch.ones(INPUTS))
    weight = normal(30, OUTPUTS, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(layer.weight_now().double(), weight, rtol=1e-5, atol=1e-5)
    x = normal(32, 2, 5, INPUTS)
    expected = x.double() @ weight.mT + (0.0 if b is None else b.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_masked_scores_do_not_count_in_the_value():
    layer = scored(33)
    kept = torch.tensor([k not in (1, 4, 8) for k in range(INPUTS)])
    expected = torch.where(kept, layer.scores.detach(), torch.zeros(INPUTS))
    torch.testing.assert_close(layer.effective_scores().detach(), expected)
    torch.testing.assert_close(layer.weight_now().detach(), (layer.left * expected) @ layer.right)


def test_gradient_of_every_score_also_masked_equals_finite_differences():
    """The straight-through gradient of a masked score is the true one at score 0: what bringing it back would do."""
    layer = scored(34)
    x, wanted = normal(35, 20, INPUTS), normal(36, 20, OUTPUTS)

    def loss_at(effective: Tensor) -> float:
        y = x.double() @ ((layer.left.double() * effective) @ layer.right.double()).mT + layer.bias.double()
        return float(((y - wanted.double()) ** 2).mean() + y.sin().mean())

    y = layer(x)
    (((y - wanted) ** 2).mean() + y.sin().mean()).backward()
    effective, step = layer.effective_scores().detach().double(), 1e-5
    for k in range(INPUTS):
        up, down = effective.clone(), effective.clone()
        up[k] += step
        down[k] -= step
        slope = (loss_at(up) - loss_at(down)) / (2 * step)
        assert float(layer.scores.grad[k]) == pytest.approx(slope, rel=1e-3, abs=1e-5), k
    assert all(abs(float(layer.scores.grad[k])) > 1e-4 for k in (1, 4, 8))


def test_kept_factors_multiply_to_the_weight_now():
    layer = scored(37)
    factors = layer.kept()
    assert factors.left.shape == (OUTPUTS, INPUTS - 3)
    assert factors.right.shape == (INPUTS - 3, INPUTS)
    torch.testing.assert_close(factors.left @ factors.right, layer.weight_now().detach(), rtol=1e-5, atol=1e-6)
    assert not factors.left.requires_grad


def test_only_the_scores_are_trained_and_nothing_is_saved_but_them():
    layer = scored(38)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["scores"]
    assert set(layer.state_dict()) == {"scores", "bias"}
    assert layer.energy.dtype == torch.float64
    assert {layer.left.dtype, layer.right.dtype, layer.scores.dtype} == {torch.float32}


def test_the_bias_is_a_copy():
    bias = normal(39, OUTPUTS)
    layer = ScoredLinear(spectrum(40), bias)
    bias.zero_()
    assert float(layer.bias.detach().abs().min()) > 0
