"""How near `spectrim plan` is to what `spectrim compress` then does: numbers, bytes, disk, peak memory, time.

    python benchmarks/plan_accuracy.py --out benchmarks/results                        # CPU, two small models
    python benchmarks/plan_accuracy.py --models MODEL --device cuda --rows fast best   # on a GPU

Both commands run as a user types them, each in a process of its own. Time on a CPU is processor time over threads, so
that other work on the machine does not count; on a GPU it is wall time, start-up included. `ratio` is planned over
measured; targets: 0.8 to 1.2, for time 0.5 to 2. JSON is written after every row.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUICK = ["--calib-windows", "32", "--calib-length", "128", "--eval-windows", "16"]
TRAINED = ["--set", "steps=10", "--set", "batch_size=8"]
BITS = ["--factor-group-size", "16", "--factor-bits"]
ROWS: dict[str, list[str]] = {
    "svd": ["--method", "svd"],
    "svd, 512": ["--method", "svd", "--calib-length", "512"],
    "svd-llm": ["--method", "svd-llm"],
    "svd-llm, 256 x 512": ["--method", "svd-llm", "--calib-windows", "256", "--calib-length", "512"],
    "two-sided, pivot": ["--method", "two-sided"],
    "fast": ["--preset", "fast"],
    "balanced, 10 steps of 8": TRAINED,
    "acip, 10 steps of 8": ["--method", "acip", *TRAINED],
    "svd-llm, kl:5": ["--method", "svd-llm", "--recover", "kl:5"],
    "svd-llm, block:5": ["--method", "svd-llm", "--recover", "block:5"],
    "svd-llm, refit": ["--method", "svd-llm", "--recover", "refit"],
    "two-sided, 4 bits": ["--method", "two-sided", *BITS, "4"],
    "svd, 3 bits": ["--method", "svd", "--set", "storage=pivot", "--keep", "0.5", *BITS, "3"],
    "any size": ["--method", "svd-llm", "--any-size"],
    "gptq": ["--method", "gptq", "--keep", "0.3"],
    "trellis in bytes": ["--keep-bytes", "0.5", "--dtype", "bfloat16", "--set", "window=8"],
    "slicegpt": ["--method", "slicegpt"],
    "best": ["--preset", "best"],
}
SLOW = ("best",)
BOUNDS = {"seconds": (0.5, 2.0)}


def main() -> None:
    """Every row on every model; a table at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["builtin:tiny"])
    parser.add_argument("--rows", nargs="+", default=[name for name in ROWS if name not in SLOW])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--name", default="plan-accuracy")
    parser.add_argument("--full", action="store_true", help="the default windows, not few short ones")
    parser.add_argument("--quick", action="store_true", help="two rows")
    parser.add_argument("--replan", type=Path, help="plan again for what an earlier run measured, in this file")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    args = parser.parse_args()
    rows = args.rows[:2] if args.quick else args.rows
    args.out.mkdir(parents=True, exist_ok=True)
    until, done = time.time() + args.seconds, []
    earlier = json.loads(args.replan.read_text())["rows"] if args.replan else []
    folders = {Path(model).name: model for model in args.models}  # results hold names, not paths
    for row in earlier:
        row["model"] = folders.get(Path(row["model"]).name, row["model"])
    wanted = earlier or [{"model": model, "row": name} for model in args.models for name in rows]
    for row in wanted:
        if time.time() > until:
            break
        if earlier:
            done.append(row if "error" in row else compared(row, planned_here(row["model"], row["words"])))
        else:
            done.append(measured_row(row["model"], row["row"], args.device, [] if args.full else QUICK))
        named = [{**row, "model": Path(row["model"]).name} for row in done]
        command = [Path(word).name for word in sys.argv]
        facts = {"command": command, "environment": environment(), "rows": named}
        (args.out / f"{args.name}.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(line(done[-1]), flush=True)
    outside = [f"{row['row']}: {key}" for row in done for key, ratio in row.get("ratio", {}).items()
               if ratio is not None and not within(key, ratio)]  # fmt: skip
    print(f"\n{len(outside)} of {sum(len(r.get('ratio', {})) for r in done)} ratios outside their bounds: {outside}")


def within(key: str, ratio: float) -> bool:
    """Inside the target."""
    low, high = BOUNDS.get(key, (0.8, 1.2))
    return low <= ratio <= high


def measured_row(model: str, name: str, device: str, quick: list[str]) -> dict[str, Any]:
    """Plan and compression of one row; where one fails, what it said."""
    words = [*quick, *ROWS[name], "--device", device]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        report = called("compress", model, [*words, "--out", str(out)])
        row: dict[str, Any] = {"model": model, "row": name, "words": words}
        if "error" in report:
            return row | {"error": report["error"]}
        disk = sum(path.stat().st_size for path in out.iterdir())
    stored = report["stored"]
    row["measured"] = {
        "linear_numbers": stored.get("linear_numbers"),
        "linear_bytes": stored.get("linear_bytes"),
        "model_numbers": stored["model_numbers"],
        "model_bytes": stored["model_bytes"],
        "disk": disk,
        **{f"memory_{where}": peak for where, peak in report["peak_memory_bytes"].items()},
        "seconds": report["process_seconds"] if device == "cpu" else report["wall_seconds"],
    }
    row |= {"measured_stages": report["seconds"], "wall_seconds": report["wall_seconds"]}
    return compared(row, called("plan", model, words))


def compared(row: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """A measured row beside its plan."""
    if "error" in plan:
        return row | {"error": plan["error"]}
    planned = {
        **{key: plan[key]["after"] for key in ("linear_numbers", "linear_bytes", "model_numbers", "model_bytes")},
        "disk": plan["disk_bytes"],
        **{f"memory_{where}": peak for where, peak in (plan["peak_memory_bytes"] or {}).items()},
        "seconds": plan["seconds"],
    }
    ratio = {
        key: planned[key] / found if planned.get(key) is not None and found else None
        for key, found in row["measured"].items()
    }
    stages = {"planned_stages": plan["seconds_by_stage"], "rates": plan["rates"]}
    return row | {"planned": planned, "ratio": ratio} | stages


def called(command: str, model: str, words: list[str]) -> dict[str, Any]:
    """The JSON of a command, with its seconds; or the end of what it said when it failed."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "spectrim", command, model, "--json", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 5):  # 5: a result that the quality gate marks, written all the same
        return {"error": done.stderr.strip()[-500:]}
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
    told = {"process_seconds": spent / threads, "wall_seconds": time.perf_counter() - clock}
    return json.loads(done.stdout) | told


def planned_here(model: str, words: list[str]) -> dict[str, Any]:
    """The plan from this process, which is quicker where nothing else is run."""
    from typer.testing import CliRunner

    from spectrim import cli, job  # noqa: F401  what the command holds in memory when it plans

    done = CliRunner().invoke(cli.app, ["plan", model, "--json", *words])
    return json.loads(done.stdout) if done.exit_code == 0 else {"error": repr(done.exception)}


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{Path(row['model']).name:14} {row['row']:24}"
    if "error" in row:
        return f"{head} failed: {row['error'][-120:]!r}"
    cells = [
        f"{key} -" if ratio is None else f"{key} {ratio:.2f}{'' if within(key, ratio) else '!'}"
        for key, ratio in row["ratio"].items()
    ]
    found = row["measured"]
    return f"{head} {'  '.join(cells)}  ({found['seconds']:.1f} s, {found['memory_host'] >> 20} MiB)"


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    from spectrim.report.facts import environment as versions

    return versions()


if __name__ == "__main__":
    main()
