"""Speed and memory of compressing at scale, on random weights: time and memory are measured, never quality.

    python benchmarks/scale.py --what drivers fast soco-steps growth profile --out results/scale --seconds 540

Rows go to OUT/scale.json, one after the other; a row that fails says why and the next one runs.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import scale_drivers
import scale_low_memory
import scale_profile
import scale_stages
import torch
from rows import attempted
from scale_models import MATRIX_RATE, QUICK, Shape, build, forward_operations, gram_operations, walk_of
from scale_rotary import rotary
from torch import Tensor

from spectrim.engines import recompute, way
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.learned import train_scores
from spectrim.engines.pipeline import compress_model
from spectrim.engines.ranks import plan_ranks
from spectrim.engines.shelf import SpectraShelf
from spectrim.linalg.factor import decompose
from spectrim.linalg.fallback import listening, summary
from spectrim.registry import make_method
from spectrim.report.plot import line_chart

Row = dict[str, Any]
WHAT = ("drivers", "fast", "soco-steps", "growth", "profile")
ON_ASKING = ("rotary", "low-memory-files", "low-memory")
"""The last two need disk for a model in files; see scale_low_memory.py."""
ALLOWED = {"fast": {"seconds": 240, "gpu_gb": 60, "host_gb": 60}}
FLOOR_SHARE = 0.60
"""Of the floor of its operations, what calibration is to reach."""


class Rows:
    """Rows by name in one JSON file that is complete after each; no row is begun after `seconds`."""

    def __init__(self, out: Path, facts: Row, seconds: float) -> None:
        self.path, self.end = out / "scale.json", time.perf_counter() + seconds
        out.mkdir(parents=True, exist_ok=True)
        before = json.loads(self.path.read_text()) if self.path.exists() else {"rows": {}}
        self.found: Row = {"facts": facts, "rows": before["rows"]}

    def add(self, name: str, work: Callable[[], Row], *, always: bool = False) -> Row | None:
        """Measure one row; None where it was not measured. `always`: however late it is."""
        if time.perf_counter() > self.end and not always:
            self._keep(name, {"skipped": "no time left"})
            return None
        started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = attempted(work)
        row["wall_s"] = time.perf_counter() - started
        if torch.cuda.is_available():
            # Where a row lets torch count anew after each stage, torch knows the last one only; the row knows all.
            row["gpu_gb"] = max(torch.cuda.max_memory_allocated() / 1e9, row.get("gpu_gb", 0.0))
            row["gpu_reserved_gb"] = max(torch.cuda.max_memory_reserved() / 1e9, row.get("gpu_reserved_gb", 0.0))
        row["host_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        self._keep(name, row)
        return None if "error" in row else row

    def _keep(self, name: str, row: Row) -> None:
        self.found["rows"][name] = row
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.path)
        print(f"{name:60} {_short(row)}", flush=True)


def _short(row: Row) -> str:
    told = {k: v for k, v in row.items() if k not in ("wall_s", "stages_table")}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items())


class Stages:
    """When each stage began and ended, as progress tells; printed and written while it runs."""

    def __init__(self, path: Path | None) -> None:
        self.begun, self.path = time.perf_counter(), path
        self.told: list[Row] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        if done <= 1 or done == total:
            self.tell(stage, done, total)

    def tell(self, stage: str, done: int, total: int) -> None:
        """One more line."""
        gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        self.told.append({"at_s": time.perf_counter() - self.begun, "stage": f"{stage} {done}/{total}", "gpu_gb": gpu})
        print("   ", _short(self.told[-1]), flush=True)
        if self.path is not None:
            self.path.write_text(json.dumps(self.told, indent=1))


def windows(count: int, length: int, vocabulary: int) -> Tensor:
    """Random tokens (count, length)."""
    return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))


def fast(shape: Shape, device: torch.device, count: int, length: int, told: Path | None = None) -> Row:
    """`--preset fast` in memory, as the command runs it, with its floors; stages are written to `told` meanwhile."""
    model = build(shape, device)
    walk = walk_of(model)
    ids = windows(count, length, shape.vocabulary)
    configured = make_method("soco", preset="fast")
    stages, peaks = Stages(told), scale_stages.Peaks()
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with listening() as fallbacks, peaks.noted():
        outcome = compress_model(model, configured, 0.8, ids, progress=stages)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    given = default_gradient_windows(count, device, length)
    tokens, gradient_tokens = count * length, given * length
    # The first measurement and the second, which takes the windows that give gradients alone.
    forward = forward_operations(model, tokens + gradient_tokens, length) / MATRIX_RATE
    way_back = 2 * forward_operations(model, 2 * gradient_tokens, length) / MATRIX_RATE
    grams = gram_operations(walk, tokens + gradient_tokens, 2 * gradient_tokens) / MATRIX_RATE
    measured = outcome.seconds.get("calibrate", 0.0)
    return {
        "seconds": took,
        "stages": {k: round(v, 3) for k, v in outcome.seconds.items()},
        "gpu_peaks_gb": {k: round(v, 2) for k, v in peaks.gigabytes.items()},
        "gpu_gb": max(peaks.gigabytes.values(), default=0.0),
        "gpu_reserved_gb": peaks.reserved,
        "calibrate_floor_s": {"forward": forward, "recompute and backward": way_back, "statistics": grams},
        "calibrate_of_floor": (forward + way_back + grams) / measured if measured else None,
        "keep": outcome.plan.keep,
        "run": "Run" if way.way_of(device, walk, configured).whole else "LargeRun",
        "warnings": outcome.warnings + summary(fallbacks),
    }


def soco_steps(shape: Shape, device: torch.device, batch: int, length: int, steps: int, told: Path) -> Row:
    """Steps of learned scores on all components of plain decompositions; 300 steps extrapolated from all but the first.

    What is known of the steps so far is in `told`.
    """
    model = build(shape, device)
    walk = walk_of(model)
    method = make_method("soco", options={"steps": steps, "batch_size": batch, "project_every": max(2, steps // 2)})
    spectra = SpectraShelf(device, on_host=True)
    started = time.perf_counter()
    for layer in walk.layers:
        spectra[layer.name] = decompose(model.get_submodule(layer.name).weight.detach().double())
    decomposed = time.perf_counter() - started
    plan = plan_ranks(method, walk, spectra.energies, 0.8)
    ends: list[float] = []

    stages = Stages(told)

    def note(stage: str, done: int, total: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        stages.tell(stage, done, total)

    ids = windows(batch * 2, length, shape.vocabulary)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    learned = train_scores(method, model, walk, spectra, 0.8, ids, plan=plan, progress=note)
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    tokens = batch * length
    # teacher; forward, once more, back to inputs and to weights; and the components of every weight as often as these.
    floor = 5 * forward_operations(model, tokens, length) / MATRIX_RATE
    components = sum(2 * la.outputs * la.inputs * min(la.outputs, la.inputs) for la in walk.layers)
    floor += 3 * components / MATRIX_RATE
    return {
        "seconds_a_step": each, "floor_a_step_s": floor, "of_floor": floor / each, "minutes_of_300": each * 5,
        "decompose_s": decomposed, "loss": learned.losses[-1], "steps": steps,
    }  # fmt: skip


LEAST = 0.02
"""Seconds below which a stage is mostly overhead: no exponent is fitted to it."""
GROWTH = {
    "width": [Shape(w, w * 11 // 4 // 32 * 32, 2, 8000) for w in (512, 1024, 2048, 4096, 8192)],
    "tokens": [64, 128, 256, 512, 1024],
    "depth": [Shape(1024, 2816, d, 8000) for d in (2, 4, 8, 16, 32)],
}


def growth(rows: Rows, device: torch.device, quick: bool, only: str) -> None:
    """Seconds of each stage and memory against width, tokens and depth; exponents fitted to the last three points."""
    sizes: dict[str, list[Any]] = dict(GROWTH)
    base = Shape(1024, 2816, 4, 8000)
    if quick:
        sizes = {"width": [Shape(w, 2 * w, 2, 256) for w in (64, 128, 256)],
                 "tokens": [4, 8, 16], "depth": [Shape(64, 128, d, 256) for d in (2, 4, 8)]}  # fmt: skip
        base = Shape(64, 128, 2, 256)
    count, length = (4, 32) if quick else (64, 1024)
    rows.add("growth, warm up", lambda: fast(base, device, count, length))  # libraries load on the first use
    for axis, points in ((axis, points) for axis, points in sizes.items() if only in axis):
        series: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            shape, number = (base, point) if axis == "tokens" else (point, count)
            at = {"width": shape.width, "depth": shape.depth, "tokens": number * length}[axis]
            row = rows.add(f"growth {axis} {at}", lambda s=shape, n=number: fast(s, device, n, length))
            if row is None:
                continue
            for stage, seconds in [*row["stages"].items(), ("whole", row["seconds"]), ("GPU, GB", row.get("gpu_gb"))]:
                if seconds:
                    series.setdefault(stage, []).append((float(at), float(seconds)))
        if series:
            rows.add(f"growth of {axis}", lambda a=axis, s=series: fitted(rows, a, s), always=True)


def fitted(rows: Rows, axis: str, series: dict[str, list[tuple[float, float]]]) -> Row:
    """The exponent of each stage at the largest sizes, and a chart of logarithms."""
    long_enough = {stage: points for stage, points in series.items() if min(value for _, value in points[-3:]) > LEAST}
    exponents = {stage: round(slope(points[-3:]), 2) for stage, points in long_enough.items() if len(points) > 1}
    logs = {
        f"{stage} {exponents.get(stage, '')}": [(math.log2(at), math.log2(value)) for at, value in points]
        for stage, points in series.items()
        if points[-1][1] > LEAST
    }
    chart = line_chart(logs, title=f"Growth with {axis}", x=f"log2 {axis}", y="log2 seconds (GB)")
    (rows.path.parent / f"growth-{axis}.svg").write_text(chart)
    return {"exponents": exponents}


def slope(points: list[tuple[float, float]]) -> float:
    """Of the straight line through the logarithms, by least squares."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def on_disk(given: argparse.Namespace, rows: Rows, device: torch.device) -> None:
    """Models in files: `low-memory-files` writes one, `low-memory` compresses it and writes it if need be."""
    shape, count, length, shard = (Shape(), 256, 2048, "2GB")
    if given.quick:
        shape, count, length, shard = (scale_low_memory.QUICK_SHAPE, 8, 64, "1MB")
    shape = shape if given.depth is None else shape._replace(depth=given.depth)
    work = given.work or given.out / "low-memory"
    work.mkdir(parents=True, exist_ok=True)
    model = given.files or work / "model"
    if "low-memory-files" in given.what:
        make = scale_low_memory.write_model
        rows.add(f"low-memory-files, {shape.depth} blocks", lambda: make(model, shape, device, shard))
    if "low-memory" in given.what:
        stages = scale_low_memory.StageTable(given.out / "low-memory-stages.json")
        measure = scale_low_memory.low_memory
        row = rows.add(
            f"low-memory, {shape.depth} blocks",
            lambda: measure(work, model, shape, device, count, length, shard, stages),
        )
        stages.note("end")
        print(stages.table())
        if row is not None:
            print({key: (row.get(key), "at most", most) for key, most in scale_low_memory.ALLOWED.items()})


def main() -> None:
    """Measure what was asked for, one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=[*WHAT], choices=[*WHAT, *ON_ASKING])
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no row after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-up", action="store_true", help="a small model first, so that libraries are loaded")
    parser.add_argument("--depth", type=int, help="blocks of the model of `fast` and `low-memory`, instead of all")
    parser.add_argument("--work", type=Path, help="where `low-memory` writes; default OUT/low-memory")
    parser.add_argument("--files", type=Path, help="where its model is, or is to be; default WORK/model")
    parser.add_argument("--steps", type=int, default=8, help="of soco-steps")
    parser.add_argument("--only", default="", help="of drivers, profile and growth, what has this in its name")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script on a CPU")
    given = parser.parse_args()
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = Rows(given.out, {"device": name, "torch": torch.__version__, "quick": given.quick}, given.seconds)
    on_disk(given, rows, device)
    always = given.quick or given.depth is not None or {"profile", "growth"} & {*given.what}
    with block_by_block() if always else nullcontext():
        measure_parts(rows, given, device)


def measure_parts(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    """Each of PARTS that was asked for."""
    for what in [w for w in ("rotary", "profile", "fast", "soco-steps", "growth", "drivers") if w in given.what]:
        PARTS[what](rows, given, device)


@contextmanager
def block_by_block() -> Iterator[None]:
    """Models go the way of large ones meanwhile."""
    own = way.fits_whole
    try:
        for module in (way, recompute):
            module.fits_whole = lambda *_: False
        yield
    finally:
        for module in (way, recompute):
            module.fits_whole = own


def _whole(given: argparse.Namespace) -> tuple[Shape, int, int]:
    """The model, and how many windows of what length."""
    shape, count, length = (QUICK, 8, 64) if given.quick else (Shape(), 256, 2048)
    return (shape if given.depth is None else shape._replace(depth=given.depth)), count, length


def _fast(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    shape, count, length = _whole(given)
    if given.warm_up:  # libraries load and kernels compile on the first use, those for heads of this number and size
        small = shape._replace(inner=shape.inner // 4, depth=2, vocabulary=1000)
        with block_by_block():
            rows.add("warm up", lambda: fast(small, device, 8, length))
    told = given.out / "fast-stages.json"
    row = rows.add(f"fast, {shape.depth} blocks", lambda: fast(shape, device, count, length, told))
    if row is not None:
        print(scale_stages.table(row))
        limits = {key: (row.get(key), "at most", most) for key, most in ALLOWED["fast"].items()}
        print(limits | {"calibrate_of_floor": (row["calibrate_of_floor"], "at least", FLOOR_SHARE)})


def _rotary(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    tokens, heads, size = (128, 4, 16) if given.quick else (65_536, 32, 128)
    rows.add("rotation of queries and keys", lambda: rotary(tokens, heads, size, device))


def _profile(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    shape, count, length = _whole(given)
    small = shape._replace(width=shape.width // 4, inner=shape.inner // 4, depth=2)
    rows.add("warm up", lambda: fast(small, device, max(2, count // 16), length))
    for label, work in scale_profile.rows(lambda: fast(shape, device, count, length), device, given.quick):
        if given.only in label:
            rows.add(label, work)
    print(scale_profile.table(rows.found["rows"]))


def _soco_steps(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    shape, _, length = _whole(given)
    batch, told = 2 if given.quick else 8, given.out / "steps.json"
    rows.add("soco-steps", lambda: soco_steps(shape, device, batch, length, given.steps, told))


def _drivers(rows: Rows, given: argparse.Namespace, device: torch.device) -> None:
    for label, work in scale_drivers.rows(device, given.quick):
        if given.only in label:
            rows.add(label, work)


PARTS: dict[str, Callable[[Rows, argparse.Namespace, torch.device], None]] = {
    "profile": _profile,
    "fast": _fast,
    "rotary": _rotary,
    "soco-steps": _soco_steps,
    "growth": lambda rows, given, device: growth(rows, device, given.quick, given.only),
    "drivers": _drivers,
}


if __name__ == "__main__":
    main()
