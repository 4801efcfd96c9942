"""Eigen and singular value decompositions that are right or an error: one ladder for all of them.

    is the matrix finite?  ->  the usual driver, where it lies  ->  another driver  ->  float64  ->  the CPU

A solver may fail, run out of memory, or return garbage without a word (NumPy's `eigvalsh` gave finite numbers for a
matrix of NaN). So each answer is held against the matrix on one fixed random vector, which costs O(n^2) beside the
solver's O(n^3). The first rung whose answer holds is taken; every rung below the first is told to whoever listens.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from spectrim.linalg.fallback import Fallback, tell

LARGEST_SIDE = 32_766
"""LAPACK's symmetric solver counts its work space, 1 + 6 n + 2 n^2 numbers, in 32 bits."""
ROUNDING = 1000
"""How many times n eps (relative to the largest entry) an answer may be off; sound ones are off by about one."""

LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]  (public, not re-exported)


class SolverError(LinAlgError):
    """No rung of the ladder gave an answer that holds. `matrix` is what could not be decomposed, on the CPU."""

    def __init__(self, message: str, matrix: Tensor | None = None) -> None:
        super().__init__(message)
        self.matrix = matrix


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) ascending and eigenvectors (n, n) of a symmetric matrix (n, n); SolverError if none hold."""
    values, vectors = _climb("eigh", matrix, [torch.linalg.eigh, _eigh_by_svd], _is_eigh)
    return values, vectors


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin U (m, k), s (k,) descending, V^T (k, n) of a matrix (m, n); SolverError if none hold."""
    left, values, right = _climb("svd", matrix, [_svd, _svd_otherwise], _is_svd)
    return left, values, right


Solver = Callable[[Tensor], tuple[Tensor, ...]]


def _climb(
    operation: str, matrix: Tensor, drivers: list[Solver], holds: Callable[[Tensor, tuple[Tensor, ...]], bool]
) -> tuple[Tensor, ...]:
    _refuse(operation, matrix)
    said: list[str] = []
    for rung, place, solver in _rungs(matrix, drivers):
        try:
            answer = solver(matrix.to(place))
            if holds(matrix.to(place), answer):
                if said:
                    tell(Fallback(operation, _text(matrix), rung, "; ".join(said)))
                return tuple(part.to(matrix) for part in answer)
            said.append(f"{rung}: an answer that is wrong")
        except RuntimeError as error:  # LinAlgError, out of memory, and whatever the vendor's library reports
            said.append(f"{rung}: {type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise SolverError(f"{operation} of a {_text(matrix)} matrix failed on every way ({'; '.join(said)})", _copy(matrix))


def _rungs(matrix: Tensor, drivers: list[Solver]) -> Iterator[tuple[str, Tensor, Solver]]:
    """(name, a tensor whose dtype and device are those of the rung, solver), without doubles."""
    wide, there = torch.float64, torch.device("cpu")
    seen: set[tuple[torch.dtype, str]] = set()
    places = [(matrix.dtype, matrix.device), (wide, matrix.device), (wide, there)]
    for dtype, device in places:
        if (dtype, device.type) in seen or (device.type == "mps" and dtype == wide):
            continue
        seen.add((dtype, device.type))
        place = torch.empty(0, dtype=dtype, device=device)
        for number, driver in enumerate(drivers):
            name = "usual driver" if number == 0 else "other driver"
            yield f"{name}, {str(dtype).removeprefix('torch.')}, {device.type}", place, driver


def _refuse(operation: str, matrix: Tensor) -> None:
    if operation == "eigh" and len(matrix) > LARGEST_SIDE:
        raise SolverError(f"{operation}: a {_text(matrix)} matrix; solvers take at most {LARGEST_SIDE:,} rows")
    bad = matrix.numel() - int(torch.isfinite(matrix).sum())
    if bad:
        raise SolverError(f"{operation}: {bad} of {matrix.numel()} values of a {_text(matrix)} matrix are NaN or Inf")


def _eigh_by_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A symmetric matrix is U s V^T with u = +-v: the sign is the eigenvalue's."""
    left, values, right = _svd(matrix)
    signed = values * (left * right.mT).sum(0).sign()
    order = signed.argsort()
    return signed[order], left[:, order]


def _svd(matrix: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.linalg.svd(matrix, full_matrices=False))


def _svd_otherwise(matrix: Tensor) -> tuple[Tensor, ...]:
    """On a GPU QR iterations, the slowest and most robust driver; LAPACK, which has one, is given the transpose."""
    if matrix.is_cuda:
        return tuple(torch.linalg.svd(matrix, full_matrices=False, driver="gesvd"))
    left, values, right = torch.linalg.svd(matrix.mT, full_matrices=False)
    return right.mT, values, left.mT


def _is_eigh(matrix: Tensor, answer: tuple[Tensor, ...]) -> bool:
    values, vectors = answer
    probe = _probe(matrix, matrix.shape[1])
    with torch.autocast(matrix.device.type, enabled=False):
        inside = vectors.mT @ probe
        return _near(vectors @ inside, probe, 1) and _near(
            vectors @ (values * inside), matrix @ probe, _largest(matrix)
        )


def _is_svd(matrix: Tensor, answer: tuple[Tensor, ...]) -> bool:
    left, values, right = answer
    probe, small = _probe(matrix, matrix.shape[1]), _probe(matrix, len(values))
    with torch.autocast(matrix.device.type, enabled=False):
        return (
            _near(left @ (values * (right @ probe)), matrix @ probe, _largest(matrix))
            and _near(left.mT @ (left @ small), small, 1)
            and _near(right @ (right.mT @ small), small, 1)
        )


def _probe(matrix: Tensor, count: int) -> Tensor:
    """The same vector (count,) every time: results must not depend on who drew random numbers before."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=generator, dtype=torch.float64).to(matrix)


def _largest(matrix: Tensor) -> Tensor | int:
    """Largest entry: unlike a norm it neither under- nor overflows."""
    return matrix.abs().max() if matrix.numel() else 0


def _near(found: Tensor, expected: Tensor, scale: Tensor | int) -> bool:
    """Whether two products with the probe agree, for a matrix with entries of at most `scale`."""
    if expected.numel() == 0:
        return True
    allowed = ROUNDING * len(expected) * torch.finfo(expected.dtype).eps * scale
    return bool((found - expected).abs().max() <= allowed)  # a NaN compares as false


def _copy(matrix: Tensor) -> Tensor | None:
    """On the CPU, for a bug report; None where a GPU is in no state to give it."""
    try:
        return matrix.detach().cpu().clone()
    except RuntimeError:
        return None


def _text(matrix: Tensor) -> str:
    return f"{matrix.shape[0]} x {matrix.shape[1]}"
