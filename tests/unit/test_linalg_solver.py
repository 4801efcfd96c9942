import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectrim.linalg import solver
from spectrim.linalg.factor import balance, descending_eigh, solve_symmetric
from spectrim.linalg.fallback import Fallback, listening, summary, tell
from spectrim.linalg.metric import root_of
from spectrim.linalg.solver import SolverError, eigh, svd

pytestmark = pytest.mark.fault(51)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(n: int, seed: int = 0) -> Tensor:
    a = normal(n, n, seed=seed)
    return a + a.mT


def failing(times: int, inner: Callable[..., Any], how: Callable[[Any], Any]) -> Callable[..., Any]:
    """`inner` whose first calls go wrong: `how` raises, or spoils the answer."""
    calls = iter(range(10_000))

    def call(*arguments: Any, **options: Any) -> Any:
        return how(inner(*arguments, **options)) if next(calls) < times else inner(*arguments, **options)

    return call


def not_converged(_: Any) -> Any:
    raise torch.linalg.LinAlgError("linalg.eigh: failed to converge (error code: 7).")


def out_of_memory(_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def garbage(answer: Any) -> Any:
    return tuple(torch.randn_like(part) for part in answer)


def nothing_but_nan(answer: Any) -> Any:
    return tuple(torch.full_like(part, torch.nan) for part in answer)


def slightly_off(answer: Any) -> Any:
    first, *rest = answer
    return (first * (1 + 1e-6), *rest)


WRONG = [not_converged, out_of_memory, garbage, nothing_but_nan, slightly_off]


# ---- the usual driver is torch's own, bit for bit


@pytest.mark.parametrize("n", [1, 2, 30, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_nothing_fails_it_is_the_library(n, dtype):
    matrix = symmetric(n).to(dtype)
    with listening() as heard:
        for ours, theirs in zip(eigh(matrix), torch.linalg.eigh(matrix), strict=True):
            assert torch.equal(ours, theirs)
        wide = normal(n, 2 * n).to(dtype)
        for ours, theirs in zip(svd(wide), torch.linalg.svd(wide, full_matrices=False), strict=True):
            assert torch.equal(ours, theirs)
    assert heard == []


@given(n=st.integers(1, 24), scale=st.integers(-150, 150), rank=st.integers(0, 24), seed=st.integers(0, 1000))
def test_no_sound_answer_is_turned_down(n, scale, rank, seed):
    """Singular, indefinite and repeated spectra at every size that float64 holds."""
    half = normal(n, min(rank, n), seed=seed)
    for matrix in (half @ half.mT, symmetric(n, seed), torch.eye(n, dtype=torch.float64)):
        with listening() as heard:
            values, vectors = eigh(matrix * 10.0**scale)
            svd(matrix * 10.0**scale)
        assert heard == []
        assert bool(torch.isfinite(values).all() & torch.isfinite(vectors).all())


# ---- the ladder


@pytest.mark.parametrize("wrong", WRONG, ids=lambda how: how.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigh_takes_another_driver(wrong, dtype, monkeypatch):
    if wrong is slightly_off and dtype is torch.float32:
        pytest.skip("within the rounding of float32")
    matrix = symmetric(20).to(dtype)
    values, vectors = torch.linalg.eigh(matrix)
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh, wrong))
    with listening() as heard:
        found, basis = eigh(matrix)
    assert torch.allclose(found, values, rtol=1e-4, atol=1e-4)
    assert torch.allclose((basis.mT @ vectors).diagonal().abs(), torch.ones(20, dtype=dtype), atol=1e-3)
    name = str(dtype).removeprefix("torch.")
    assert [(f.operation, f.size, f.way) for f in heard] == [("eigh", "20 x 20", f"other driver, {name}, cpu")]
    assert heard[0].why.startswith(f"usual driver, {name}, cpu: ")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda how: how.__name__)
def test_svd_takes_another_driver(wrong, monkeypatch):
    matrix = normal(12, 20)
    _, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", failing(1, torch.linalg.svd, wrong))
    with listening() as heard:
        left, found, right = svd(matrix)
    assert torch.allclose(found, values)
    assert torch.allclose(left * found @ right, matrix)
    assert [f.way for f in heard] == ["other driver, float64, cpu"]


def test_after_two_drivers_comes_float64_and_the_dtype_is_given_back(monkeypatch):
    matrix = symmetric(20).float()
    monkeypatch.setattr(torch.linalg, "eigh", failing(1, torch.linalg.eigh, not_converged))
    monkeypatch.setattr(torch.linalg, "svd", failing(1, torch.linalg.svd, garbage))
    with listening() as heard:
        values, vectors = eigh(matrix)
    assert values.dtype == vectors.dtype == torch.float32
    assert [f.way for f in heard] == ["usual driver, float64, cpu"]
    assert torch.allclose(vectors * values @ vectors.mT, matrix, atol=1e-4)


def test_the_rungs_of_a_gpu_end_on_the_cpu():
    gpu = torch.empty(0, device="meta")  # stands for any device that is not the CPU
    names = [name for name, _, _ in solver._rungs(gpu, [solver._svd, solver._svd_otherwise])]
    assert names == [
        *("usual driver, float32, meta", "other driver, float32, meta"),
        *("usual driver, float64, meta", "other driver, float64, meta"),
        *("usual driver, float64, cpu", "other driver, float64, cpu"),
    ]


def test_when_every_way_fails_the_error_holds_the_matrix_and_what_each_said(monkeypatch):
    matrix = symmetric(5)
    monkeypatch.setattr(torch.linalg, "eigh", failing(99, torch.linalg.eigh, not_converged))
    monkeypatch.setattr(torch.linalg, "svd", failing(99, torch.linalg.svd, garbage))
    with pytest.raises(SolverError) as caught:
        descending_eigh(matrix)
    assert "eigh of a 5 x 5 matrix failed on every way" in str(caught.value)
    assert "failed to converge" in str(caught.value)
    assert "other driver, float64, cpu: an answer that is wrong" in str(caught.value)
    assert torch.equal(caught.value.matrix, matrix)


@pytest.mark.fault(44, 53)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("call", [eigh, svd, descending_eigh, root_of, lambda m: solve_symmetric(m, m)])
def test_what_is_not_finite_is_said_to_be_that_and_no_solver_is_asked(bad, call):
    matrix = symmetric(30)
    matrix[3, 4] = matrix[4, 3] = bad
    with pytest.raises(SolverError, match=re.escape("of 900 values of a 30 x 30 matrix are NaN or Inf")):
        call(matrix)


@pytest.mark.fault(53)
def test_a_side_that_solvers_cannot_count_is_refused_before_it_is_tried():
    with pytest.raises(SolverError, match="solvers take at most 32,766 rows"):
        eigh(torch.zeros(1, 1).expand(40_000, 40_000))


def test_a_decomposition_that_needs_both_solvers_still_works(monkeypatch):
    from spectrim.linalg.factor import Factors

    factors = Factors(normal(10, 4), normal(4, 8, seed=1))
    monkeypatch.setattr(torch.linalg, "svd", failing(1, torch.linalg.svd, not_converged))
    with listening() as heard:
        left, right = balance(factors)
    assert torch.allclose(left @ right, factors.left @ factors.right)
    assert len(heard) == 1


# ---- who is told


def test_fallbacks_are_counted_by_kind_and_nobody_need_listen():
    tell(Fallback("eigh", "3 x 3", "x", "y"))
    with listening() as heard:
        for size in ("3 x 3", "4 x 4"):
            tell(Fallback("eigh", size, "other driver", "no"))
        with listening() as inner:
            tell(Fallback("svd", "2 x 2", "float64", "no"))
        tell(Fallback("evaluate", "16 windows", "batches of 8", "out of memory"))
    assert [f.operation for f in inner] == ["svd"]
    assert summary(heard) == [
        "eigh: 2 times done with other driver (3 x 3; no)",
        "evaluate: 1 times done with batches of 8 (16 windows; out of memory)",
    ]
