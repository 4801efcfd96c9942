"""The main job on the embedded model: every method at the same keep, in one table; `make demo` runs this.

Compresses `builtin:tiny` (8.4 M parameters) to half of the stored numbers of its decoder linears, calibrated on prose
and docstrings of this interpreter's standard library and evaluated on modules that calibration never saw. The SoCo
result is written as a folder, loaded in a fresh process by plain transformers, and compared.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from spectrim.cli_options import load_lines
from spectrim.job import Request, compress_source, run
from spectrim.models.load import resolve

# Few, short windows: this runs on two slow cores. Real runs use the defaults.
TEXT = {"calib_windows": 96, "calib_length": 128, "gradient_windows": 40, "train_windows": 1600, "eval_windows": 40}
ROWS: list[tuple[str, str, dict[str, Any]]] = [
    ("plain SVD", "svd", {}),
    ("SVD-LLM", "svd-llm", {}),
    ("two-sided closed form", "two-sided", {}),
    ("SoCo", "soco", {"steps": 48, "batch_size": 8, "learning_rate": 0.01, "project_every": 4}),
]

FRESH = """
import sys, json, spectrim
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The history of the city", return_tensors="pt")
out = model.generate(**{k: ids[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=24, do_sample=False)
print(json.dumps({"class": type(model).__name__, "numbers": model.num_parameters(), "text": tokenizer.decode(out[0])}))
"""


def main() -> None:
    """Run all rows, reload the last, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    args = parser.parse_args()
    torch.set_num_threads(idle_cores())
    console = Console(width=None if sys.stdout.isatty() else 140)
    started = time.perf_counter()
    reports: dict[str, dict[str, Any]] = {}
    for label, method, options in ROWS:
        folder = args.out / label.lower().replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{label} ...", file=sys.stderr, flush=True)
        request = Request(model="builtin:tiny", keep=args.keep, method=method, options=options, device="cpu", **TEXT)
        if method == "soco":
            reports[label] = run(request, folder).report
        else:
            reports[label] = in_short(request, folder)
    console.print(results_table(reports, args.keep))
    last = reports[ROWS[-1][0]]
    evaluation = last["text"]["evaluation"]
    console.print(
        f"evaluation: {evaluation['windows']} windows of {evaluation['length']} tokens, no overlap; "
        f"{evaluation['note']}"
    )
    fresh = reload(Path(last["folder"]))
    console.print(
        f"\nreloaded in a fresh process: {fresh['class']}, {fresh['numbers']:,} numbers, "
        f"logits differ by {last['reload']['relative_logit_difference']:.1e} (relative)\n  {fresh['text']!r}",
        markup=False,
    )
    console.print(
        f"\nThe SoCo folder is {last['folder']} (all took {time.perf_counter() - started:.0f} s). Load it with\n"
    )
    print(load_lines(Path(last["folder"])))


def idle_cores() -> int:
    """Threads to use, at least one: more threads than idle cores can be ten times slower than one."""
    return max(1, round((os.cpu_count() or 1) - os.getloadavg()[0]))


def in_short(request: Request, folder: Path) -> dict[str, Any]:
    """As `run`, without the reload in a fresh process: the demo does that once, for SoCo."""
    started = time.perf_counter()
    result = compress_source(request, request.check(), resolve(request.model))
    result.save_pretrained(folder)
    result.report["seconds"]["total"] = time.perf_counter() - started
    return result.report


def results_table(reports: dict[str, dict[str, Any]], keep: float) -> Table:
    """One row a method, the dense model first."""
    table = Table(title=f"builtin:tiny at keep {keep}, stored numbers of the decoder linears", title_justify="left")
    for name in ("method", "perplexity", "KL (nats)", "same top-1", "numbers", "keep", "bytes in all", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    first = next(iter(reports.values()))
    dense = first["quality"]["dense"]
    table.add_row("dense", f"{dense['perplexity']:.2f}", "0", "1", f"{first['stored']['linear_numbers_dense']:,}",
                  "1", f"{first['source']['bytes']:,}", "")  # fmt: skip
    for label, report in reports.items():
        quality, stored = report["quality"]["compressed"], report["stored"]
        table.add_row(
            label, f"{quality['perplexity']:.2f}", f"{quality['kl']:.3f}", f"{quality['agreement']:.3f}",
            f"{stored['linear_numbers']:,}", f"{stored['keep']:.4f}", f"{stored['model_bytes']:,}",
            f"{report['seconds']['total']:.0f}",
        )  # fmt: skip
    return table


def reload(folder: Path) -> dict[str, Any]:
    """What a user's own program would do, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the folder did not load in a fresh process:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
