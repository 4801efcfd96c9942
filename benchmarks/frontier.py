"""One budget at many sizes, and every single method of few bytes in the same run: is its frontier above one anywhere?

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/frontier.py --data .carry --out results --device cuda --seconds 580
    python benchmarks/frontier.py --quick --out results        # a random model of 0.1 M weights, a minute on a CPU

1. `trellis` (docs/trellis.md) at every size of --keep-bytes
2. rivals: rtn, gptq, spqr, squeezellm at their own sizes; eora, lq-lora and low-rank presets, also in 4 and 8 bits, at
   several
3. `trellis` again at exactly the size of each rival that no other rival beats: the verdict is of these pairs
4. other menus and allocations of `trellis` at two sizes

Sizes are bytes of the decoder linears over what they take in 16 bits, everything counted. Written after every row:
frontier.json, frontier.md and frontier-TEXT.svg. A row that fails says why, and the others go on; with --seconds no row
is started after that long. Step 3 takes what is in the file already when the run is started again with --go-on.

Several processes can share the work: `--steps 1 2 --part 0/3` runs every third row of steps 1 and 2; `--rows FILE...`
takes the rows that others have written (`--steps` with none: writes them all together and runs nothing).
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compare import SAME_SIZE, Bench, take
from reference_data import CALIBRATION_WINDOWS, WINDOW
from rows import Row, attempted
from transformers import AutoModelForCausalLM, LlamaConfig

from spectrim.models.load import resolve
from spectrim.report.facts import environment
from spectrim.report.forms import forms_rows
from spectrim.report.plot import line_chart

ONE = "one budget"
KEEPS = (0.1, 0.134, 0.2, 0.26, 0.35, 0.5, 1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "codes alone": {"forms": "codes"},
    "probed": {"allocation": "probed"},
    "evopress": {"allocation": "evopress"},
}
VARIANT_KEEPS = (0.134, 0.2)


class Task(NamedTuple):
    """One row to run."""

    row: Row
    keep: float
    factor_bits: int | None = None


def ours(keep: float, window: int, variant: str | None = None) -> Task:
    """One budget at a size."""
    options = {"window": window, **(VARIANTS[variant] if variant else {})}
    label = ONE if variant is None else f"{ONE}, {variant}"
    return Task(Row(label=label, method="trellis", options=options), keep)


def rivals(group: int, quick: bool) -> list[Task]:
    """Step 2; methods whose size follows from their bits are asked for with a budget that does not bind."""
    fixed = [(name, {"bits": b, "group_size": group}) for name in ("gptq", "rtn") for b in (4, 3, 2)]
    fixed += [("spqr", {"bits": b, "group_size": min(group, 16)}) for b in (4, 3, 2)]
    fixed += [("squeezellm", {"bits": b}) for b in (4, 3, 2)]
    tasks = [Task(Row(label=f"{m} {o['bits']}", method=m, options=o), 1.0) for m, o in fixed]
    for base, keeps in {"gptq2": (0.2,), "gptq3": (0.26,), "gptq4": (0.35,)}.items():
        row = Row(label=f"eora on {base}", method="eora", options={"base": base, "group_size": group})
        tasks += [Task(row, keep) for keep in keeps]
    tasks += [Task(Row(label="lq-lora", method="lq-lora"), keep) for keep in (0.2, 0.26, 0.35)]
    for keep in (0.35, 0.5, 0.75):
        for label, method, preset in (("soco fast", "soco", "fast"), ("svd-llm", "svd-llm", None)):
            tasks.append(Task(Row(label=label, method=method, preset=preset), keep))
            if label == "soco fast":
                tasks += [
                    Task(Row(label=f"{label} in {b} bits", method=method, preset=preset), keep, b) for b in (8, 4)
                ]
    return tasks[::5] if quick else tasks


def standing(rows: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Rivals that no other rival of at most their size beats."""
    others = [r for r in rows if not r["label"].startswith(ONE) and r["label"] != "dense"]
    return [
        r
        for r in others
        if not any(o[text] < r[text] and o["share"] <= r["share"] + SAME_SIZE for o in others if o is not r)
    ]


def verdicts(rows: list[dict[str, Any]], texts: list[str]) -> list[dict[str, Any]]:
    """For every rival: the best one-budget row of at most its bytes, and on which texts it is above the rival."""
    own = [r for r in rows if r["label"] == ONE]
    found = []
    for rival in rows:
        fits = [r for r in own if r["share"] <= rival["share"] + 1e-6]
        if rival["label"].startswith(ONE) or rival["label"] == "dense" or not fits:
            continue
        best = max(fits, key=lambda r: r["share"])
        above = [key for text in texts for key in (text, f"{text}.kl") if best.get(key, 0.0) > rival[key]]
        found.append({"rival": rival, "ours": best, "above": above})
    return sorted(found, key=lambda v: v["rival"]["share"])


def table(rows: list[dict[str, Any]], texts: list[str]) -> str:
    """Markdown: rows by size, then every rival beside the one-budget row of at most its bytes."""

    def figures(r: dict[str, Any]) -> str:
        return " / ".join(f"{r[text]:.2f}" for text in texts)

    lines = [f"| share | method | {' / '.join(texts)} | KL ({texts[-1]}) | seconds |", "|---" * 5 + "|"]
    for r in sorted(rows, key=lambda r: (r["share"], r["label"])):
        kl = f"{r.get(f'{texts[-1]}.kl') or 0.0:.4f}"
        lines.append(f"| {r['share']:.4f} | {r['label']} | {figures(r)} | {kl} | {r['seconds']:.1f} |")
    lines += ["", f"| rival | share | its figures | {ONE} | share | verdict |", "|---" * 6 + "|"]
    for v in verdicts(rows, texts):
        rival, own = v["rival"], v["ours"]
        word = f"ABOVE on {', '.join(v['above'])}" if v["above"] else "below"
        cells = [rival["label"], f"{rival['share']:.4f}", figures(rival), figures(own), f"{own['share']:.4f}", word]
        lines.append("| " + " | ".join(cells) + " |")
    for r in rows:
        if r["label"] == ONE and r.get("forms"):
            forms = "; ".join(f"{form} x {layers} ({bits} bits)" for form, layers, _, _, bits in forms_rows(r["forms"]))
            lines += ["", f"Forms at {r['share']:.4f}: {forms}"]
    return "\n".join(lines)


def chart(rows: list[dict[str, Any]], text: str, up_to: float) -> str | None:
    """The frontier as a line, rivals as dots."""
    dense = next(r[text] for r in rows if r["label"] == "dense")
    shown = [r for r in rows if r["label"] != "dense" and r[text] <= up_to * dense]
    series: dict[str, list[tuple[float, float]]] = {}
    for r in sorted(shown, key=lambda r: r["share"]):
        label = r["label"]
        kind = label if label.startswith(ONE) else label.rsplit(" ", 1)[0] if label[-1].isdigit() else label
        series.setdefault(kind, []).append((r["share"], r[text]))
    if ONE not in series:
        return None
    return line_chart(
        series, title=f"Perplexity on {text} by bytes", x="bytes of the decoder's linear layers over 16 bits",
        y="perplexity", references={"dense": dense}, dots=[name for name in series if name != ONE],
    )  # fmt: skip


def write(args: argparse.Namespace, rows: list[dict[str, Any]], failed: list[dict[str, Any]], texts: list[str]) -> None:
    """All files anew."""
    facts = {"environment": environment(), "command": sys.argv, "rows": rows, "failed": failed}
    (args.out / f"{args.name}.json").write_text(json.dumps(facts, indent=1, default=str))
    (args.out / f"{args.name}.md").write_text(table(rows, texts) + "\n")
    for text in texts:
        drawn = chart(rows, text, args.plot_up_to)
        if drawn is not None:
            (args.out / f"{args.name}-{text}.svg").write_text(drawn)


def tiny_model(folder: Path, width: int = 64) -> Path:
    """A random Llama with the tokenizer of builtin:tiny."""
    source = resolve("builtin:tiny").folder
    for file in source.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=512, initializer_range=0.1)  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def tasks_of(args: argparse.Namespace, rows: list[dict[str, Any]], text: str) -> Iterator[Task]:
    """The steps that were asked for, in order; step 3 looks at what the steps before it have left in `rows`."""
    if 1 in args.steps:
        yield from (ours(keep, args.window) for keep in args.keep_bytes)
    if 2 in args.steps:
        yield from rivals(args.group, args.quick)
    if 3 in args.steps:
        yield from (ours(r["share"], args.window) for r in standing(rows, text) if r["share"] <= 1)
    if 4 in args.steps:
        yield from (ours(keep, args.window, name) for keep in VARIANT_KEEPS for name in VARIANTS)


def mine(tasks: Iterator[Task], part: tuple[int, int]) -> Iterator[Task]:
    """Every `part[1]`-th task."""
    return (task for index, task in enumerate(tasks) if index % part[1] == part[0])


def part_of(text: str) -> tuple[int, int]:
    """`I/N`, I from 0."""
    index, total = (int(number) for number in text.split("/"))
    if not 0 <= index < total:
        raise ValueError(text)
    return index, total


def rows_before(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows that other runs, or this one before, have written; each once."""
    files = [*args.rows, *([args.out / f"{args.name}.json"] if args.go_on else [])]
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for file in files:
        if file.exists() or file in args.rows:
            found.update({(r["label"], round(r["keep"], 6)): r for r in json.loads(file.read_text())["rows"]})
    return list(found.values())


def main() -> None:
    """Every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"), help="packed model and texts")
    parser.add_argument("--model", type=Path, help="another model folder, with --text and --judge")
    parser.add_argument("--text", default="builtin:stdlib", help="calibration text for --model")
    parser.add_argument("--judge", nargs="+", default=["builtin:stdlib"], help="evaluation texts for --model")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep-bytes", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--group", type=int, default=128, help="inputs that share a grid in rtn, gptq, eora")
    parser.add_argument("--window", type=int, default=12, help="of trellis codes")
    parser.add_argument("--calib-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--length", type=int, default=WINDOW)
    parser.add_argument("--plot-up-to", type=float, default=3.0, help="times the dense perplexity")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="frontier", help="what the written files are called")
    parser.add_argument("--go-on", action="store_true", help="take the rows that the written file has")
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 3, 4], help="which of the steps above")
    parser.add_argument("--part", type=part_of, default=(0, 1), metavar="I/N", help="every N-th row, from row I")
    parser.add_argument("--rows", type=Path, nargs="+", default=[], help="take the rows of these files too")
    parser.add_argument("--quick", action="store_true", help="few rows on a tiny random model")
    args = parser.parse_args()
    args.train_windows = 0
    if args.quick:
        args.keep_bytes, args.window, args.group = [0.2, 0.5], 8, 32
        args.calib_windows, args.eval_windows, args.length = 8, 4, 64
    args.out.mkdir(parents=True, exist_ok=True)
    until = time.time() + args.seconds
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            args.model = tiny_model(Path(scratch))
        run(args, Bench(args, Path(scratch)), until)


def run(args: argparse.Namespace, bench: Bench, until: float) -> None:
    """Rows in turn, files after each."""
    texts, failed = list(bench.texts), list[dict[str, Any]]()
    rows = rows_before(args) or [{**bench.dense_row(), "share": 1.0}]
    done = {(r["label"], round(r["keep"], 6)) for r in rows}
    for task in mine(tasks_of(args, rows, texts[0]), args.part):
        key = (task.row.label, round(task.keep, 6))
        if key in done:
            continue
        done.add(key)
        asked = (task.row, task.keep, task.factor_bits, args.group)
        take(attempted(lambda asked=asked: bench.row(*asked), until), key[0], task.keep, rows, failed, texts)
        write(args, rows, failed, texts)
    write(args, rows, failed, texts)
    print("\n" + table(rows, texts))
    if failed:
        print(
            f"{len(failed)} rows are missing: "
            + "; ".join(f"{f['label']} at {f['keep']:g}: {f['error'][:80]}" for f in failed)
        )


if __name__ == "__main__":
    main()
