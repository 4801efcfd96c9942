"""Which way of decomposing, multiplying and copying is the fast one on this device: one row for each way.

Called by scale.py (`--what drivers`); its rows decide the defaults of linalg/ (solver, metric, pivot, curvature).
Matrices have the sizes of a 7B model (4096 and 11008) and a spectrum that falls like 1 / k^1.5; `--quick` takes a
sixteenth.
"""

import mmap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.factor import Factors, randomised_factors
from spectrim.linalg.metric import quick_root
from spectrim.linalg.pivot import to_pivots

Row = dict[str, Any]
AT_ONCE = 7
"""Weights of one Llama block: as many decompositions as can run beside each other."""


def seconds(work: Callable[[], Any], device: torch.device, *, repeats: int = 2) -> float:
    """The least of `repeats` times after one run to warm up; a slow first run is not repeated."""

    def once() -> float:
        settle(device)
        start = time.perf_counter()
        work()
        settle(device)
        return time.perf_counter() - start

    first = once()
    return first if first > 5 else min(once() for _ in range(repeats))


def settle(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def energies(n: int, device: torch.device) -> Tensor:
    """A falling spectrum (n,), float64."""
    return torch.arange(1, n + 1, device=device, dtype=torch.float64) ** -1.5


def symmetric(n: int, device: torch.device, seed: int = 0) -> Tensor:
    """A symmetric non-negative matrix (n, n), float64, with known eigenvalues."""
    generator = torch.Generator(device=device).manual_seed(seed)
    draw = torch.randn(n, n, generator=generator, device=device, dtype=torch.float32)
    basis = torch.linalg.qr(draw.double()).Q
    return (basis * energies(n, device)) @ basis.mT


def rows(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, what measures it), in order of importance."""
    n, wide, tokens = (256, 688, 1024) if quick else (4096, 11008, 16384)
    yield from _eigen(n, device)
    yield from _grams(n, wide, tokens, device)
    yield from _triangles(n, wide, device)
    yield from _pivots(n, wide, device)
    yield from _copies(device, quick)
    yield from _products(n, device)
    yield from _slow(n, wide, device)


def _eigen(n: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    def alone(dtype: torch.dtype, solver: Callable[[Tensor], Any]) -> Row:
        matrix = symmetric(n, device).to(dtype)
        return {"seconds": seconds(lambda: solver(matrix), device)}

    def batched(dtype: torch.dtype, solver: Callable[[Tensor], Any], count: int = AT_ONCE) -> Row:
        matrices = torch.stack([symmetric(n, device, seed).to(dtype) for seed in range(count)])
        took = seconds(lambda: solver(matrices), device, repeats=1)
        return {"seconds": took, "seconds_each": took / count}

    def threaded(dtype: torch.dtype, solver: Callable[[Tensor], Any], threads: int) -> Row:
        matrices = [symmetric(n, device, seed).to(dtype) for seed in range(threads)]
        streams = [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(threads)]

        def one(index: int) -> None:
            with torch.cuda.stream(streams[index]):
                solver(matrices[index])

        with ThreadPoolExecutor(threads) as pool:
            took = seconds(lambda: list(pool.map(one, range(threads))), device)
        return {"seconds": took, "seconds_each": took / threads}

    eigh, values = torch.linalg.eigh, torch.linalg.eigvalsh
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        yield f"eigh {n} {name}", lambda d=dtype: alone(d, eigh)
        yield f"eigvalsh {n} {name}", lambda d=dtype: alone(d, values)
        for threads in (3, AT_ONCE):
            yield f"eigh {n} {name}, {threads} threads", lambda d=dtype, t=threads: threaded(d, eigh, t)
        yield f"eigvalsh {n} {name}, {AT_ONCE} threads", lambda d=dtype: threaded(d, values, AT_ONCE)
        yield f"eigh {n} {name}, batch of {AT_ONCE}", lambda d=dtype: batched(d, eigh)
        yield f"eigvalsh {n} {name}, batch of {AT_ONCE}", lambda d=dtype: batched(d, values)
    yield f"float32 eigh {n} polished in float64", lambda: _polished(n, device)


def polish(vectors: Tensor) -> Tensor:
    """One Newton-Schulz step towards orthogonal columns: their error is squared; two products."""
    return 1.5 * vectors - 0.5 * (vectors @ (vectors.mT @ vectors))


def _polished(n: int, device: torch.device) -> Row:
    """Time and errors of float32 eigenvectors, as they come and polished in float64."""
    matrix, known = symmetric(n, device), energies(n, device)
    start = torch.linalg.eigh(matrix.float()).eigenvectors.double()
    found: Row = {"seconds": seconds(lambda: polish(start), device)}
    eye = torch.eye(n, device=device, dtype=torch.float64)
    for name, vectors in (("float32", start), ("polished", polish(start))):
        own = (vectors * (matrix @ vectors)).sum(0).flip(0)
        top = vectors[:, -(n // 2) :]
        lost = float((matrix.diagonal().sum() - (top * (matrix @ top)).sum()) / known[n // 2 :].sum())
        found |= {
            f"orthogonality, {name}": float((vectors.mT @ vectors - eye).abs().max()),
            f"largest relative error of a value, {name}": float(((own - known) / known).abs().max()),
            f"tail at half, of the best, {name}": lost,
        }
    return found


def _grams(n: int, wide: int, tokens: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    def timed_gram(width: int, work: Callable[[Tensor, Tensor], Any], dtype: torch.dtype) -> Row:
        inputs = torch.randn(tokens, width, device=device).to(dtype)
        total = torch.zeros(width, width, device=device)
        took = seconds(lambda: work(total, inputs), device)
        return {"seconds": took, "teraflops": 2 * tokens * width**2 / took / 1e12}

    def wide_product(total: Tensor, x: Tensor) -> None:
        total += x.mT @ x

    def narrow_product(total: Tensor, x: Tensor) -> None:
        total += torch.mm(x.mT, x, out_dtype=torch.float32)  # type: ignore[call-overload]  on a GPU only

    def in_place(total: Tensor, x: Tensor) -> None:
        torch.addmm(total, x.mT, x, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]  as above

    def in_blocks(total: Tensor, x: Tensor, count: int) -> None:
        step = -(-total.shape[0] // count)
        for low in range(0, len(total), step):
            rest = torch.mm(x[:, low : low + step].mT, x[:, low:], out_dtype=torch.float32)  # type: ignore[call-overload]  as above
            total[low : low + step, low:] += rest

    for width in (n, wide):
        yield f"gram {width} float32", lambda w=width: timed_gram(w, wide_product, torch.float32)
        yield f"gram {width} tf32", lambda w=width: _with_tf32(lambda: timed_gram(w, wide_product, torch.float32))
        if device.type == "cuda":
            yield f"gram {width} bf16 to float32", lambda w=width: timed_gram(w, narrow_product, torch.bfloat16)
            yield f"gram {width} bf16 added in place", lambda w=width: timed_gram(w, in_place, torch.bfloat16)
            for count in (2, 4, 8):
                yield (
                    f"gram {width} bf16, upper {count} strips",
                    lambda w=width, c=count: timed_gram(w, lambda total, x: in_blocks(total, x, c), torch.bfloat16),
                )


def _with_tf32(work: Callable[[], Row]) -> Row:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return work()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _triangles(n: int, wide: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    def shrunk(width: int) -> Tensor:
        x = torch.randn(width, width + width // 2, device=device)
        return (x @ x.mT).double() / x.shape[1] + torch.eye(width, device=device, dtype=torch.float64) * 0.01

    def factored(width: int, dtype: torch.dtype) -> Row:
        covariance = shrunk(width).to(dtype)
        return {"seconds": seconds(lambda: torch.linalg.cholesky_ex(covariance), device)}

    def rooted(width: int) -> Row:
        covariance = shrunk(width)
        return {"seconds": seconds(lambda: quick_root(covariance), device)}

    def solved(width: int) -> Row:
        lower = torch.linalg.cholesky_ex(shrunk(width)).L
        thin = torch.randn(width, n, device=device, dtype=torch.float64)
        return {"seconds": seconds(lambda: torch.linalg.solve_triangular(lower, thin, upper=False), device)}

    for width in (n, wide):
        yield f"cholesky {width} float64", lambda w=width: factored(w, torch.float64)
        yield f"cholesky {width} float32", lambda w=width: factored(w, torch.float32)
        yield f"root and inverse {width} float64", lambda w=width: rooted(w)
        yield f"triangular solve {width} x {n} float64", lambda w=width: solved(w)


def _pivots(n: int, wide: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    def stored(outputs: int, rank: int, dtype: torch.dtype) -> Row:
        left = torch.randn(outputs, rank, device=device, dtype=dtype)
        right = torch.randn(rank, n, device=device, dtype=dtype)
        return {"seconds": seconds(lambda: to_pivots(Factors(left, right)), device, repeats=1)}

    def parts(rank: int) -> Row:
        left = torch.randn(n, rank, device=device, dtype=torch.float64)
        square = left[:rank]
        return {
            "seconds": seconds(lambda: torch.linalg.qr(left), device),
            "draw": seconds(lambda: torch.randn(rank, rank, dtype=torch.float64), device),
            "lu": seconds(lambda: torch.linalg.lu_factor(left), device),
            "solve": seconds(lambda: torch.linalg.solve(square, left, left=False), device),
            "largest entry": seconds(lambda: int(left.abs().argmax()), device),
        }

    yield f"parts of pivots of {n} at rank {n // 2}", lambda: parts(n // 2)
    for outputs in (n, wide):
        for dtype in (torch.float64,):
            name = f"pivots of {outputs} x {n} at rank {n // 2} {str(dtype).removeprefix('torch.')}"
            yield name, lambda o=outputs, d=dtype: stored(o, n // 2, d)


def _copies(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    numbers = 2**20 if quick else 2**29  # 2 GiB in float32

    def copied(pinned: bool, there: bool) -> Row:
        on_device = torch.ones(numbers, device=device)
        start = time.perf_counter()
        host = torch.empty(numbers, pin_memory=pinned and device.type == "cuda")
        host.fill_(0)
        made = time.perf_counter() - start
        took = seconds(lambda: host.copy_(on_device) if there else on_device.copy_(host), device)
        return {"seconds": took, "gb_per_s": 4 * numbers / took / 1e9, "seconds_to_allocate": made}

    yield "huge pages on the host, registered", lambda: _huge(device, numbers)
    for pinned in (False, True):
        for there in (True, False):
            name = f"copy {'to' if there else 'from'} the host, {'pinned' if pinned else 'pageable'}"
            yield name, lambda p=pinned, t=there: copied(p, t)


def _huge(device: torch.device, numbers: int) -> Row:
    """Anonymous memory in huge pages that is touched, then made known to the GPU."""
    start = time.perf_counter()
    memory = mmap.mmap(-1, 4 * numbers)
    memory.madvise(mmap.MADV_HUGEPAGE)
    host = torch.frombuffer(memory, dtype=torch.float32)
    host.fill_(0)
    found: Row = {"seconds_to_touch": time.perf_counter() - start}
    if device.type == "cuda":
        start = time.perf_counter()
        found["code"] = int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), 4 * numbers, 0))
        found["seconds_to_register"] = time.perf_counter() - start
    on_device = torch.ones(numbers, device=device)
    took = seconds(lambda: host.copy_(on_device), device)
    if device.type == "cuda":
        torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
    return found | {"seconds": took, "gb_per_s": 4 * numbers / took / 1e9}


def _products(n: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    def multiplied(dtype: torch.dtype) -> Row:
        a = torch.randn(n, n, device=device).to(dtype)
        took = seconds(lambda: a @ a, device, repeats=5)
        return {"seconds": took, "teraflops": 2 * n**3 / took / 1e12}

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        yield f"product {n} {str(dtype).removeprefix('torch.')}", lambda d=dtype: multiplied(d)


def _slow(n: int, wide: int, device: torch.device) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Ways that are not expected to win."""

    def solved(width: int, dtype: torch.dtype) -> Row:
        matrix = symmetric(width, device).to(dtype)
        return {"seconds": seconds(lambda: torch.linalg.eigh(matrix), device)}

    def svd(dtype: torch.dtype, driver: str | None) -> Row:
        matrix = symmetric(n, device).to(dtype)
        if driver is None:
            return {"seconds": seconds(lambda: torch.linalg.svd(matrix, full_matrices=False), device)}
        return {"seconds": seconds(lambda: torch.linalg.svd(matrix, full_matrices=False, driver=driver), device)}

    def randomised(rank: int) -> Row:
        matrix = symmetric(n, device)
        best = float(energies(n, device)[rank:].square().sum())
        factors = randomised_factors(matrix, rank)
        lost = float((matrix - factors.left @ factors.right).square().sum())
        return {"seconds": seconds(lambda: randomised_factors(matrix, rank), device), "error, of the best": lost / best}

    for rank in (n // 32, n // 8):
        yield f"randomised, rank {rank} of {n}", lambda r=rank: randomised(r)
    yield f"eigh {wide} float32", lambda: solved(wide, torch.float32)
    for driver in ("gesvda", "gesvdj") if device.type == "cuda" else (None,):
        yield f"svd {n} float32 {driver or ''}", lambda d=driver: svd(torch.float32, d)
