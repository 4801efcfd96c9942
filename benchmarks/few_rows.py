"""Kernels for few rows, tile by tile: microseconds of all linear layers of a decoder layer, and errors of the results.

    python benchmarks/few_rows.py --seconds 100 --out results/few-rows.json     one GPU
    TRITON_INTERPRET=1 python benchmarks/few_rows.py --quick                   small shapes on the CPU: does it run

Twelve decoder layers of 7B shape with random weights; each group of layers that read one input is timed by itself, over
all twelve in one CUDA graph, so that weights come from memory. Kernels are compiled first, by several processes into
Triton's cache; those that do not compile, or not in time, are named and left out. Then the tiles of the first launch
are tried, and with the best of them those of the second: for 1 and 16 rows all tiles, also such as `speed_up` does not
try, for the numbers between them the best of those of 16. Every tile's numbers are compared with float64 (largest error
of a group, relative) and with those of a second run, bit for bit. The JSON file is written after each row.
"""

import argparse
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from decode import Bench, build, ceilings, groups_of, stored_bytes

from spectrim.nn.codecs import StoredLinear
from spectrim.nn.kernels.choice import CODED_TILES, LINES_TILES, MATVEC_TILES, dense_us
from spectrim.nn.kernels.few import FewRows, coded_parts, group_of, plain_parts
from spectrim.nn.kernels.launch import Tile, missing
from spectrim.nn.linears import LowRankLinear, PivotLinear

STORAGES = ("factor-4", "factor", "packed-4", "factor-8", "factor-2", "pivot-4", "packed-3", "packed-8", "pivot")
NAMES = ("q, k, v", "o", "gate, up", "down")
LAYERS, BETWEEN = 12, 4
"""Decoder layers timed together; tiles tried for 2, 4 and 8 rows."""
OVERLAP = int(os.environ.get("TRITON_INTERPRET") != "1")
"""Launches overlap, but not in the interpreter."""
WRONG = 0.02
"""Relative error of a result in bfloat16 beyond which it counts as wrong."""


WIDE_TILES = tuple(Tile(n, 1, warps, 1, splits=splits) for warps in (4, 8) for n in (32, 64) for splits in (1, 2, 4, 8))
"""Of codes, for 2 rows and more."""


def tiles_for(storage: str, rows: int) -> list[Tile]:
    """All that are tried; one in the interpreter."""
    one, some = (CODED_TILES, WIDE_TILES) if "-" in storage else (MATVEC_TILES, LINES_TILES)
    tiles = one if rows == 1 else some
    return [tile._replace(pdl=OVERLAP) for tile in (tiles if OVERLAP else tiles[1:2])]


@cache
def bench_of(quick: bool, layers: int) -> Bench:
    """The ground that `decode.py` builds models on."""
    given = argparse.Namespace(out=None, seconds=1e9, quick=quick, only=None, layers=layers, command="")
    made = Bench(given)
    if quick:
        made.dtype = torch.float16  # the interpreter has no bfloat16
        made.shape |= {"hidden_size": 128, "intermediate_size": 192}
    return made


@cache
def groups_for(storage: str, quick: bool, layers: int) -> list[list[FewRows]]:
    """Groups of the four kinds, each of all layers."""
    found = groups_of(build(bench_of(quick, layers), 0.5, storage, multiple=32))
    return [[group_of(group, {}) for group in found[i::4]] for i in range(4)]


def compile_one(storage: str, kind: int, tile: Tile, rows: int, quick: bool) -> str | None:
    """Run one tile once, in a process of its own, for its entry in Triton's cache; what went wrong."""
    try:
        group = groups_for(storage, quick, 1)[kind][0]
        with torch.no_grad():
            group.all_of(given(group, rows), (tile, tile))
        if not quick:
            torch.cuda.synchronize()
    except Exception as error:  # a tile that does not compile, or finds no memory, is told in the file
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def given(group: FewRows, rows: int) -> torch.Tensor:
    """x (rows, I)."""
    generator = torch.Generator(group.device).manual_seed(rows)
    return torch.randn(rows, group.layers[0].in_features, dtype=group.dtype, device=group.device, generator=generator)


def in_float64(layer: StoredLinear, x: torch.Tensor) -> torch.Tensor:
    """y (M, O) of x (M, I)."""
    wide = torch.float64
    if isinstance(layer, LowRankLinear | PivotLinear):
        parts = [part.to(wide) for part in plain_parts(layer)]
    else:
        parts = [store.matrix(wide) for store in coded_parts(layer)]
    mid = x.to(wide) @ parts[0].mT
    if len(parts) == 1:
        return mid
    y = mid @ parts[1].mT
    return y if "pivot" not in layer.codec else torch.cat([mid, y], -1)[:, layer.order]


class Compiled:
    """Which tiles of which storage ran once, by processes beside each other."""

    def __init__(self, storages: list[str], rows: list[int], *, quick: bool, limit: float) -> None:
        self.failed: dict[str, str] = {}
        self.able: set[tuple[str, Tile]] = set()
        asked = [
            (storage, kind, tile, n)
            for storage in storages for n in sorted({compiled_for(storage, n) for n in rows})
            for tile in dict.fromkeys(map(as_compiled, tiles_for(storage, n))) for kind in (1, 3)
        ]  # fmt: skip
        if quick:
            outcomes = [(job, compile_one(*job, True)) for job in asked]
        else:
            outcomes = self._beside(asked, limit)
        for (storage, _, tile, _), said in outcomes:
            if said is not None:
                self.failed[f"{storage} {tuple(tile)}"] = said
            self.able.add((storage, tile))
        self.able -= {(storage, tile) for (storage, _, tile, _), said in outcomes if said is not None}

    def _beside(self, asked: list[Any], limit: float) -> list[Any]:
        count = max(1, min(14, (os.cpu_count() or 2) - 2))
        pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        began = time.perf_counter()
        jobs: list[tuple[Any, Future[str | None]]] = [(job, pool.submit(compile_one, *job, False)) for job in asked]
        outcomes = []
        for job, future in jobs:
            try:
                said = future.result(timeout=max(0.01, limit - (time.perf_counter() - began)))
            except TimeoutError:
                said = "no time"
            except Exception as error:  # a process that was killed
                said = f"{type(error).__name__}: {error}"
            outcomes.append((job, said))
        pool.shutdown(wait=True, cancel_futures=True)
        return outcomes

    def takes(self, storage: str, tile: Tile) -> bool:
        return (storage, as_compiled(tile)) in self.able


def compiled_for(storage: str, rows: int) -> int:
    """A number of rows with the same kernel: those of 16 bits have one of their own for 16."""
    return rows if rows == 1 or (rows == 16 and "-" not in storage) else 2


def as_compiled(tile: Tile) -> Tile:
    """The tile whose kernel it shares: how many programs divide the inputs is no part of the code."""
    return tile._replace(splits=min(tile.splits, 2))


class Search:
    """The best pair of tiles for one kind of group and number of rows."""

    def __init__(self, bench: Bench, groups: list[FewRows], rows: int) -> None:
        self.bench, self.groups, self.x = bench, groups, given(groups[0], rows)
        self.expected = [in_float64(layer, self.x) for layer in groups[0].layers]
        self.found: dict[tuple[Tile, Tile], float] = {}
        self.error = 0.0
        self.notes: list[str] = []

    def clock(self, pair: tuple[Tile, Tile]) -> float:
        """Microseconds a decoder layer; infinite where it fails."""
        if self.bench.left() < 0:
            return self.found.get(pair, float("inf"))
        if pair not in self.found:
            self.found[pair] = float("inf")
            try:
                made = self.groups[0].all_of(self.x, pair)
                off = max(float((a - b).norm() / b.norm()) for a, b in zip(made, self.expected, strict=True))
                if not off < WRONG:
                    self.notes.append(f"{tuple(map(tuple, pair))}: off by {off:.3g}")
                    return float("inf")
                self.error = max(self.error, off)
                again = self.groups[0].all_of(self.x, pair)
                if not all(torch.equal(a, b) for a, b in zip(made, again, strict=True)):
                    self.notes.append(f"{tuple(map(tuple, pair))}: other bits when run again")
                    return float("inf")
                seconds = self.bench.clock(lambda: [group.all_of(self.x, pair) for group in self.groups], replays=3)
                self.found[pair] = seconds / len(self.groups) * 1e6
            except Exception as error:  # one tile that fails must not take the others along
                self.notes.append(f"{tuple(map(tuple, pair))}: {type(error).__name__}: {str(error)[:200]}")
        return self.found[pair]

    def over(self, tiles: list[Tile], *, one: bool) -> None:
        """The first launch's tiles with one for the second, then the second's with the best first."""
        if not tiles:
            return
        fixed = tiles[len(tiles) // 2]
        firsts = {tile: self.clock((tile, tile if one else fixed)) for tile in tiles}
        if not one:
            best = min(firsts, key=lambda tile: firsts[tile])
            for tile in tiles:
                self.clock((best, tile))

    def best(self, count: int = 1) -> list[tuple[Tile, Tile]]:
        ran = [pair for pair in self.found if self.found[pair] < float("inf")]
        return sorted(ran, key=lambda pair: self.found[pair])[:count]


def row(bench: Bench, storage: str, rows: list[int], compiled: Compiled) -> dict[str, Any]:
    """All four kinds of one storage: 1 and 16 rows by all tiles, the others by the best of those."""
    kinds = groups_for(storage, bench.quick, bench.shape["num_hidden_layers"])
    one = storage.startswith("packed")
    made: dict[str, Any] = {"storage": storage, "us": {}, "dense_us": {}, "kinds": []}
    for name, groups in zip(NAMES, kinds, strict=True):
        tried: list[tuple[Tile, Tile]] = []
        for count in sorted(rows, key=lambda n: (n not in (16, 1), n)):
            search = Search(bench, groups, count)
            with torch.no_grad():
                if count in (1, 16) or not tried:
                    search.over([t for t in tiles_for(storage, count) if compiled.takes(storage, t)], one=one)
                else:
                    for pair in tried:
                        search.clock(pair)
                if count > 1 and not tried:
                    tried = search.best(BETWEEN)
                dense = None if bench.quick else dense_us([group.layers for group in groups], search.x)
            best = search.best()
            least = search.found[best[0]] if best else None
            made["kinds"].append({
                "kind": name, "rows": count, "us": least, "tiles": best[0] if best else None, "error": search.error,
                "dense_us": dense, "bytes": sum(stored_bytes(layer) for layer in groups[0].layers),
                "all": [[*map(tuple, pair), round(us, 2)] for pair, us in search.found.items()],
                "notes": search.notes[:6],
            })  # fmt: skip
            for which, us in (("us", least), ("dense_us", dense)):
                before = made[which].get(count, 0.0)
                made[which][count] = None if us is None or before is None else before + us
            shown = "-" if least is None else f"{least:.1f} us {tuple(map(tuple, best[0]))}"
            print(f"{storage:10}{name:10}{count:4} rows: {shown}, dense {dense or float('nan'):.1f} us", flush=True)
    return made


def main(bench: Bench, storages: list[str], rows: list[int]) -> None:
    """Ceilings, compiling, then the storages."""
    bench.row("ceilings", lambda: ceilings(bench))
    done: list[Compiled] = []

    def compiling() -> dict[str, Any]:
        done.append(Compiled(storages, rows, quick=bench.quick, limit=0.45 * bench.seconds))
        return {"able": len(done[0].able), "failed": done[0].failed}

    bench.row("compiling", compiling)
    for storage in storages:
        # A model goes before the next one comes.
        bench.row(storage, lambda s=storage: row(bench, s, rows, done[0]))
        groups_for.cache_clear()
    table(bench, rows)


def table(bench: Bench, rows: list[int]) -> None:
    """Microseconds of the linear layers of a decoder layer: kernels / dense."""
    print(f"us of the linear layers of a decoder layer: kernels / dense; rows {rows}")

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    for made in bench.facts["rows"]:
        if "storage" in made:
            cells = [" / ".join(cell(made[k].get(n)) for k in ("us", "dense_us")) for n in rows]
            print(f"{made['storage']:10}" + "".join(f"{c:>18}" for c in cells))
        elif "error" in made:
            print(f"{made['row']}: {made['error']}")
    print(f"no time for: {bench.facts['skipped'] or 'none'}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, help=f"default: {' '.join(STORAGES[:4])}")
    parser.add_argument("--rows", nargs="+", type=int, help="default: 1 2 4 8 16")
    parser.add_argument("--quick", action="store_true", help="two storages, 1 and 3 rows, where none are named")
    parsed = parser.parse_args()
    parsed.storages = parsed.storages or list(STORAGES[: 2 if parsed.quick else 4])
    parsed.rows = parsed.rows or ([1, 3] if parsed.quick else [1, 2, 4, 8, 16])
    reason = missing()
    if reason is not None:
        parser.error(f"{reason}; with --quick, set TRITON_INTERPRET=1")
    ground = bench_of(parsed.quick, 1 if parsed.quick else LAYERS)
    ground.out, ground.seconds, ground.began = parsed.out, parsed.seconds, time.perf_counter()
    ground.facts["command"] = (
        f"python benchmarks/few_rows.py --seconds {parsed.seconds:g} --storages {' '.join(parsed.storages)}"
        f" --rows {' '.join(map(str, parsed.rows))}{' --quick' if parsed.quick else ''}"
    )
    main(ground, parsed.storages, parsed.rows)
