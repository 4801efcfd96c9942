"""How long the search for trellis paths takes, launched kernel by kernel and replayed as one CUDA graph.

    python benchmarks/trellis_speed.py --out results                 # a GPU: both ways, and that they agree bit for bit
    python benchmarks/trellis_speed.py --quick --out results         # a CPU: one way, small

Rows are weights of the reference model's shapes at one rate each, coded whole. Written after every row:
trellis_speed.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rows import attempted

from spectrim.linalg import trellis
from spectrim.linalg.columns import inverse_root
from spectrim.linalg.trellis import rate_of
from spectrim.linalg.trellis_columns import Coded, trellis_columns
from spectrim.report.facts import environment

SHAPES = ((384, 384), (1024, 384), (384, 1024), (4096, 1024))
BITS = (1, 2, 2.5, 4, 6)


def coded(weight: torch.Tensor, upper: torch.Tensor, bits: float, window: int) -> tuple[Coded, float]:
    """A weight in codes, and the seconds it took."""
    if weight.is_cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter()
    made = trellis_columns(weight, upper, rate_of(bits, window))
    if weight.is_cuda:
        torch.cuda.synchronize()
    return made, time.perf_counter() - clock


def row(shape: tuple[int, int], bits: float, window: int, device: torch.device) -> dict[str, Any]:
    """One weight, every way that the device has."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    inputs = torch.randn(2 * shape[1], shape[1], generator=generator, dtype=torch.float64).to(device)
    upper = inverse_root(inputs.mT @ inputs)
    most = trellis.MOST_RECORDED
    try:
        trellis.MOST_RECORDED = 0
        plain, plain_s = coded(weight, upper, bits, window)
    finally:
        trellis.MOST_RECORDED = most
    found = {"shape": list(shape), "bits": bits, "launched_s": plain_s}
    if device.type == "cuda":
        first, first_s = coded(weight, upper, bits, window)
        again, again_s = coded(weight, upper, bits, window)
        same = all(torch.equal(a, b) for made in (first, again) for a, b in zip(made, plain, strict=True))
        found |= {"recorded_s": first_s, "replayed_s": again_s, "same": same}
    return found


def main() -> None:
    """Every shape at every rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rates, window = (SHAPES[:1], (2,), 8) if args.quick else (SHAPES, BITS, trellis.WINDOW)
    until, rows = time.time() + args.seconds, list[dict[str, Any]]()
    for shape, bits in ((shape, bits) for shape in shapes for bits in rates):
        found = attempted(lambda shape=shape, bits=bits: row(shape, bits, window, device), until)
        rows.append({"shape": list(shape), "bits": bits} | found)
        print(rows[-1], flush=True)
        (args.out / "trellis_speed.json").write_text(
            json.dumps({"environment": environment(), "window": window, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
