"""All language-model methods on one model at the same stored numbers, in one run: a table and a Pareto plot.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/compare.py --data .carry --out results --device cuda --groups closed-form searched trained
    python benchmarks/compare.py --model FOLDER --text calibration.txt --judge test.txt --out results  # any other model

    python benchmarks/compare.py --merge run/compare.json ... --out results

On a CPU take few, short windows: `--calib-windows 32 --length 256 --eval-windows 40 --gradient-windows 8`.

Every result is written as a folder, its numbers are counted from the files' headers, and the figures are of the
weights as stored. A row that fails is printed with its error and the others go on (the exit status is then 1). Written
after every row: compare.json, compare.md, and compare-TEXT.svg, whose line joins the rows that no other row beats in
both size and perplexity; rows above `--plot-up-to` times the dense perplexity are in the table only.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reference import counted_keep
from reference_data import CALIBRATION_WINDOWS, WINDOW, cut, held_out, tokens_of, training_text, unpack_model
from rows import GROUPS, Row, attempted

from spectrim.data import calibration_windows, evaluation_windows, load_texts, load_tokenizer
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import round_to
from spectrim.linalg.bits import VALUE_BYTES, size_of
from spectrim.models.load import load_dense, pick_device, pick_dtype, resolve
from spectrim.registry import make_method
from spectrim.report.facts import environment
from spectrim.report.forms import forms_table
from spectrim.report.plot import line_chart

CHARS_A_WINDOW = 8 * WINDOW
"""Text that is read for each window: twice what this tokenizer needs."""


class Bench:
    """A dense model and its text on the device."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.device = args, pick_device(args.device)
        self.folder = args.model or unpack_model(args.data, scratch)
        source = resolve(str(self.folder))
        self.dtype = pick_dtype("auto", source.dtype)
        self.dense = load_dense(source, self.device)
        self.batch_size = 64 if self.device.type == "cuda" else 8
        read = self._given_texts if args.model else self._packed_texts
        self.calibration, self.training, self.texts = read()

    def _packed_texts(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        args = self.args
        wanted = CALIBRATION_WINDOWS + args.train_windows
        text = training_text(args.data, wanted * CHARS_A_WINDOW)
        ids = torch.from_numpy(
            cut(tokens_of(load_tokenizer(self.folder), text, wanted * WINDOW), wanted).astype("int64")
        )
        ids = ids[:, : args.length]
        texts = {name: held[: args.eval_windows, : args.length] for name, held in held_out(args.data).items()}
        return ids[: args.calib_windows], ids[CALIBRATION_WINDOWS:], texts

    def _given_texts(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        args, tokenizer = self.args, load_tokenizer(self.folder)
        count = args.calib_windows + args.train_windows
        windows = calibration_windows(
            load_texts(args.text, split="calibration"), tokenizer, length=args.length, count=count, seed=args.seed
        ).ids
        texts = {
            Path(spec).stem: evaluation_windows(
                load_texts(spec, split="evaluation"), tokenizer, length=args.length, count=args.eval_windows
            ).ids
            for spec in args.judge
        }
        return windows[: args.calib_windows], windows[args.calib_windows :], texts

    def dense_row(self) -> dict[str, Any]:
        """The dense model's perplexities."""
        found = {name: evaluate(self.dense, ids, batch_size=self.batch_size) for name, ids in self.texts.items()}
        return {
            "label": "dense", "keep": 1.0, "counted": 1.0, "seconds": 0.0,
            **{name: quality.perplexity for name, quality in found.items()},
        }  # fmt: skip

    def row(self, row: Row, keep: float, factor_bits: int | None = None, group: int = 128) -> dict[str, Any]:
        """Compress, count what is written, judge; `keep` of rows in `factor_bits` is of the numbers before."""
        method = make_method(row.method, row.preset, dict(row.options))
        clock = time.perf_counter()
        outcome = compress_model(
            self.dense, method, keep, self.calibration, self.training if len(self.training) else None,
            recovery=row.recover, factor_bits=factor_bits, factor_group_size=group,
            gradient_windows=self.args.gradient_windows, seed=self.args.seed,
        )  # fmt: skip
        seconds = time.perf_counter() - clock
        round_to(outcome.model, self.dtype)
        counted, size = counted_keep(outcome)
        if factor_bits is None and counted > keep + 1e-6:
            raise AssertionError(f"{row.label}: {counted:.5f} of the numbers are stored, {keep} were asked for")
        found: dict[str, Any] = {
            "label": row.label, "keep": keep, "counted": counted, "bytes": size, "seconds": seconds,
            "share": linear_bytes(outcome), "forms": forms_table(outcome.model, outcome.walk),
            "stages": outcome.seconds, "settings": method.to_config(), "recover": row.recover,
            "warnings": outcome.warnings,
        }  # fmt: skip
        for text, ids in self.texts.items():
            quality = evaluate(outcome.model, ids, dense=self.dense, batch_size=self.batch_size)
            found |= {text: quality.perplexity, f"{text}.kl": quality.kl, f"{text}.agreement": quality.agreement}
        return found


def linear_bytes(outcome: Outcome) -> float:
    """Bytes of the decoder linears over what they take dense in 16 bits, whatever the method counts."""
    layers = [outcome.model.get_submodule(layer.name) for layer in outcome.walk.layers]
    stored = sum(size_of(layer.state_dict().values(), "bytes") for layer in layers)
    return stored / (VALUE_BYTES * outcome.walk.numbers)


SAME_SIZE = 0.002
"""Sizes this near count as one: methods cannot all spend their last number."""


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other of at most their size beats in perplexity, by size."""
    return [
        (size, value)
        for size, value in sorted(set(points))
        if not any(other < value and own <= size + SAME_SIZE for own, other in points)
    ]


def table(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> str:
    """Markdown; the best perplexity on the first text first."""
    lines = [f"| method | keep | {' / '.join(texts)} | KL, agreement ({texts[-1]}) | counted keep | bytes | seconds |"]
    lines.append("|---" * 7 + "|")
    for r in sorted(rows, key=lambda r: (-r["keep"], r[texts[0]])):
        figures = " / ".join(f"{r[name]:.2f}" for name in texts)
        kl = f"{r[f'{texts[-1]}.kl']:.4f}, {r[f'{texts[-1]}.agreement']:.3f}" if f"{texts[-1]}.kl" in r else ""
        size = f"{r['bytes']:,}" if "bytes" in r else ""
        cells = [r["label"], f"{r['keep']:g}", figures, kl, f"{r['counted']:.5f}", size, f"{r['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


MOST_NAMED = 10
"""Labels that a chart has room for."""


def named(series: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """The methods that come nearest the front at any size by their own; all others as one."""
    best = front([point for points in series.values() for point in points])

    def excess(label: str) -> float:
        """The least factor to the front at no larger a size."""
        return min(value / min(b for size, b in best if size <= own + SAME_SIZE) for own, value in series[label])

    first = set(sorted(series, key=excess)[:MOST_NAMED])
    shown = {label: points for label, points in series.items() if label in first}
    others = [point for label, points in series.items() if label not in first for point in points]
    return shown | ({f"{len(series) - len(shown)} others": others} if others else {})


def pareto(rows: Sequence[dict[str, Any]], text: str, up_to: float) -> str | None:
    """The chart as SVG; None while no compressed row is on it. The `MOST_NAMED` best are named."""
    dense = next(r[text] for r in rows if r["label"] == "dense")
    shown = [r for r in rows if r["label"] != "dense" and r[text] <= up_to * dense]
    if not shown:
        return None
    series: dict[str, list[tuple[float, float]]] = {}
    for r in shown:
        series.setdefault(r["label"], []).append((r["counted"], r[text]))
    shown_by_name = named(series)
    dots = list(shown_by_name)
    others = [name for name in dots if name.endswith(" others")]
    points = [point for own in series.values() for point in own]
    chart_of = {"the front": front(points), **shown_by_name}
    return line_chart(
        chart_of, title=f"Perplexity on {text} by what is stored", x="share stored of the decoder's linear layers",
        y="perplexity", references={"dense": dense}, dots=dots, faint=others,
    )  # fmt: skip


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Where and how this run is made."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    del settings["merge"]
    return {"environment": environment(), "command": sys.argv, "settings": settings}


def about_all(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same of runs that are put together: each environment and setting once, without where the parts lay."""
    environments = [e for run in runs for e in run.get("environments", [run.get("environment")])]
    settings = [
        s for run in runs for s in (run["settings"] if isinstance(run["settings"], list) else [run["settings"]])
    ]
    own = ("out", "name", "rows", "keeps", "groups", "seconds")
    alike = [{key: value for key, value in s.items() if key not in own} for s in settings]
    return {
        "environments": [e for i, e in enumerate(environments) if e not in environments[:i]],
        "settings": [s for i, s in enumerate(alike) if s not in alike[:i]],
    }


def write(
    args: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]], failed: list[dict[str, Any]],
    texts: list[str],
) -> None:  # fmt: skip
    """All files anew."""
    facts = about | {"rows": rows, "failed": failed}
    (args.out / f"{args.name}.json").write_text(json.dumps(facts, indent=1))
    (args.out / f"{args.name}.md").write_text(table(rows, texts) + "\n")
    for text in texts:
        chart = pareto(rows, text, args.plot_up_to)
        if chart is not None:
            (args.out / f"{args.name}-{text}.svg").write_text(chart)


def take(
    found: dict[str, Any], label: str, keep: float, rows: list[dict[str, Any]], failed: list[dict[str, Any]],
    texts: Sequence[str],
) -> None:  # fmt: skip
    """Put what was attempted where it belongs, and say it."""
    if "error" not in found:
        rows.append(found)
        say(found, texts)
        return
    failed.append({"label": label, "keep": keep, **found})
    print(f"{keep:<5} {label:36} FAILED {found['error']}", flush=True)


def say(row: dict[str, Any], texts: Sequence[str]) -> None:
    """One line as the row comes."""
    figures = " / ".join(f"{row[name]:.2f}" for name in texts)
    kl = row.get(f"{texts[-1]}.kl") or 0.0
    print(f"{row['keep']:<5} {row['label']:36} {figures:28} KL {kl:.4f} counted {row['counted']:.5f} "
          f"{row['seconds']:8.1f} s", flush=True)  # fmt: skip


def merge(args: argparse.Namespace) -> None:
    """Table and plots of several runs of the same setting; of a row that was run twice the last counts.

    Each row keeps the name of the device that it was run on.
    """
    runs = [json.loads(path.read_text()) for path in args.merge]
    found = {
        (r["label"], r["keep"]): r if "device" in r else {"device": run["environment"]["gpu"]} | r
        for run in runs
        for r in run["rows"]
    }
    missing = {(f["label"], f["keep"]): f for run in runs for f in run["failed"]}
    texts = [name for name in found["dense", 1.0] if f"{name}.kl" in runs[-1]["rows"][-1]]
    write(args, about_all(runs), list(found.values()), [f for key, f in missing.items() if key not in found], texts)
    print(table(list(found.values()), texts))


def main() -> None:
    """Every row at every keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"), help="packed model and texts")
    parser.add_argument("--model", type=Path, help="another model folder, with --text and --judge")
    parser.add_argument("--text", default="builtin:stdlib", help="calibration and training text for --model")
    parser.add_argument("--judge", nargs="+", default=["builtin:stdlib"], help="evaluation texts for --model")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["closed-form"])
    parser.add_argument("--rows", nargs="*", help="labels to run (default: all of the groups)")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--calib-windows", type=int, default=CALIBRATION_WINDOWS)
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument("--train-windows", type=int, default=4096)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--length", type=int, default=WINDOW)
    parser.add_argument("--plot-up-to", type=float, default=4.0, help="times the dense perplexity")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="compare", help="what the written files are called")
    parser.add_argument("--merge", type=Path, nargs="+", help="files of earlier runs, to be written as one")
    args = parser.parse_args()
    if args.merge:
        args.out.mkdir(parents=True, exist_ok=True)
        merge(args)
        return
    rows_asked = [r for g in args.groups for r in GROUPS[g] if not args.rows or r.label in args.rows]
    until, failed = time.time() + args.seconds, []
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        texts = list(bench.texts)
        rows = [bench.dense_row()]
        say(rows[0], texts)
        for keep, row in ((keep, row) for keep in args.keeps for row in rows_asked):
            found = attempted(lambda row=row, keep=keep: bench.row(row, keep), until)
            take(found, row.label, keep, rows, failed, texts)
            write(args, about(args), rows, failed, texts)
    print("\n" + table(rows, texts))
    if failed:
        sys.exit(f"{len(failed)} rows are missing: " + "; ".join(f"{f['label']} at {f['keep']}" for f in failed))


if __name__ == "__main__":
    main()
