"""`--deterministic`: the same command twice, in processes of their own, gives the same bytes of weights.

    python benchmarks/deterministic.py --device cuda --seconds 300 --out results
    python benchmarks/deterministic.py --quick --out results                       # a tiny random model on a CPU

Each row is run twice with `--deterministic`, and twice without it, which says whether it is needed. Two processes make
all rows, one after the other; what is compared are the SHA-256 sums of the safetensors files. The exit status is 1
where a row with `--deterministic` differs. JSON is written after every row.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rows import attempted

ROWS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced", "options": {"steps": 30, "batch_size": 8}},
    "best": {"preset": "best", "options": {"distil_steps": 20}},
    "trellis": {"method": "trellis", "keep": 0.25, "options": {"window": 8}},
    "svd-llm, block:10": {"method": "svd-llm", "recover": ("block:10",)},
}
FEW = {"calib_windows": 8, "calib_length": 32, "train_windows": 16}
KINDS = ("deterministic", "plain")


def main() -> None:
    """Two processes, then what they made."""
    args = asked()
    if args.child:
        return child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = [made_by_a_process(args, Path(scratch) / str(number)) for number in range(2)]
    asked_for = [(name, kind) for name in args.rows for kind in KINDS]
    rows = [judged(name, kind, *(own.get(f"{name}, {kind}", {}) for own in found)) for name, kind in asked_for]
    facts = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "environment": found[0].get("environment"),
        "rows": rows,
    }
    (args.out / "deterministic.json").write_text(json.dumps(facts, indent=1) + "\n")
    for row in rows:
        print(f"{row['row']:20} {row['kind']:14} {row['verdict']}")
    wrong = [row for row in rows if row["kind"] == "deterministic" and row["verdict"] not in ("equal", "not run")]
    sys.exit(1 if wrong else 0)


def asked() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--rows", nargs="+", default=[*ROWS], choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def made_by_a_process(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """What one process made of all rows; what it had when it was stopped."""
    where.mkdir()
    words = ["--child", where, "--model", args.model, "--device", args.device, "--seconds", args.seconds / 2]
    words += ["--rows", *args.rows]
    subprocess.run([sys.executable, __file__, *map(str, words), *(["--quick"] if args.quick else [])], check=False)
    told = where / "told.json"
    return json.loads(told.read_text()) if told.exists() else {}


def child(args: argparse.Namespace) -> None:
    """All rows once, those with `--deterministic` first; sums of the files, written after each."""
    from spectrim.report.facts import environment

    until, model, found = time.time() + args.seconds, args.model, {"environment": environment()}
    if args.quick:
        from frontier import tiny_model

        (args.child / "model").mkdir()
        model = str(tiny_model(args.child / "model"))
    for kind in KINDS:
        for name in args.rows:
            out = args.child / f"{name} {kind}"
            row = attempted(lambda name=name, kind=kind, out=out: sums(args, model, name, kind, out), until)
            found[f"{name}, {kind}"] = row
            print(f"{name:20} {kind:14} {json.dumps(row)[:300]}", flush=True)
            (args.child / "told.json").write_text(json.dumps(found))


def sums(args: argparse.Namespace, model: str, name: str, kind: str, out: Path) -> dict[str, Any]:
    """SHA-256 of what one row wrote."""
    from spectrim.job import compress_source
    from spectrim.models.load import resolve
    from spectrim.request import Request

    started = time.perf_counter()
    few = FEW if args.quick else {"calib_windows": 64, "calib_length": 128, "train_windows": 256}
    given = {"keep": 0.6, **few, **ROWS[name], "eval": "none", "device": args.device}
    request = Request(model=model, deterministic=kind == "deterministic", **given)
    made = compress_source(request, request.check(), resolve(model))
    made.save_pretrained(out)
    files = sorted(out.glob("*.safetensors"))
    total = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    return {"sha256": total, "seconds": time.perf_counter() - started, "files": len(files)}


def judged(name: str, kind: str, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Whether two processes made the same."""
    errors = [own.get("error", "not run") for own in (first, second) if "sha256" not in own]
    if errors:
        verdict = "not run" if all("not " in error[:4] for error in errors) else errors[0]
    else:
        verdict = "equal" if first["sha256"] == second["sha256"] else "DIFFERENT"
    return {"row": name, "kind": kind, "verdict": verdict, "runs": [first, second]}


if __name__ == "__main__":
    main()
