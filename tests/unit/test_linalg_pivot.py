"""Pivot storage: exact, as small as it can be, with bounded coefficients, for well and badly behaved factors."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import pivot
from spectrim.linalg.allocate import pivot_cost
from spectrim.linalg.factor import Factors, decompose, truncate
from spectrim.linalg.pivot import Pivots, from_pivots, pack_mask, to_pivots, unpack_mask

BOUND = 1.2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_stores(factors: Factors, *, accuracy: float = 1e-10, bound: float = BOUND) -> Pivots:
    """Everything that must hold for any factors: shapes, exactness, bound, rows taken from the matrix itself."""
    dense = factors.left @ factors.right
    outputs, rank, inputs = *factors.left.shape, factors.right.shape[1]
    pivots = to_pivots(factors)
    assert pivots.rows.shape == (rank, inputs)
    assert pivots.coefficients.shape == (outputs - rank, rank)
    assert pivots.mask.shape == (outputs,)
    assert pivots.mask.dtype == torch.bool
    assert int(pivots.mask.sum()) == rank
    scale = max(1.0, float(dense.abs().max()))
    assert float((from_pivots(pivots) - dense).abs().max()) <= accuracy * scale
    assert torch.equal(from_pivots(pivots)[pivots.mask], pivots.rows)
    torch.testing.assert_close(pivots.rows, dense[pivots.mask], rtol=1e-12, atol=1e-12 * scale)
    if pivots.coefficients.numel():
        assert float(pivots.coefficients.abs().max()) <= bound
    return pivots


@given(seed=st.integers(0, 10_000), outputs=st.integers(1, 30), inputs=st.integers(1, 30), data=st.data())
def test_pivots_are_exact_bounded_and_rows_of_the_matrix(seed, outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    assert_stores(Factors(normal(seed, outputs, rank), normal(seed + 1, rank, inputs)))


@given(outputs=st.integers(1, 40), inputs=st.integers(1, 40), data=st.data())
def test_stored_numbers_are_the_dimension_of_the_rank_r_manifold_and_the_mask_bytes(outputs, inputs, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    pivots = to_pivots(Factors(normal(1, outputs, rank), normal(2, rank, inputs)))
    numbers = pivots.rows.numel() + pivots.coefficients.numel()
    assert numbers == rank * (outputs + inputs - rank)
    mask_bytes = pack_mask(pivots.mask).numel()
    assert mask_bytes == -(-outputs // 8)
    assert int(pivot_cost(outputs, inputs, torch.tensor(rank))) == numbers + mask_bytes


def test_a_hand_computed_example():
    left = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 4.0]], dtype=torch.float64)
    right = torch.tensor([[1.0, 2.0, 3.0], [1.0, 0.0, -1.0]], dtype=torch.float64)
    pivots = to_pivots(Factors(left, right))
    assert pivots.mask.tolist() == [True, False, True]
    assert pivots.rows.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, -4.0]]
    torch.testing.assert_close(pivots.coefficients, torch.tensor([[0.5, 0.125]], dtype=torch.float64))


@pytest.mark.parametrize("spread", [0, -6, -14])
def test_graded_columns_stay_exact_and_bounded(spread):
    grades = torch.logspace(0, spread, 24, dtype=torch.float64)
    assert_stores(Factors(normal(3, 60, 24) * grades, normal(4, 24, 40)))


def test_growth_of_partial_pivoting_is_cured_by_swaps():
    """Rows on which partial pivoting swaps nothing and leaves coefficients that grow like 2^R."""
    size = 30
    lower = torch.eye(size, dtype=torch.float64) - 0.99 * torch.tril(torch.ones(size, size, dtype=torch.float64), -1)
    left = torch.cat([lower, torch.full((2, size), -0.99, dtype=torch.float64), 0.9 * normal(5, 6, size).clamp(-1, 1)])
    unswapped = float(torch.linalg.solve(lower, left[size:], left=False).abs().max())
    assert unswapped > 1e8  # so the bound below does not hold by luck
    assert_stores(Factors(left, normal(6, size, 33)))


def test_a_tighter_bound_is_kept_too_and_the_volume_never_shrinks():
    left, right = normal(7, 50, 8), normal(8, 8, 20)
    loose, tight = to_pivots(Factors(left, right), bound=3.0), to_pivots(Factors(left, right), bound=1.0 + 1e-9)
    assert float(tight.coefficients.abs().max()) <= 1.0 + 1e-9
    volume = [float(torch.linalg.det(left[p.mask]).abs()) for p in (loose, tight)]
    assert volume[1] >= volume[0] * (1 - 1e-9)


DEFICIENT = {
    "all zero": torch.zeros(10, 4, dtype=torch.float64),
    "zero column": normal(9, 10, 4) * torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
    "equal columns": normal(10, 10, 2)[:, [0, 1, 0, 1]],
    "fewer rows than rank": torch.cat([normal(11, 2, 4), torch.zeros(8, 4, dtype=torch.float64)]),
    "rank one": torch.outer(normal(12, 10), normal(13, 4)),
    "noise beyond the rank": normal(14, 10, 4) * torch.tensor([1.0, 1.0, 1e-16, 1e-17], dtype=torch.float64),
}


@pytest.mark.parametrize("name", DEFICIENT)
def test_rank_deficient_factors_are_stored_exactly_at_the_asked_rank(name):
    assert_stores(Factors(DEFICIENT[name], normal(15, 4, 7)))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_weight_whose_pruned_rows_are_exactly_zero_can_be_stored(rank):
    """The left factor then has fewer non-zero rows than columns; LU with error checks used to refuse it."""
    weight = torch.zeros(12, 6, dtype=torch.float64)
    weight[[2, 7]] = normal(16, 2, 6)
    factors = truncate(decompose(weight), rank)
    pivots = assert_stores(factors)
    if rank >= 2:
        torch.testing.assert_close(from_pivots(pivots), weight, rtol=0, atol=1e-12)


def test_full_rank_of_a_wide_matrix_is_the_matrix():
    factors = Factors(normal(17, 5, 5), normal(18, 5, 9))
    pivots = assert_stores(factors)
    assert pivots.mask.all()
    assert pivots.coefficients.shape == (0, 5)


def test_inputs_are_not_changed():
    left, right = normal(19, 9, 3), normal(20, 3, 5)
    before = left.clone(), right.clone()
    to_pivots(Factors(left, right))
    assert torch.equal(left, before[0])
    assert torch.equal(right, before[1])


def test_nan_does_not_come_out_as_a_number():
    left = normal(21, 9, 3)
    left[4, 1] = float("nan")
    dense = from_pivots(to_pivots(Factors(left, normal(22, 3, 5))))
    assert not bool(torch.isfinite(dense[4]).any())


# ---------- mask


@given(bits=st.lists(st.booleans(), max_size=70))
def test_pack_and_unpack_mask_round_trip_in_the_fewest_bytes(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(bits) // 8)
    assert torch.equal(unpack_mask(packed, len(bits)), mask)
    assert packed.tolist() == list(sum(b << i for i, b in enumerate(bits)).to_bytes(len(packed), "little"))


def test_mask_bits_go_lowest_first():
    assert pack_mask(torch.tensor([True, False, False, True] + [False] * 4 + [True])).tolist() == [9, 1]
    assert unpack_mask(torch.tensor([9, 255], dtype=torch.uint8), 9).nonzero().flatten().tolist() == [0, 3, 8]


@pytest.mark.parametrize("dependent", [False, True])
def test_many_columns_on_a_gpu_are_stored_as_exactly(dependent, monkeypatch):
    """Their basis comes from a Cholesky factor; from reflections, as elsewhere, where columns depend on each other."""
    left, right = normal(1, 40, 12) * torch.logspace(0, -2, 12, dtype=torch.float64), normal(2, 12, 30)
    if dependent:
        left[:, 5] = left[:, 4]
    basis = pivot._orthonormal(left)
    projected = torch.linalg.qr(left).Q
    torch.testing.assert_close(basis.mT @ basis, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-7)
    if not dependent:
        torch.testing.assert_close(basis @ basis.mT, projected @ projected.mT, rtol=0, atol=1e-7)
    monkeypatch.setattr(pivot, "_many_on_a_gpu", lambda _: True)
    stored = to_pivots(Factors(left, right))
    torch.testing.assert_close(from_pivots(stored), left @ right, rtol=1e-9, atol=1e-10)
    assert float(stored.coefficients.abs().max()) <= BOUND


def test_the_solver_of_large_matrices_is_asked_for_and_put_back(monkeypatch):
    """On a GPU built for CUDA; what is preferred is a setting of the whole process."""
    preferred = ["default"]

    def library(new=None):
        preferred.extend([] if new is None else [new])
        return preferred[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_linalg_library", library)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pivot._cusolver(wanted=False):
        assert preferred == ["default"]
    with suppress(ValueError), pivot._cusolver(wanted=True):
        assert preferred == ["default", "cusolver"]
        raise ValueError("put back after an error too")
    assert preferred == ["default", "cusolver", "default"]
