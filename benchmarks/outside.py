"""Other tools for few bits, each with its own defaults, on the model, text and judge of our own rows.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/outside.py --data .carry --out results --environment .outside
    PYTHONPATH=src:SITE python benchmarks/outside.py --data .carry --out results --here --device cuda --tools auto-round
    python benchmarks/outside.py --quick --here --tools hqq --out results      # a random model, where hqq is installed

For each tool: an environment of its own (under --environment, kept and used again; without it a temporary one, removed
after the tool; --here: the running interpreter), then for each number of bits: the tool makes the model of few bits
from the calibration windows of compare.py and saves it, new processes load what was saved, and the weights that the
tool computes with are put into the dense model, in its dtype, and judged as all rows of compare.py are. What a tool is
called with stands in `outside/use_TOOL.py`.

*Bytes* are those of all tensors that the saved files hold for the decoder's linears, of whatever dtype, over 2 bytes a
weight; where a tool does not save them by layer in safetensors files, of all that the layers hold in memory.
*Reload* says whether the saved folder gives the logits of the model that was saved (KL on a window below 0.001), with
the tool's own loader (`own`) and with `from_pretrained` (`plain`).

Written after every row: outside.json (`frontier.py --rows` takes its rows), outside.md. A tool that fails is a row with
its error. --rows FILE... takes what other runs have written, and does not run it again.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare import Bench, say
from frontier import tiny_model
from reference_data import CALIBRATION_WINDOWS, WINDOW
from rows import attempted
from safetensors.torch import load_file
from transformers import PreTrainedModel

from spectrim.evaluate.language import evaluate
from spectrim.report.facts import environment as facts_of_this_machine

DRIVERS = Path(__file__).parent / "outside"
ROOT = Path(__file__).parents[1]
VALUE_BYTES = 2


class Tool(NamedTuple):
    """How a tool is installed and called."""

    driver: str
    requirements: tuple[str, ...]
    bits: tuple[int, ...]
    loaders: tuple[str, ...] = ("own", "plain")
    variant: str = ""


TRANSFORMERS = "transformers==5.17.0"
AUTO_ROUND = ("auto-round==0.16.1", TRANSFORMERS)
BITSANDBYTES = ("bitsandbytes==0.50.2", TRANSFORMERS, "accelerate")
LLM_COMPRESSOR = ("llmcompressor==0.14.0.1",)
MODELOPT = ("nvidia-modelopt==0.47.0", "requests", TRANSFORMERS, "accelerate")
"""It imports requests, and does not say so."""
TOOLS = {
    "hqq": Tool("hqq", ("hqq==0.2.8.post1", TRANSFORMERS), (4, 3, 2)),
    "optimum-quanto": Tool("quanto", ("optimum-quanto==0.2.7", TRANSFORMERS, "accelerate"), (4, 2)),
    "torchao": Tool("torchao", ("torchao==0.18.0", TRANSFORMERS, "accelerate"), (4, 3, 2), ("plain",)),
    "bitsandbytes": Tool("bitsandbytes", BITSANDBYTES, (4,), ("plain",)),
    "bitsandbytes-nf4": Tool("bitsandbytes", BITSANDBYTES, (4,), ("plain",), "nf4"),
    "llm-compressor-gptq": Tool("llm_compressor", LLM_COMPRESSOR, (4, 3, 2), ("plain",)),
    "llm-compressor-awq": Tool("llm_compressor", LLM_COMPRESSOR, (4,), ("plain",), "awq"),
    "modelopt-awq": Tool("modelopt", MODELOPT, (4,), ("own",)),
    "gptqmodel": Tool("gptqmodel", ("gptqmodel==7.7.0",), (4, 3, 2)),
    "auto-round": Tool("auto_round", AUTO_ROUND, (4, 3, 2), ("plain",)),
    "auto-round-best": Tool("auto_round", AUTO_ROUND, (4, 3, 2), ("plain",), "best"),
}  # fmt: skip


class Failure(Exception):
    """What a tool, or its installation, said last."""


def last_line(said: str) -> str:
    """The line that names the error: the last with `Error` in it, or the last of all."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "said nothing")[:300]


def call(command: Sequence[str | Path], limit: float) -> None:
    """Run to the end, or fail with what it said last; another interpreter does not get this one's PYTHONPATH."""
    own = str(command[0]) == sys.executable
    surroundings = {key: value for key, value in os.environ.items() if own or key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=limit, cwd=DRIVERS, env=surroundings
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"not done after {limit:.0f} s") from error
    if done.returncode:
        raise Failure(last_line(done.stderr or done.stdout))


def pinned(name: str) -> str:
    """The line of constraints.txt for a package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith(f"{name}=="))


def installed(home: Path, requirements: tuple[str, ...], limit: float) -> Path:
    """The interpreter of an environment that has the requirements; made anew unless it was finished with the same."""
    python, mark = home / "bin/python", home / "complete"
    wanted = "\n".join(requirements)
    if mark.exists() and mark.read_text() == wanted:
        return python
    shutil.rmtree(home, ignore_errors=True)
    call([sys.executable, "-m", "venv", home], limit)
    # torch first and by itself: a tool's looser requirement would choose a build for another machine.
    call([python, "-m", "pip", "install", "--quiet", pinned("torch")], limit)
    call([python, "-m", "pip", "install", "--quiet", *requirements], limit)
    mark.write_text(wanted)
    return python


def run_tool(
    python: Path, tool: Tool, args: argparse.Namespace, model: Path, windows: Path, bits: int, out: Path
) -> dict[str, Any]:
    """All stages of one row; what they found. A loader that crashes its process is what that loader found."""
    device = torch.device(args.device).type
    options = ["--model", model, "--windows", windows, "--bits", bits, "--device", device, "--out", out]
    options += ["--variant", tool.variant] if tool.variant else []
    script = DRIVERS / f"use_{tool.driver}.py"
    call([python, script, "make", *options], args.row_seconds)
    facts = json.loads((out / "facts.json").read_text())
    facts["reload"] = {}
    for loader in tool.loaders if "save_error" not in facts else ():
        try:
            call([python, script, loader, *options], args.row_seconds)
            facts["reload"][loader] = json.loads((out / f"{loader}.json").read_text())
        except Failure as error:
            facts["reload"][loader] = {"error": str(error), "same": False}
    return facts


def size_of(facts: dict[str, Any]) -> tuple[int, str]:
    """Bytes of the decoder's linears, and where they were counted."""
    stored = sum(facts.get("parts", {}).values())
    return (stored, "files") if stored else (facts["memory_bytes"], "memory")


def reload_word(facts: dict[str, Any]) -> str:
    """What became of the saved folder, in a cell of a table."""
    if "save_error" in facts:
        return "cannot be saved"
    words = []
    for loader, found in facts["reload"].items():
        wrong = "error" if "error" in found else f"other logits (KL {found['kl']:.2f})"
        words.append(f"{loader}: {'same' if found['same'] else wrong}")
    return ", ".join(words)


def row_of(label: str, facts: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    """A row as compare.py and frontier.py have them."""
    size, counted_in = size_of(facts)
    share = size / (VALUE_BYTES * facts["numbers"])
    return {
        "label": label, "keep": round(share, 4), "counted": share, "share": share, "bytes": size,
        "counted_in": counted_in, "seconds": facts["seconds"], "reloads": reload_word(facts), "facts": facts, **figures,
    }  # fmt: skip


def with_weights(dense: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the dense model with these weights, in its own dtype."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for name, weight in weights.items():
            held = model.get_parameter(name)
            if held.shape != weight.shape or not weight.isfinite().all():
                raise Failure(f"{name}: the tool gives {tuple(weight.shape)}, finite: {bool(weight.isfinite().all())}")
            held.copy_(weight)
    return model


def judged(bench: Bench, file: Path) -> dict[str, float]:
    """Perplexity, KL and agreement of the weights in a file on every text."""
    model, found = with_weights(bench.dense, load_file(file)), dict[str, float]()
    for text, ids in bench.texts.items():
        quality = evaluate(model, ids, dense=bench.dense, batch_size=bench.batch_size)
        found |= {text: quality.perplexity, f"{text}.kl": quality.kl, f"{text}.agreement": quality.agreement}
    return found


def table(rows: list[dict[str, Any]], failed: list[dict[str, Any]], texts: Sequence[str]) -> str:
    """Markdown: rows by size, then what failed."""
    lines = [f"| tool, bits | bytes | {' / '.join(texts)} | KL ({texts[-1]}) | seconds | reload |", "|---" * 6 + "|"]
    for r in sorted(rows, key=lambda r: (-r["share"], r["label"])):
        figures = " / ".join(f"{r[text]:.2f}" for text in texts)
        kl = f"{r[f'{texts[-1]}.kl']:.4f}" if f"{texts[-1]}.kl" in r else ""
        share = f"{r['share']:.4f}" + (" (memory)" if r.get("counted_in") == "memory" else "")
        lines.append(f"| {r['label']} | {share} | {figures} | {kl} | {r['seconds']:.1f} | {r.get('reloads', '')} |")
    lines += [f"| {f['label']} | | failed: {f['error'].replace('|', '/')} | | | |" for f in failed]
    return "\n".join(lines)


def write(
    args: argparse.Namespace, rows: list[dict[str, Any]], failed: list[dict[str, Any]], texts: Sequence[str]
) -> None:
    """Both files anew."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    facts = {"environment": facts_of_this_machine(), "command": sys.argv, "settings": settings}
    (args.out / f"{args.name}.json").write_text(
        json.dumps(facts | {"rows": rows, "failed": failed}, indent=1, default=str)
    )
    (args.out / f"{args.name}.md").write_text(table(rows, failed, texts) + "\n")


def interpreters(args: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, Tool, Path | Failure]]:
    """Each tool that was asked for with the interpreter that has it, or what its installation said."""
    for name in args.tools:
        tool = TOOLS[name]
        if args.here:
            yield name, tool, Path(sys.executable)
            continue
        home = (args.environment or scratch / "environment").absolute() / tool.driver
        try:
            yield name, tool, installed(home, tool.requirements, args.row_seconds)
        except Failure as error:
            yield name, tool, Failure(f"installation: {error}")
        if args.environment is None:
            shutil.rmtree(home, ignore_errors=True)


def rows_before(files: list[Path]) -> list[dict[str, Any]]:
    """Rows that other runs have written; of one that was run twice the last."""
    found = {r["label"]: r for file in files for r in json.loads(file.read_text())["rows"]}
    return list(found.values())


def tool_row(
    python: Path | Failure, tool: Tool, args: argparse.Namespace, bench: Bench, windows: Path, bits: int, out: Path,
    label: str,
) -> dict[str, Any]:  # fmt: skip
    """One tool at one number of bits, made in `out` and judged; Failure where it could not be installed."""
    if isinstance(python, Failure):
        raise python
    out.mkdir()
    facts = run_tool(python, tool, args, Path(bench.folder).absolute(), windows, bits, out)
    return row_of(label, facts, judged(bench, out / "dense.safetensors"))


def run(args: argparse.Namespace, bench: Bench, scratch: Path) -> None:
    """Rows in turn, files after each."""
    texts, until, windows = list(bench.texts), time.time() + args.seconds, scratch / "windows.npy"
    np.save(windows, bench.calibration.numpy())
    rows = rows_before(args.rows) or [{**bench.dense_row(), "share": 1.0}]
    done, failed = {r["label"] for r in rows}, list[dict[str, Any]]()
    say(rows[0], texts)
    for name, tool, python in interpreters(args, scratch):
        for bits in (b for b in tool.bits if b in args.bits):
            label, out = f"{name} {bits}", scratch / "row"
            if label in done:
                continue
            found = attempted(partial(tool_row, python, tool, args, bench, windows, bits, out, label), until)
            if "error" in found:
                said = found["error"].removeprefix("Failure: ")  # which names the tool's own error
                failed.append({"label": label, "keep": bits / 16, "error": said})
                print(f"{label:42} FAILED {said}", flush=True)
            else:
                rows.append(found)
                say(found, texts)
            shutil.rmtree(out, ignore_errors=True)
            write(args, rows, failed, texts)
    write(args, rows, failed, texts)
    print("\n" + table(rows, failed, texts))


def main() -> None:
    """Every tool at every number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"), help="packed model and texts")
    parser.add_argument("--model", type=Path, help="another model folder, with --text and --judge")
    parser.add_argument("--text", default="builtin:stdlib", help="calibration text for --model")
    parser.add_argument("--judge", nargs="+", default=["builtin:stdlib"], help="evaluation texts for --model")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--environment", type=Path, help="where environments are kept (default: removed when used)")
    parser.add_argument("--here", action="store_true", help="tools are installed for the running interpreter")
    parser.add_argument("--calib-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--length", type=int, default=WINDOW)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--row-seconds", type=float, default=3600, help="most that a stage or an installation may take")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="outside", help="what the written files are called")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="take the rows of these files too")
    parser.add_argument("--quick", action="store_true", help="few windows on a tiny random model")
    args = parser.parse_args()
    args.train_windows = 0
    if args.quick:
        args.calib_windows, args.eval_windows, args.length = 8, 4, 64
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            args.model = tiny_model(Path(scratch), width=128)
        bench = Bench(args, Path(scratch))
        args.device = bench.device.type
        run(args, bench, Path(scratch))


if __name__ == "__main__":
    main()
