"""Speed and memory of compressing at scale, on random weights: time and memory are measured, never quality.

    python benchmarks/scale.py --what drivers --out results/scale --seconds 240

Rows go to OUT/scale.json, one after the other; a row that fails says why and the next one runs.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import scale_drivers

Row = dict[str, Any]


class Rows:
    """Rows by name in one JSON file that is complete after each; no row is begun after `seconds`."""

    def __init__(self, out: Path, facts: Row, seconds: float) -> None:
        self.path, self.end = out / "scale.json", time.perf_counter() + seconds
        out.mkdir(parents=True, exist_ok=True)
        self.found: Row = {"facts": facts, "rows": {}}

    def add(self, name: str, work: Callable[[], Row]) -> Row | None:
        """Measure one row; None where it was not measured."""
        if time.perf_counter() > self.end:
            self._keep(name, {"skipped": "no time left"})
            return None
        started = time.perf_counter()
        try:
            row = work()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        row["wall_s"] = time.perf_counter() - started
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._keep(name, row)
        return None if "error" in row else row

    def _keep(self, name: str, row: Row) -> None:
        self.found["rows"][name] = row
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found, indent=1))
        new.replace(self.path)
        print(f"{name:60} {_short(row)}", flush=True)


def _short(row: Row) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items() if k != "wall_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=["drivers"], choices=["drivers"])
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    parser.add_argument("--seconds", type=float, default=540.0, help="begin no row after this time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script on a CPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = Rows(arguments.out, {"device": name, "torch": torch.__version__, "quick": arguments.quick}, arguments.seconds)
    if "drivers" in arguments.what:
        for label, work in scale_drivers.rows(device, arguments.quick):
            rows.add(label, work)


if __name__ == "__main__":
    main()
