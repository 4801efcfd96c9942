"""Low-rank layers in 16, 8, 4 and 3 bits: each storage compressed once, then rounded in several ways, in one run.

    python benchmarks/factor_bits.py --data .carry --out results --calib-windows 32 --eval-windows 24

`ours` is engines/quantise_factors.py, block by block. `ours, dense statistics` calibrates on the inputs of the model in
16 bits. `plain gptq` rounds both parts by the column solver as they are, each in the moment of its own inputs,
`plain rtn` to the nearest level. Groups are the same everywhere, so a line's bytes are those of the others with its
bits. Bytes are those of the decoder linears over what they take dense in 16 bits. Written after every row:
factor_bits.json and factor_bits.md.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compare import Bench
from reference_data import CALIBRATION_WINDOWS, WINDOW
from torch import Tensor

from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.quantise_factors import group_of, quantise_behind, quantise_factors
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.linalg.bits import VALUE_BYTES, size_of
from spectrim.linalg.columns import gptq
from spectrim.linalg.factor import Factors, balance
from spectrim.linalg.quantise import Rounded, round_to_nearest
from spectrim.linalg.quantised_factors import moment_behind
from spectrim.models.walk import weight_of
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear
from spectrim.nn.quantised import QuantisedFactorLinear, QuantisedPivotLinear
from spectrim.nn.stores_uniform import UniformStore
from spectrim.registry import make_method
from spectrim.stats import Stat, Stats

GROUP = 128
GRAM = frozenset({Stat.GRAM})


def plain(model: Any, walk: Any, stats: Mapping[str, Stats], bits: int, *, calibrated: bool) -> None:
    """Each part rounded for itself, nothing makes up for anything but columns."""

    def store(matrix: Tensor, gram: Tensor) -> UniformStore:
        size = group_of(matrix.shape[1], GROUP)
        rounded: Rounded = (
            gptq(matrix, gram, bits, size, symmetric=False, search=True)
            if calibrated
            else round_to_nearest(matrix, bits, size, symmetric=False, search=True)
        )
        return UniformStore.holding(rounded, bits=bits, group_size=size, dtype=torch.float32)

    for layer in walk.layers:
        module, gram = model.get_submodule(layer.name), stats[layer.name].get(Stat.GRAM)
        given = {"bias": module.bias, "dtype": torch.float32}
        if isinstance(module, LowRankLinear):
            left, right = balance(Factors(module.U.weight.detach().double(), module.V.weight.detach().double()))
            made = QuantisedFactorLinear.holding(store(right, gram), store(left, moment_behind(right, gram)), **given)
        elif isinstance(module, PivotLinear):
            rows, rest = module.pivot.weight.detach().double(), module.rest.weight.detach().double()
            parts = store(rows, gram), store(rest, moment_behind(rows, gram))
            made = QuantisedPivotLinear.holding(*parts, module.mask, **given)
        else:
            weight = weight_of(module).detach().double()
            made = PackedLinear.holding(store(weight, gram), None, **given)
        model.set_submodule(layer.name, made)


class Table:
    """Rows as they come."""

    def __init__(self, bench: Bench, out: Path, settings: dict[str, Any]) -> None:
        self.bench, self.out, self.settings, self.rows = bench, out, settings, []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, label: str, bits: int, model: Any, walk: Any, seconds: float) -> None:
        """Round to the stored dtype, count, judge."""
        round_to(model, torch.bfloat16)
        tensors = [t for la in walk.layers for t in model.get_submodule(la.name).state_dict().values()]
        share = size_of(tensors, "bytes") / (VALUE_BYTES * walk.numbers)
        found = {
            name: evaluate(model, ids, batch_size=self.bench.batch_size).perplexity
            for name, ids in self.bench.texts.items()
        }
        self.rows.append({"label": label, "bits": bits, "bytes": share, "seconds": seconds, **found})
        figures = " / ".join(f"{value:.2f}" for value in found.values())
        line = f"| {label} | {bits} | {share:.4f} | {figures} | {seconds:.0f} |"
        print(line, flush=True)
        header = f"| what | bits | bytes | {' / '.join(found)} | seconds |\n|---|---|---|---|---|\n"
        with (self.out / "factor_bits.md").open("a" if len(self.rows) > 1 else "w") as file:
            file.write((header if len(self.rows) == 1 else "") + line + "\n")
        facts = {"settings": self.settings, "rows": self.rows}
        (self.out / "factor_bits.json").write_text(json.dumps(facts, indent=1))


def ways(walk: Any, stats: Mapping[str, Stats], ids: Tensor) -> dict[str, Callable[[Any, int], None]]:
    """What is done to a copy of the low-rank model."""
    return {
        "ours": lambda model, bits: quantise_behind(model, walk, ids, bits, group_size=GROUP),
        "plain gptq": lambda model, bits: plain(model, walk, stats, bits, calibrated=True),
        "plain rtn": lambda model, bits: plain(model, walk, stats, bits, calibrated=False),
        "ours, dense statistics": lambda model, bits: quantise_factors(model, walk, stats, bits, group_size=GROUP),
    }


def main() -> None:
    """The dense model, gptq on it, then every storage at every keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"), help="packed model and texts")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--storages", nargs="+", default=["factor", "pivot"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 8])
    parser.add_argument("--ways", nargs="+", default=["ours", "plain gptq", "plain rtn"])
    parser.add_argument("--calib-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--length", type=int, default=WINDOW)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.model, args.train_windows = None, 0
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        table = Table(bench, args.out, {k: str(v) for k, v in vars(args).items()})
        run(args, bench, table)


def run(args: argparse.Namespace, bench: Bench, table: Table) -> None:
    """All rows."""
    first = True
    for keep in args.keeps:
        for storage in args.storages:
            method = make_method("soco", "fast", {"storage": storage})
            clock = time.perf_counter()
            small = compress_model(
                bench.dense, method, keep, bench.calibration, gradient_windows=args.gradient_windows, seed=args.seed
            )
            seconds = time.perf_counter() - clock
            if first:
                table.add("dense", 16, copy.deepcopy(bench.dense), small.walk, 0.0)
                for bits in args.bits:
                    clock = time.perf_counter()
                    share = {8: 0.6, 4: 0.3, 3: 0.25}[bits]
                    rounded = compress_model(
                        bench.dense, make_method("gptq", None, {"bits": bits}), share, bench.calibration
                    )
                    table.add("gptq on dense weights", bits, rounded.model, rounded.walk, time.perf_counter() - clock)
                first = False
            table.add(f"keep {keep:g}, {storage}", 16, copy.deepcopy(small.model), small.walk, seconds)
            stats = measure(small.model, small.walk, bench.calibration, GRAM)
            for bits in args.bits:
                for name, way in ways(small.walk, stats, bench.calibration).items():
                    if name not in args.ways or (bits == 8 and name != "ours"):
                        continue
                    model, clock = copy.deepcopy(small.model), time.perf_counter()
                    way(model, bits)
                    table.add(f"keep {keep:g}, {storage}, {name}", bits, model, small.walk, time.perf_counter() - clock)


if __name__ == "__main__":
    main()
