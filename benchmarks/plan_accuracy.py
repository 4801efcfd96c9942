"""How near `spectrim plan` is to what `spectrim compress` then does: numbers, bytes, disk, peak memory, time.

    python benchmarks/plan_accuracy.py --out results                                            # builtin:tiny on a CPU
    python benchmarks/plan_accuracy.py --data .carry --device cuda --seconds 500 --out results  # on a GPU
    python benchmarks/plan_accuracy.py --data .carry --device cuda --large --out results        # blocks of 7B shape
    python benchmarks/plan_accuracy.py --quick --out results                                    # two rows
    python benchmarks/plan_accuracy.py --replan results/plan-accuracy-cpu.json --out results    # plans made again

Both commands run as a user types them, each in a process of its own. Time on a CPU is processor time over threads, so
that other work on the machine does not count (stages too); on a GPU it is wall time, start-up included. `ratio` is
planned over measured; targets: 0.8 to 1.2, for time 0.5 to 2.

Constants of the plan were fitted on the rows in `FITTED`; all other rows, and all rows of other models, sizes and
devices, are held out, and are told apart. With --data DATA/model.tar.xz is planned and run, in
the format of prepare_reference.py. JSON is written after every row; --go-on keeps the rows that a file has.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from reference_data import unpack_model
from rows import attempted

SIZES = {
    "cpu": ["--calib-windows", "32", "--calib-length", "128", "--eval-windows", "16"],
    "cuda": ["--calib-windows", "128", "--calib-length", "512", "--eval-windows", "40"],
}
STEPS = {"cpu": "10", "cuda": "60"}
BITS = ["--factor-group-size", "16", "--factor-bits"]
ROWS: dict[str, list[str]] = {
    "svd": ["--method", "svd"],
    "svd-llm": ["--method", "svd-llm"],
    "svd-llm, 64 x 256": ["--method", "svd-llm", "--calib-windows", "64", "--calib-length", "256"],
    "two-sided, pivot": ["--method", "two-sided"],
    "fast": ["--preset", "fast"],
    "fast, keep 0.5": ["--preset", "fast", "--keep", "0.5"],
    "balanced, STEPS": ["--set", "steps=STEPS", "--set", "batch_size=8"],
    "acip, STEPS": ["--method", "acip", "--set", "steps=STEPS", "--set", "batch_size=8"],
    "best, 4 steps": ["--preset", "best", "--set", "distil_steps=4"],
    "svd-llm, kl:5": ["--method", "svd-llm", "--recover", "kl:5"],
    "svd-llm, block:5": ["--method", "svd-llm", "--recover", "block:5"],
    "svd-llm, refit": ["--method", "svd-llm", "--recover", "refit"],
    "two-sided, 4 bits": ["--method", "two-sided", *BITS, "4"],
    "svd, 3 bits": ["--method", "svd", "--set", "storage=pivot", "--keep", "0.5", *BITS, "3"],
    "any size": ["--method", "svd-llm", "--any-size"],
    "any size, learned": ["--any-size", "--any-size-steps", "16", "--set", "batch_size=8"],
    "low memory": ["--method", "svd-llm", "--low-memory"],
    "gptq": ["--method", "gptq", "--keep", "0.35", "--set", "group_size=16"],
    "rtn": ["--method", "rtn", "--keep", "0.35", "--set", "group_size=16"],
    "eora": ["--method", "eora", "--keep", "0.4", "--set", "group_size=16"],
    "spqr": ["--method", "spqr", "--keep", "0.4"],
    "squeezellm": ["--method", "squeezellm", "--keep", "0.35"],
    "trellis": ["--method", "trellis", "--keep", "0.2", "--dtype", "bfloat16", "--set", "window=8"],
    "trellis in bytes": ["--keep-bytes", "0.5", "--dtype", "bfloat16", "--set", "window=8"],
    "slicegpt": ["--method", "slicegpt"],
    "modegpt": ["--method", "modegpt"],
    "afm": ["--method", "afm"],
    "fwsvd": ["--method", "fwsvd"],
    "mpifa": ["--method", "mpifa"],
    "zero-sum": ["--method", "zero-sum"],
    "lq-lora": ["--method", "lq-lora", "--keep", "0.35"],
    "basis-sharing": ["--method", "basis-sharing"],
    "balanced": [],
    "best": ["--preset", "best"],
}
FITTED = {
    "cpu": ("svd", "svd-llm", "two-sided, pivot", "fast", "balanced, STEPS", "svd-llm, block:5", "svd-llm, refit"),
    "cuda": ("svd-llm", "two-sided, pivot"),
}
"""Of builtin:tiny on a CPU, of ref-llama-24m on a GPU."""
FITTED_MODEL = {"cpu": "builtin:tiny", "cuda": "ref-llama-24m"}
SLOW = {
    "cpu": ("balanced", "best"),
    "cuda": ("best, 4 steps", "svd-llm, 64 x 256", "svd", "slicegpt", "rtn", "modegpt", "low memory"),
}
LARGE: dict[str, tuple[int, list[str]]] = {
    "7B shape, 4 blocks, at once": (4, ["--method", "two-sided", "--calib-windows", "32", "--calib-length", "2048"]),
    "7B shape, 8 blocks, fast": (8, ["--preset", "fast", "--calib-windows", "256", "--calib-length", "2048"]),
    "7B shape, 8 blocks, learned": (
        8, ["--set", "steps=8", "--set", "batch_size=8", "--calib-windows", "64", "--calib-length", "2048",
            "--set", "coupling=none"],
    ),
}  # fmt: skip
"""Blocks, and the words; the first goes at once by the rules of engines/way.py on 140 GB, the others block by block."""
BOUNDS = {"seconds": (0.5, 2.0)}
LIMIT_S = 1200
"""A command that takes longer is stopped, and its row fails."""


def main() -> None:
    """Every row of every model; two tables at the end."""
    args = asked()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.json"
    done = json.loads(path.read_text())["rows"] if args.go_on and path.exists() else []
    earlier = json.loads(args.replan.read_text())["rows"] if args.replan else []
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        models = dict(models_of(args, Path(scratch)))
        wanted = earlier or [{"model": model, "row": name} for model in models for name in names_of(args)]
        known = {(row["model"], row["row"]) for row in done if "error" not in row}
        for row in wanted:
            if (row["model"], row["row"]) in known:
                continue
            given = {"model": row["model"], "row": row["row"], "fitted": fitted(args, row)}
            made = attempted(lambda row=row: one(args, row, models, Path(scratch)), until)
            done = [r for r in done if (r["model"], r["row"]) != (row["model"], row["row"])] + [given | made]
            command = [Path(word).name for word in sys.argv]
            facts = {"command": command, "environment": environment(), "rows": done}
            path.write_text(json.dumps(facts, indent=1) + "\n")
            print(line(done[-1]), flush=True)
    print("\n" + tables(done))


def asked() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[], help="default: builtin:tiny, or the model in --data")
    parser.add_argument("--data", type=Path, help="a folder of prepare_reference.py")
    parser.add_argument("--rows", nargs="+", help="of those of the device: " + ", ".join(ROWS))
    parser.add_argument("--large", action="store_true", help="rows of a few blocks of 7B shape: " + ", ".join(LARGE))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--name")
    parser.add_argument("--full", action="store_true", help="the default windows, not few short ones")
    parser.add_argument("--quick", action="store_true", help="two rows; of large ones a tiny shape")
    parser.add_argument("--replan", type=Path, help="plan again for what an earlier run measured, in this file")
    parser.add_argument("--go-on", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    args = parser.parse_args()
    args.kind = "cpu" if args.device.startswith("cpu") else "cuda"
    args.name = args.name or f"plan-accuracy-{args.kind}{'-large' if args.large else ''}"
    return args


def names_of(args: argparse.Namespace) -> list[str]:
    """The rows to run."""
    every = list(LARGE) if args.large else [name for name in ROWS if name not in SLOW[args.kind]]
    names = args.rows or (["svd", "fast"] if args.quick and not args.large else every)
    return names[:2] if args.quick else names


def models_of(args: argparse.Namespace, scratch: Path) -> list[tuple[str, str]]:
    """Names and where the models are; those of large rows are made when they are needed."""
    if args.large:
        return [("7B shape", "")]
    folders = [*args.models, *([str(unpack_model(args.data, scratch))] if args.data else [])] or ["builtin:tiny"]
    return [(Path(folder).name, folder) for folder in folders]


def fitted(args: argparse.Namespace, row: dict[str, Any]) -> bool:
    """Whether constants were fitted on this very row."""
    return not args.full and row["model"] == FITTED_MODEL[args.kind] and row["row"] in FITTED[args.kind]


def words_of(args: argparse.Namespace, name: str) -> list[str]:
    """What is typed after the model; of large rows too."""
    if name in LARGE:
        own = LARGE[name][1]
        own = [*own, "--calib-windows", "8", "--calib-length", "64"] if args.quick else own
        return [*own, "--eval", "none", "--device", args.device]
    sizes = [] if args.full else SIZES[args.kind]
    return [*sizes, *(word.replace("STEPS", STEPS[args.kind]) for word in ROWS[name]), "--device", args.device]


def one(args: argparse.Namespace, row: dict[str, Any], models: dict[str, str], scratch: Path) -> dict[str, Any]:
    """One row: measured and planned, or planned again."""
    if "measured" in row:
        plan = called(args.kind, "plan", models[row["model"]], row["words"])
        return compared({key: value for key, value in row.items() if key != "error"}, plan)
    words, name = words_of(args, row["row"]), row["row"]
    model = models[row["model"]] or str(large_model(LARGE[name][0], scratch, quick=args.quick))
    out = scratch / "out"
    try:
        made = measured(args.kind, model, words, out)
        plan = attempted(lambda: called(args.kind, "plan", model, words))
        if "error" in plan:  # --replan can plan for it again
            return made | plan
        found = compared(made, plan)
        return found | (held_at_once(model, name, found) if name in LARGE else {})
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if name in LARGE:
            shutil.rmtree(model, ignore_errors=True)


def measured(kind: str, model: str, words: list[str], out: Path) -> dict[str, Any]:
    """What compression took."""
    report = called(kind, "compress", model, [*words, "--out", str(out)])
    disk = sum(path.stat().st_size for path in out.iterdir())
    stored = report["stored"]
    return {
        "words": words,
        "measured": {
            "linear_numbers": stored.get("linear_numbers"),
            "linear_bytes": stored.get("linear_bytes"),
            "model_numbers": stored["model_numbers"],
            "model_bytes": stored["model_bytes"],
            "disk": disk,
            **{f"memory_{where}": peak for where, peak in report["peak_memory_bytes"].items()},
            "seconds": report["process_seconds"] if kind == "cpu" else report["wall_seconds"],
        },
        "measured_stages": report["seconds"],
        "wall_seconds": report["wall_seconds"],
    }


def compared(row: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """A measured row beside its plan."""
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
    stages = {"planned_stages": plan["seconds_by_stage"], "rates": plan["rates"], "passes": plan["passes"]}
    told = {"way": plan["way"], "notes": plan["notes"], "memory_by_stage": plan["memory_by_stage"]}
    return row | {"planned": planned, "ratio": ratio} | stages | told


def called(kind: str, command: str, model: str, words: list[str]) -> dict[str, Any]:
    """The JSON of a command, with its seconds; RuntimeError with the end of what it said when it failed."""
    clock, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, command, model, "--json", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 5):  # 5: a result that the quality gate marks, written all the same
        raise RuntimeError(f"{command}: {done.stderr.strip()[-500:]}")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
    told = {"process_seconds": spent / threads, "wall_seconds": time.perf_counter() - clock}
    return json.loads(done.stdout) | told


def child(kind: str, words: list[str]) -> None:
    """`spectrim` with these words; on a CPU its stages are told in processor time of it and what it started."""
    from spectrim.cli import main as command
    from spectrim.engines import clock

    if kind == "cpu":
        clock.time = SimpleNamespace(perf_counter=lambda: sum(os.times()[:4]))  # type: ignore[assignment]  processor time in its place
    sys.argv = ["spectrim", *words]
    command()


def large_model(depth: int, scratch: Path, *, quick: bool) -> Path:
    """A folder with so many blocks of 7B shape, random weights, and the tokenizer of builtin:tiny."""
    import torch
    from scale_models import QUICK, Shape, build

    from spectrim.models.load import resolve

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, tiny = scratch / f"{depth} blocks", resolve("builtin:tiny")
    shape = QUICK._replace(depth=2, vocabulary=tiny.config.vocab_size) if quick else Shape(depth=depth)
    build(shape, device).save_pretrained(folder)
    for file in tiny.folder.glob("*token*"):
        shutil.copy(file, folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return folder


def held_at_once(model: str, name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What engines/way.py says that a run at once holds, and that over the peak above float32 weights."""
    from spectrim.engines.way import run_bytes
    from spectrim.method import LayerMethod
    from spectrim.models.load import meta_model, resolve
    from spectrim.models.walk import find_layers
    from spectrim.registry import make_method

    words = LARGE[name][1]
    method = make_method(words[words.index("--method") + 1]) if "--method" in words else make_method("soco")
    assert isinstance(method, LayerMethod)
    empty = meta_model(resolve(model).config)
    held = run_bytes(find_layers(empty), method)
    peak = row["measured"].get("memory_gpu")
    if row["way"] != "at once" or not peak:
        return {"run_bytes": held}
    return {"run_bytes": held, "run_bytes_over_peak": held / (peak - 4 * sum(p.numel() for p in empty.parameters()))}


def within(key: str, ratio: float) -> bool:
    """Inside the target."""
    low, high = BOUNDS.get(key, (0.8, 1.2))
    return low <= ratio <= high


def line(row: dict[str, Any]) -> str:
    """One row as it comes."""
    head = f"{row['model']:14} {row['row']:28}"
    if "ratio" not in row:
        return f"{head} failed: {row['error'][-160:]!r}"
    cells = [f"{key} {shown(key, ratio)}" for key, ratio in row["ratio"].items()]
    found = row["measured"]
    return f"{head} {'  '.join(cells)}  ({found['seconds']:.1f} s, {found['memory_host'] >> 20} MiB)"


def shown(key: str, ratio: float | None) -> str:
    """A ratio, marked where it is outside the target."""
    return "-" if ratio is None else f"{ratio:.2f}{'' if within(key, ratio) else '!'}"


def tables(rows: list[dict[str, Any]]) -> str:
    """Markdown: held-out rows, then those that constants were fitted on; then what is outside the targets."""
    lines = []
    for title, chosen in (("held out", False), ("fitted on", True)):
        own = [row for row in rows if row.get("fitted", False) == chosen]
        if not own:
            continue
        lines += [
            "",
            f"| {title} | numbers, bytes, disk | memory, host | memory, GPU | time | measured |",
            "|---" * 6 + "|",
        ]
        for row in own:
            name = labelled(row)
            if "ratio" not in row:
                lines.append(f"| {row['model']}, {name} | failed: {row['error'][-80:]} |" + " |" * 4)
                continue
            ratio, found = row["ratio"], row["measured"]
            sizes = [ratio[key] for key in ("linear_numbers", "linear_bytes", "model_numbers", "model_bytes", "disk")]
            known = [r for r in sizes if r is not None]
            span = f"{min(known):.2f}" if max(known) - min(known) < 0.005 else f"{min(known):.2f} to {max(known):.2f}"
            memory = [shown("memory", ratio.get(f"memory_{where}")) for where in ("host", "gpu")]
            peak = found.get("memory_gpu", found["memory_host"]) >> 20
            cells = [f"{row['model']}, {name}", span, *memory, shown("seconds", ratio["seconds"]),
                     f"{peak} MiB, {found['seconds']:.1f} s"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    outside = [f"{row['row']}: {key} {ratio:.2f}" for row in rows for key, ratio in row.get("ratio", {}).items()
               if ratio is not None and not within(key, ratio)]  # fmt: skip
    count = sum(ratio is not None for row in rows for ratio in row.get("ratio", {}).values())
    told = "; ".join(outside) or "none"
    return "\n".join([*lines, "", f"{len(outside)} of {count} ratios outside their bounds: {told}"])


def labelled(row: dict[str, Any]) -> str:
    """What was run, with the steps that it took on its device."""
    kind = "cuda" if "memory_gpu" in row.get("measured", {}) else "cpu"
    return row["row"].replace("STEPS", f"{STEPS[kind]} steps")


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    from spectrim.report.facts import environment as versions

    return versions()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
