"""Where the time of `soco --preset fast` goes, and what might take less: one row for each run and each candidate.

Called by scale.py (`--what profile`), in this order:

    as it is         stages, peak, and the floor of calibration
    in parts         the same run with the GPU waited for before and after each part: eigenproblems, products, copies
    kernels          of the stages that solve no eigenproblem: seconds by kind, the longest ones, and how long none ran
    candidates       other ways for what was found to be slow

A symmetric solver launches tens of thousands of kernels, which no profiler should note: its stages have parts alone.
"""

import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from scale_drivers import Row, energies, seconds, settle, symmetric
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from spectrim.engines import large, measure_blocks, newton_blocks, pipeline, propagate, relay, run, shelf, stream
from spectrim.engines.ferry import ferry_of
from spectrim.linalg import factor, pivot
from spectrim.linalg.curvature import add_gram
from spectrim.nn import scored

PARTS: list[tuple[Any, str, str]] = [
    (torch.linalg, "eigh", "eigenproblems"),
    (factor, "triangle_of", "roots"),
    (factor, "safe_cholesky", "roots"),
    (shelf.StatsShelf, "__getitem__", "statistics to the device"),
    (shelf.StatsShelf, "add", "statistics to the shelf"),
    (shelf.SpectraShelf, "__setitem__", "spectra to the shelf"),
    (shelf.SpectraShelf, "__getitem__", "spectra from the shelf"),
    (large, "energies_of_layer", "products around eigenproblems"),
    (large, "decompose_all", "products around eigenproblems"),
    (propagate, "decompose_layer", "products around eigenproblems"),
    (propagate, "drift_target", "drift targets"),
    (propagate, "input_moments", "moments of inputs"),
    (propagate, "inputs_of", "inputs of the dense model"),
    (propagate, "place_cut", "placing"),
    (stream.Stream, "advance", "blocks, forward"),
    (relay.Relay, "check", "check of the relay"),
    (relay.Relay, "enter", "embeddings and calls"),
    (relay.Relay, "run", "blocks, forward"),
    (measure_blocks._Run, "_gradient_of_loss", "gradient of the loss"),
    (measure_blocks, "add_input", "sums over inputs"),
    (measure_blocks, "add_gradient", "sums over output gradients"),
    (measure_blocks._Run, "_put", "finishing sums"),
    (torch.autograd, "grad", "blocks, backward"),
    (newton_blocks, "_entered", "states of the dense model"),
    (newton_blocks, "_gradients", "gradient of the scores"),
    (newton_blocks, "_losses", "lengths of the step"),
    (scored.ScoredLinear, "settle", "scored layers"),
    (pivot, "_generic_basis", "basis of the rows"),
    (pivot, "_start", "LU"),
    (pivot, "_swap_until_bounded", "swaps of rows"),
]
"""What is waited for, and under which name; the time of a part inside another one is counted once, as its own."""
TRACED = ("calibrate", "place", "newton", "encode")
"""Stages whose kernels are noted."""
KINDS = {
    "copies": r"memcpy|aten::copy_|aten::_to_copy",
    "fills": r"memset|aten::zero_|aten::fill_",
    "attention": r"flash|fmha|attention|sdpa",
    "solvers": r"potr|getr|trsm|trtri|geqr|orgqr|ormqr|larf|syev|sytr|laswp|aten::_?linalg",
    "products": r"gemm|gemv|cutlass|nvjet|xmma|cublas|splitk|aten::(add|b)?mm$|aten::mv|aten::dot",
    "sums and norms": r"reduce|softmax|norm|aten::sum|aten::mean",
    "element by element": r"elementwise|vectorized|catarray|triu|tril|index|gather|scatter|random|distribution|aten::",
}
"""Kernels by name; the first that fits."""


def rows(fast: Callable[[], Row], device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(name, what measures it); `fast` is one whole run."""
    yield "profile: as it is", fast
    yield "profile: in parts", lambda: in_parts(fast, device)
    yield "profile: kernels", lambda: kernels(fast, device)
    yield from candidates(device, quick)


def table(found: dict[str, Row]) -> str:
    """The runs among the rows, in a few lines for each stage."""
    whole = found.get("profile: as it is", {})
    lines = [f"as it is: {whole.get('seconds')} s, calibration at {whole.get('calibrate_of_floor')} of its floor"]
    for stage, parts in found.get("profile: in parts", {}).get("parts", {}).items():
        lines.append(f"{stage} ({whole.get('stages', {}).get(stage)} s as it is)")
        lines += [f"    {took:8.3f} s  {part}" for part, took in parts.items() if took >= 0.01]
    for stage, kinds in found.get("profile: kernels", {}).get("kernels", {}).items():
        lines.append(f"kernels of {stage}: busy {kinds['busy']} of {kinds['from first to last']} s")
        lines += [f"    {took:8.3f} s  {kind}" for kind, took in kinds["seconds"].items()]
    return "\n".join(lines)


@contextmanager
def stages_seen(begin: Callable[[str], None], end: Callable[[str], None]) -> Iterator[None]:
    """Tells when a stage of the closed form begins and ends."""
    own = run.timed

    @contextmanager
    def told(clock: dict[str, float], stage: str) -> Iterator[None]:
        with own(clock, stage):
            begin(stage)
            try:
                yield
            finally:
                end(stage)

    modules = (run, large, pipeline)
    try:
        for module in modules:
            module.timed = told
        yield
    finally:
        for module in modules:
            module.timed = own


class Parts:
    """Seconds by (stage, part); what lies inside another part is taken from that one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stages, self.open = device, ["before"], list[list[float]]()
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[str, int] = defaultdict(int)
        self.thread = threading.get_ident()

    def wrapped(self, own: Callable[..., Any], part: str) -> Callable[..., Any]:
        """`own`, waited for."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return own(*args, **kwargs)
            settle(self.device)
            self.open.append([0.0])
            start = time.perf_counter()
            try:
                return own(*args, **kwargs)
            finally:
                settle(self.device)
                took, inside = time.perf_counter() - start, self.open.pop()[0]
                self.seconds[self.stages[-1]][part] += took - inside
                self.calls[part] += 1
                if self.open:
                    self.open[-1][0] += took

        return measured


def in_parts(fast: Callable[[], Row], device: torch.device) -> Row:
    """One run with every part of PARTS waited for: what each stage is made of."""
    parts = Parts(device)
    own = [(owner, name, getattr(owner, name)) for owner, name, _ in PARTS]
    try:
        for owner, name, part in PARTS:
            setattr(owner, name, parts.wrapped(getattr(owner, name), part))
        with stages_seen(parts.stages.append, lambda _: parts.stages.pop()):
            row = fast()
    finally:
        for owner, name, before in own:
            setattr(owner, name, before)
    found = {}
    for stage, took in row["stages"].items():
        inside = {part: round(s, 3) for part, s in sorted(parts.seconds[stage].items(), key=lambda kv: -kv[1])}
        found[stage] = inside | {"rest": round(took - sum(inside.values()), 3)}
    return {"seconds": row["seconds"], "stages": row["stages"], "parts": found, "calls": dict(parts.calls)}


def kernels(fast: Callable[[], Row], device: torch.device) -> Row:
    """One run in which the kernels of TRACED stages are noted."""
    on_gpu = device.type == "cuda"
    seen: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    stacks: dict[str, tuple[ExitStack, profile]] = {}

    def begin(stage: str) -> None:
        if stage in TRACED:
            stack = ExitStack()
            activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
            stacks[stage] = stack, stack.enter_context(profile(activities=[activity]))

    def end(stage: str) -> None:
        if stage in TRACED:
            settle(device)
            stack, noted = stacks.pop(stage)
            stack.close()
            wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
            for event in noted.events() or []:
                if event.device_type == wanted:
                    took = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
                    seen[stage].append((event.name, event.time_range.start, took))

    with stages_seen(begin, end):
        row = fast()
    by_stage = {stage: _by_kind(events) for stage, events in seen.items()}
    return {"calibrate_floor_s": row["calibrate_floor_s"], "kernels": by_stage}


def _by_kind(events: list[tuple[str, float, float]]) -> Row:
    """Seconds by kind, the longest kernels, and how much of the time from first to last none ran (us in, s out)."""
    kinds, names = defaultdict(float), defaultdict(lambda: [0.0, 0])
    busy, last, first = 0.0, float("-inf"), min((start for _, start, _ in events), default=0.0)
    for name, start, took in sorted(events, key=lambda event: event[1]):
        kinds[kind_of(name)] += took / 1e6
        names[name[:90]][0] += took / 1e6
        names[name[:90]][1] += 1
        busy += max(0.0, start + took - max(start, last)) / 1e6
        last = max(last, start + took)
    longest = sorted(names.items(), key=lambda kv: -kv[1][0])[:14]
    return {
        "seconds": {kind: round(s, 4) for kind, s in sorted(kinds.items(), key=lambda kv: -kv[1])},
        "busy": round(busy, 3),
        "from first to last": round((last - first) / 1e6, 3) if events else 0.0,
        "count": len(events),
        "longest": {name: [round(took, 4), count] for name, (took, count) in longest},
    }


def kind_of(name: str) -> str:
    """Of KINDS, or other."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def candidates(device: torch.device, quick: bool) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Other ways, in order of what they may save."""
    n, tokens, wide = (128, 512, 352) if quick else (4096, 65_536, 11_008)
    yield f"eigh {n} beside bf16 products", lambda: beside(n, device, torch.linalg.eigh)
    yield f"cholesky {n} beside bf16 products", lambda: beside(n, device, torch.linalg.cholesky)
    yield f"what eigh {n} is made of", lambda: made_of(n, device)
    for size in (n // 4, n // 2, n * 11 // 20):
        yield f"eigh {size}", lambda s=size: {"seconds": _time_of(torch.linalg.eigh, s, device)}
    if device.type == "cuda":
        for library in ("magma", "cusolver"):
            yield f"eigh {n} by {library}", lambda lib=library: by_library(n, device, lib)
    for steps in (1, 2, 4):
        yield f"{steps} warm subspace iterations of {n}", lambda s=steps: warm(n, device, s)
    yield "norms, as in the model and fused", lambda: norms(tokens, n, device)
    yield "gate of an MLP, rotation of heads", lambda: elementwise(tokens, n, wide, device)
    for width in (n, wide):
        yield f"sums of {width}, whole and above the diagonal", lambda w=width: sums(tokens // 4, w, device)
    yield "to the host and back", lambda: carried(device, quick)
    yield f"basis of {n} rows, by QR and by Cholesky", lambda: bases(n, device)


def _time_of(work: Callable[[Tensor], Any], size: int, device: torch.device) -> float:
    matrix = symmetric(size, device)
    return seconds(lambda: work(matrix), device, repeats=1)


def beside(n: int, device: torch.device, solve: Callable[[Tensor], Any]) -> Row:
    """A solver in a thread and a stream of its own while this thread multiplies: how much of it costs nothing."""
    matrix = symmetric(n, device) + torch.eye(n, device=device, dtype=torch.float64)
    a = torch.randn(2 * n, 2 * n, device=device).bfloat16()
    lane = torch.cuda.Stream(device) if device.type == "cuda" else None
    count = 3 if device.type == "cpu" else 20

    def solver() -> None:
        with torch.cuda.stream(lane):
            for _ in range(3):
                solve(matrix)

    def products() -> None:
        for _ in range(count):
            a @ a

    def both() -> None:
        thread = threading.Thread(target=solver)
        thread.start()
        products()
        thread.join()

    solving = seconds(solver, device, repeats=1)
    one = seconds(products, device, repeats=1)
    count = max(1, round(count * solving / one))  # as long as the solver takes
    multiplying, together = seconds(products, device, repeats=1), seconds(both, device, repeats=1)
    start = time.thread_time()
    solver()
    settle(device)
    return {
        "solver alone": solving, "products alone": multiplying, "together": together,
        "hidden": (solving + multiplying - together) / min(solving, multiplying),
        "host seconds of the solver": time.thread_time() - start,
    }  # fmt: skip


def made_of(n: int, device: torch.device) -> Row:
    """Kernels of one eigenproblem: long ones that fill the device, or many short ones."""
    matrix = symmetric(n, device)
    took = seconds(lambda: torch.linalg.eigh(matrix), device, repeats=1)
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as noted:
        torch.linalg.eigh(matrix)
        settle(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in noted.events() or []
              if e.device_type == wanted]  # fmt: skip
    return {"seconds": took} | _by_kind(events)


def by_library(n: int, device: torch.device, library: str) -> Row:
    """The same solver of another library."""
    before = torch.backends.cuda.preferred_linalg_library()
    try:
        torch.backends.cuda.preferred_linalg_library(library)
        return {"seconds": _time_of(torch.linalg.eigh, n, device)}
    finally:
        torch.backends.cuda.preferred_linalg_library(before)


def warm(n: int, device: torch.device, steps: int) -> Row:
    """Subspace iterations from the basis of a matrix that is 10 % different, at rank 0.55 n, and the small problem.

    The error is what is lost beyond the best of that rank, relative to it; that of the values is of the kept ones.
    """
    rank = n * 11 // 20
    old, other = symmetric(n, device), symmetric(n, device, seed=1)
    matrix = 0.9 * old + 0.1 * other
    known, vectors = torch.linalg.eigh(matrix)
    start = torch.linalg.eigh(old).eigenvectors[:, -rank:]
    found: list[Tensor] = []

    def iterate() -> None:
        basis = start
        for _ in range(steps):
            basis = orthonormal(matrix @ basis)
        values, turn = torch.linalg.eigh(basis.mT @ (matrix @ basis))
        found[:] = [values, basis @ turn]

    took = seconds(iterate, device, repeats=1)
    best = known[: n - rank].sum()
    lost = matrix.diagonal().sum() - found[0].sum()
    kept = known[n - rank :]
    return {
        "seconds": took, "rank": rank, "error, beyond the best": float(lost / best - 1),
        "values, relative": float(((found[0] - kept) / kept).abs().max()),
        "without iterations": float((matrix.diagonal().sum() - ((matrix @ start) * start).sum()) / best - 1),
        "spread of the vectors": float(vectors.abs().max()),
    }  # fmt: skip


def orthonormal(columns: Tensor) -> Tensor:
    """By two Cholesky factorisations: products and triangular systems alone."""
    for _ in range(2):
        gram = columns.mT @ columns
        gram.diagonal().add_(gram.diagonal().max() * 1e-14)
        lower = torch.linalg.cholesky(gram)
        columns = torch.linalg.solve_triangular(lower.mT, columns, upper=True, left=False)
    return columns


def norms(tokens: int, width: int, device: torch.device) -> Row:
    """Llama's norm in single steps, and as one kernel; forward, and with the way back."""
    x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_(True)
    weight = torch.rand(width, device=device).bfloat16() + 0.5
    upstream = torch.randn(tokens, width, device=device).bfloat16()

    def steps() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def fused() -> Tensor:
        return F.rms_norm(x, (width,), weight, 1e-6)

    found: Row = {"largest difference": float((steps().float() - fused().float()).detach().abs().max())}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found["dtype under autocast"] = str(fused().dtype)
    for name, work in (("steps", steps), ("fused", fused)):
        with torch.no_grad():
            found[name] = seconds(work, device, repeats=3)
        found[f"{name}, and back"] = seconds(lambda w=work: torch.autograd.grad(w(), x, upstream), device, repeats=3)
    return found


def elementwise(tokens: int, width: int, wide: int, device: torch.device) -> Row:
    """What stands between the products of a Llama block beside its norms, and attention."""
    found: Row = {"silu times up": _of_an_mlp(tokens, wide, device)}
    length, size = min(2048, tokens), 128 if width >= 128 else width
    heads = torch.randn(tokens // length, length, width // size, size, device=device).bfloat16().transpose(1, 2)
    cos, sin = (torch.randn(1, 1, length, size, device=device).bfloat16() for _ in range(2))

    def rotated() -> Tensor:
        half = size // 2
        return heads * cos + torch.cat((-heads[..., half:], heads[..., :half]), -1) * sin

    found["rotation of one of q, k"] = seconds(rotated, device, repeats=3)
    attend = F.scaled_dot_product_attention
    found["attention"] = seconds(lambda: attend(heads, heads, heads, is_causal=True), device, repeats=3)
    x = torch.randn(tokens, width, device=device).bfloat16()
    found["sum of two states"] = seconds(lambda: x + x, device, repeats=3)
    weight = torch.randn(width, width, device=device).bfloat16()
    found["product with a square weight"] = seconds(lambda: F.linear(x, weight), device, repeats=3)
    return found


def _of_an_mlp(tokens: int, wide: int, device: torch.device) -> float:
    gate, up = (torch.randn(tokens, wide, device=device).bfloat16() for _ in range(2))
    return seconds(lambda: F.silu(gate) * up, device, repeats=3)


def sums(tokens: int, width: int, device: torch.device) -> Row:
    """Adding one batch to a float64 sum."""
    x = torch.randn(tokens, width, device=device).bfloat16()
    total = torch.zeros(width, width, device=device, dtype=torch.float64)
    return {
        "whole": seconds(lambda: add_gram(total, x), device, repeats=3),
        "upper": seconds(lambda: add_gram(total, x, upper=True), device, repeats=3),
        "tokens": tokens,
    }


def carried(device: torch.device, quick: bool) -> Row:
    """Eight tensors of the size of a packed Gram of 11,008 inputs through the ferry; and pinning as much."""
    numbers, count = (2**16, 8) if quick else (66_000_000, 8)
    ferry, tensors = ferry_of(device), [torch.ones(numbers, device=device) for _ in range(count)]
    hosts = [torch.empty(numbers) for _ in range(count)]

    def away() -> list[Any]:
        return [ferry.away(tensor, host) for tensor, host in zip(tensors, hosts, strict=True)]

    settle(device)
    start = time.perf_counter()
    done = away()
    asked = time.perf_counter() - start
    for future in done:
        future.result()
    first = time.perf_counter() - start
    again = seconds(lambda: [future.result() for future in away()], device, repeats=1)
    back = seconds(lambda: [ferry.take(c) for c in [ferry.ahead(host) for host in hosts]], device, repeats=1)
    start = time.perf_counter()
    pinned = torch.empty(numbers, pin_memory=device.type == "cuda")
    pinning = time.perf_counter() - start
    gigabytes = 4 * numbers * count / 1e9
    del pinned
    return {
        "gb": gigabytes, "caller waits": asked, "first time, gb_per_s": gigabytes / first,
        "again, gb_per_s": gigabytes / again, "back, gb_per_s": gigabytes / back,
        "pinning, gb_per_s": 4 * numbers / pinning / 1e9,
    }  # fmt: skip


def bases(n: int, device: torch.device) -> Row:
    """For pivot storage at rank 0.55 n: orthonormal columns, LU, and the swaps after it."""
    rank = n * 11 // 20
    left = torch.randn(n, rank, device=device, dtype=torch.float64) * energies(rank, device).sqrt()
    basis = pivot._generic_basis(left)
    index, coefficients = pivot._start(basis)
    return {
        "rank": rank,
        "QR": seconds(lambda: torch.linalg.qr(left).Q, device, repeats=1),
        "as it is": seconds(lambda: pivot._generic_basis(left), device, repeats=1),
        "LU": seconds(lambda: torch.linalg.lu_factor(basis), device, repeats=1),
        "LU and coefficients": seconds(lambda: pivot._start(basis), device, repeats=1),
        "swaps": seconds(
            lambda: pivot._swap_until_bounded(index[:rank], index[rank:], coefficients, 1.2), device, repeats=1
        ),
        "largest coefficient before": float(coefficients.abs().max()),
        "energies in decades": float(energies(rank, device).log10().abs().max()),
    }
