"""Many hostile files for every reader: only our own errors may come out, within a second and 200 MB each.

    python benchmarks/fuzz_readers.py --cases 100000 --out benchmarks/results/fuzz-readers.json

Of the cases, 60 % are headers and indexes, the rest the other readers. A case that fails is printed with its seed:
`--seed S --only KIND --cases 1` runs it again.
"""

import argparse
import json
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "faults")]

from hostile import Readers, run_case  # noqa: E402

from spectrim import version  # noqa: E402

WEIGHTS = {"header": 40, "index": 20, "config": 8, "json": 6, "manifest": 6, "state": 6, "fingerprint": 5, "ladder": 3,
           "task": 3, "text": 3}  # fmt: skip
SECONDS, MEGABYTES = 1.0, 200


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WEIGHTS)
    parser.add_argument("--out", type=Path, help="write the outcome as JSON")
    asked = parser.parse_args()
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    found: list[dict[str, object]] = []
    slowest: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as scratch:
        readers = Readers(Path(scratch) / "fuzz")
        kinds = readers.kinds()
        before_mb, began = peak_mb(), time.monotonic()
        for case in range(asked.cases):
            seed = asked.seed + case
            kind = asked.only or Random(f"kind {seed}").choices([*WEIGHTS], [*WEIGHTS.values()])[0]
            signal.alarm(30)  # what never ends must still be told
            start = time.process_time()
            try:
                outcome = run_case(kinds[kind], Random(f"case {seed}"))
            except Exception as error:  # what is looked for
                outcome = f"FOUND {type(error).__name__}"
                found.append({"seed": seed, "kind": kind, "error": "".join(traceback.format_exception(error)[-3:])})
                print(f"seed {seed}, {kind}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            took = time.process_time() - start
            if took > SECONDS:
                found.append({"seed": seed, "kind": kind, "error": f"{took:.2f} s"})
            slowest[kind] = max(slowest[kind], took)
            outcomes[kind][outcome] += 1
        signal.alarm(0)
        grown = peak_mb() - before_mb
        wall = time.monotonic() - began
    if grown > MEGABYTES:
        found.append({"error": f"memory grew by {grown:.0f} MB"})
    facts = {
        "command": " ".join(["python", "benchmarks/fuzz_readers.py", *sys.argv[1:]]),
        "spectrim": version.__version__,
        "python": platform.python_version(),
        "cases": asked.cases,
        "headers_and_indexes": sum(outcomes["header"].values()) + sum(outcomes["index"].values()),
        "found": found,
        "outcomes": {kind: dict(counts) for kind, counts in sorted(outcomes.items())},
        "slowest_cpu_s": {kind: round(s, 4) for kind, s in sorted(slowest.items())},
        "memory_grown_mb": round(grown, 1),
        "wall_s": round(wall, 1),
    }
    print(json.dumps(facts, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
