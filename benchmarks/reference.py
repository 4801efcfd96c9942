"""All methods on the reference model at equal stored numbers: the tables of benchmarks/README.md.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/reference.py --data .carry --out results --device cuda --groups presets --jobs 4

256 calibration windows of 512 tokens, the windows after them for learning, all from the training text; perplexity over
the first 300 windows of 512 tokens of each held-out text, without overlap. Each result is written as a folder, its
stored numbers are counted from the files' headers, and the figures are of the weights rounded as stored (bf16).

Rows are shared out among `--jobs` processes on one device (their seconds are then longer than alone); every row is
written to OUT/rows, and to `reference.json`, as it comes: a run that is cut short keeps what it has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from reference_data import (
    CALIBRATION_WINDOWS,
    TEXTS,
    calibration_windows,
    held_out,
    load_ids,
    tokenise_training,
    unpack_model,
)
from rows import attempted
from shared_closed_forms import ClosedForms
from tasks import Judge

from spectrim.data import load_tasks, load_tokenizer, sample_windows
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.evaluate.language import evaluate
from spectrim.integrations.folder import finalise, round_to, write_folder
from spectrim.job import stored_in
from spectrim.linalg.bits import PER_NUMBER
from spectrim.models.load import load_dense, pick_device, resolve
from spectrim.registry import make_method
from spectrim.report.facts import environment
from spectrim.store import open_checkpoint

UNIFORM_FACTORS = {"storage": "factor", "allocation": "uniform", "rounds": 0, "coupling": "none", "propagate": 0.0}
PLAIN = {"rounds": 1, "coupling": "none", "propagate": 0.0, "newton": 0}
TASK_ITEMS = 1000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table, at one or more keeps and seeds."""

    label: str
    method: str = "soco"
    preset: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    recover: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    keeps: tuple[float, ...] = (0.8, 0.5)
    calib: str = "text"
    calib_windows: int | None = None
    """Of text that the model writes, which costs only time; None: as many as the others have."""
    tasks: bool = False


THREE = (0, 1, 2)
GROUPS: dict[str, list[Row]] = {
    "presets": [
        Row(label="soco --preset best", preset="best", keeps=(0.5, 0.8), tasks=True),
        Row(label="soco --preset balanced", preset="balanced", keeps=(0.8, 0.5), tasks=True),
        Row(label="soco --preset best", preset="best", keeps=(0.6, 0.4), tasks=True),
        Row(label="soco --preset fast", preset="fast", keeps=(0.8, 0.5), tasks=True),
        Row(label="soco --preset fast", preset="fast", keeps=(0.6, 0.4)),
        Row(label="soco --preset balanced", preset="balanced", keeps=(0.6, 0.4)),
        Row(label="soco --preset balanced", preset="balanced", keeps=(0.7, 0.35)),
        Row(label="soco --preset fast --calib self", preset="fast", keeps=(0.8,), calib="self"),
        Row(label="fast --calib self, 512 windows", preset="fast", keeps=(0.8,), calib="self", calib_windows=512),
    ],
    # Equal training: 300 steps of the same windows, everything counted.
    "rivals": [
        Row(label="svd-llm, kl:300", method="svd-llm", recover=("kl:300",), keeps=(0.5, 0.6), tasks=True),
        Row(label="soco best, 300 steps", preset="best", options={"distil_steps": 300}, keeps=(0.5, 0.6)),
        Row(
            label="acip, 300 steps", method="acip", keeps=(0.5, 0.6),
            options={"steps": 300, "target": "dense", "learning_rate": 0.003},
        ),
        Row(label="svd-llm, block:300", method="svd-llm", recover=("block:300",), keeps=(0.5, 0.6)),
    ],
    # The same closed form, steps and data: all on the factors, or the first of them on the scores.
    "scores-first": [
        Row(
            label="kl:200", preset="best", options={"distil_steps": 0}, recover=("kl:200",), seeds=THREE,
            keeps=(0.5, 0.6, 0.4),
        ),
        Row(
            label="scores 40, kl:160", preset="balanced", options={"steps": 40}, recover=("kl:160",), seeds=THREE,
            keeps=(0.5, 0.6, 0.4),
        ),
    ],
    # What each part of learning scores brings; the seeds order the windows.
    "phases": [
        Row(label="balanced", preset="balanced", seeds=THREE, keeps=(0.5,)),
        Row(label="phase 3 only", preset="balanced", options={"refine": 0.0}, seeds=THREE, keeps=(0.5,)),
        Row(
            label="phases 1 and 3", preset="balanced", options={"explore": 0.3, "refine": 0.0}, seeds=THREE,
            keeps=(0.5,),
        ),
        Row(
            label="all phases", preset="balanced", options={"explore": 0.3, "refine": 0.3}, seeds=THREE, keeps=(0.5,),
        ),
        Row(label="basis svd", preset="balanced", options={"basis": "svd"}, seeds=THREE, keeps=(0.5,)),
        Row(label="factor storage", preset="balanced", options={"storage": "factor"}, seeds=THREE, keeps=(0.5,)),
    ],
    "ablation": [
        Row(
            label="two-sided, uniform, kl:300", method="two-sided", options={"allocation": "uniform"},
            recover=("kl:300",),
        ),
        Row(label="svd-llm, pivot, kl:300", method="svd-llm", options={"storage": "pivot"}, recover=("kl:300",)),
        Row(label="fast, plain metric alone", preset="fast", options=PLAIN),
        Row(label="fast, no Newton step", preset="fast", options={"newton": 0}),
        Row(label="fast, no propagation", preset="fast", options={"propagate": 0.0}),
        Row(label="fast, coupled", preset="fast", options={"coupling": "sequence"}),
        Row(label="fast, coupled, no Newton step", preset="fast", options={"coupling": "sequence", "newton": 0}),
        Row(label="fast, factor storage", preset="fast", options={"storage": "factor"}),
        Row(label="balanced, no next-token loss", preset="balanced", options={"label_share": 0.0}),
        Row(label="balanced, 0.3 next-token loss", preset="balanced", options={"label_share": 0.3}),
    ],
    "closed-form": [
        Row(label="svd", method="svd"),
        Row(label="asvd", method="asvd"),
        Row(label="svd-llm", method="svd-llm"),
        Row(label="svd-llm, update=sequential", method="svd-llm", options={"update": "sequential"}),
        Row(label="svd, pivot storage", method="svd", options={"storage": "pivot"}),
        Row(label="svd-llm, pivot storage", method="svd-llm", options={"storage": "pivot"}),
        Row(label="two-sided, uniform factors, 0 rounds", method="two-sided", options=UNIFORM_FACTORS),
    ],
}  # fmt: skip

FOLDERS = {(f"soco --preset {preset}", keep) for preset in ("best", "balanced") for keep in (0.8, 0.5)}
"""Results that `--folders` writes whole, for benchmarks/tasks.py."""

Work = tuple[Row, float, int]


def work_of(args: argparse.Namespace) -> list[Work]:
    """(row, keep, seed) of everything asked for, in a fixed order."""
    rows = [row for group in args.groups for row in GROUPS[group]]
    return [
        (row, keep, seed)
        for row in rows
        if not args.rows or row.label in args.rows
        for keep in row.keeps
        if not args.keeps or keep in args.keeps
        for seed in row.seeds
        if not args.seeds or seed in args.seeds
    ]


class Bench:
    """The dense model and its text on the device; measures one row after the other."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        folder = unpack_model(args.data, scratch)
        self.device = pick_device(args.device)
        self.source = resolve(str(folder))
        self.dense = load_dense(self.source, self.device)
        self.calibration, self.cache, self.train_windows = (
            calibration_windows(args.data, folder),
            args.cache,
            args.train_windows,
        )
        self.texts = {name: ids[: args.eval_windows] for name, ids in held_out(args.data).items()}
        self.calibration = self.calibration[: args.calib_windows]
        self.gradient_windows = args.gradient_windows
        self.batch_size = 64 if self.device.type == "cuda" else 8
        self.tasks = args.data / "tasks" if args.tasks else None
        self.folder = folder
        self.folders = args.out / "folders" if args.folders else None
        self.closed_forms = ClosedForms() if args.share_closed_forms else None
        self._judge: Judge | None = None

    @cached_property
    def training(self) -> torch.Tensor:
        """The training windows, which the parent process tokenises meanwhile."""
        while not self.cache.exists():
            time.sleep(0.2)
        return load_ids(self.cache)[CALIBRATION_WINDOWS:][: self.train_windows]

    def judge(self) -> Judge:
        """The dense model's answers to the tasks, when first asked for."""
        assert self.tasks is not None
        if self._judge is None:
            loaded = load_tasks(self.tasks, limit=TASK_ITEMS, seed=0)
            batch = 2**28 // self.dense.config.get_text_config().vocab_size
            self._judge = Judge(self.dense, load_tokenizer(self.folder), loaded.tasks, batch_tokens=batch)
        return self._judge

    def dense_row(self) -> dict[str, Any]:
        """The dense model's perplexities, and its accuracy on the tasks."""
        found = {name: evaluate(self.dense, ids, batch_size=self.batch_size) for name, ids in self.texts.items()}
        return {
            "label": "dense", "keep": 1.0, "counted": 1.0, "seconds": 0.0, "settings": {}, "seed": 0,
            **{name: quality.perplexity for name, quality in found.items()},
        }  # fmt: skip

    def row(self, row: Row, keep: float, seed: int) -> dict[str, Any]:
        """Compress, count what is written, judge."""
        method = make_method(row.method, row.preset, dict(row.options))
        trains = bool(row.recover) or getattr(method, "steps", 0) > 0 or getattr(method, "distil_steps", 0) > 0
        if trains:
            assert len(self.training)  # wait for them before the clock starts
        clock = time.perf_counter()
        calibration = self.calibration
        if row.calib == "self":
            count, length = calibration.shape
            count = row.calib_windows or count
            calibration = sample_windows(self.dense, length=length, count=count, seed=seed).ids
        with nullcontext() if self.closed_forms is None else self.closed_forms.shared():
            outcome = compress_model(
                self.dense, method, keep, calibration, self.training if trains else None, recovery=row.recover,
                gradient_windows=self.gradient_windows, seed=seed,
            )  # fmt: skip
        seconds = time.perf_counter() - clock + outcome.seconds.pop("taken", 0.0)
        round_to(outcome.model, torch.bfloat16)
        counted, size = counted_keep(outcome)
        found: dict[str, Any] = {
            "label": row.label, "keep": keep, "seed": seed, "counted": counted, "bytes": size, "seconds": seconds,
            "stages": outcome.seconds, "settings": method.to_config(), "recover": row.recover, "calib": row.calib,
        }  # fmt: skip
        for text, ids in self.texts.items():
            quality = evaluate(outcome.model, ids, dense=self.dense, batch_size=self.batch_size)
            found |= {text: quality.perplexity, f"{text}.kl": quality.kl, f"{text}.agreement": quality.agreement}
        if outcome.learned:
            found |= {"losses": outcome.learned.losses[::10], "returned": outcome.learned.returned}
        if self.folders is not None and (row.label, keep) in FOLDERS:
            write_folder(
                self.folders / f"{row.label.split()[-1]}-{keep}",
                finalise(outcome, torch.bfloat16, base_model="ref-llama-24m"),
                self.source,
            )
        if row.tasks and self.tasks is not None:
            found["tasks"] = {
                result.task: {
                    "acc": result.acc.value,
                    "dense": result.acc.dense and result.acc.dense.value,
                    "agreement": result.acc.dense and result.acc.dense.agreement,
                }
                for result in self.judge()(outcome.model)
            }
        return found


def counted_keep(outcome: Outcome) -> tuple[float, int]:
    """What the decoder linears keep, in numbers or bytes as the method counts; bytes of the whole model. As written."""
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch), finalise(outcome, torch.bfloat16, base_model=None), None)
        written = open_checkpoint(Path(scratch))
        prefixes = tuple(layer.name + "." for layer in outcome.walk.layers)
        unit = outcome.method.budget_unit
        after = sum(stored_in(info, unit) for name, info in written.tensors.items() if name.startswith(prefixes))
        return after / (PER_NUMBER[unit] * outcome.walk.numbers), written.nbytes


def claim(folder: Path, number: int) -> bool:
    """True for the one process that takes this piece of work."""
    try:
        os.close(os.open(folder / f"{number}.claimed", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def run_rows(args: argparse.Namespace) -> None:
    """What one process does: take rows that nobody has taken, until none is left or the time is up."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        if claim(args.claims, -1):
            save(args, -1, bench.dense_row())
        failed = 0
        for number, (row, keep, seed) in enumerate(work_of(args)):
            if time.time() < args.until and claim(args.claims, number):
                found = attempted(partial(bench.row, row, keep, seed))
                if "error" in found:
                    print(f"{row.label}, keep {keep}, seed {seed}: {found['error']}", flush=True)
                    failed += 1
                else:
                    save(args, number, found)
    if failed:
        sys.exit(f"{failed} rows failed")


def save(args: argparse.Namespace, number: int, row: dict[str, Any]) -> None:
    """Write one row and print it."""
    (args.claims / f"{number}.json").write_text(json.dumps(row))
    gather(args)
    figures = " / ".join(f"{row[name]:.2f}" for name in TEXTS)
    print(
        f"{row['keep']:<5} {row['label']:36} seed {row['seed']} {figures:24} KL {row.get('novels.kl') or 0:.4f} "
        f"counted {row['counted']:.5f}  {row['seconds']:.1f} s",
        flush=True,
    )


def gather(args: argparse.Namespace) -> None:
    """`reference.json` with all rows that there are: a run that is cut short leaves it too."""
    rows = [json.loads(path.read_text()) for path in sorted(args.claims.glob("*.json"), key=lambda p: int(p.stem))]
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    results = {"environment": environment(), "model": "ref-llama-24m", "settings": settings, "rows": rows}
    fresh = args.out / f"reference.{os.getpid()}"
    fresh.write_text(json.dumps(results, indent=1))
    fresh.replace(args.out / "reference.json")


def main() -> None:
    """Tokenise once, share the rows out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=["presets"])
    parser.add_argument("--rows", nargs="*", help="labels to run (default: all of the groups)")
    parser.add_argument("--keeps", type=float, nargs="*", help="default: those of each row")
    parser.add_argument("--seeds", type=int, nargs="*", help="default: those of each row")
    parser.add_argument("--jobs", type=int, default=1, help="processes beside each other on the device")
    parser.add_argument("--tasks", action="store_true", help=f"also {TASK_ITEMS} items of each task, for rows with it")
    parser.add_argument("--folders", action="store_true", help="write the models of best and balanced to OUT/folders")
    parser.add_argument("--gradient-windows", type=int)
    parser.add_argument(
        "--share-closed-forms", action="store_true", help="rows that differ only in training start from one closed form"
    )
    parser.add_argument("--calib-windows", type=int, default=256)
    parser.add_argument("--train-windows", type=int)
    parser.add_argument("--eval-windows", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further row after this long")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--claims", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.claims is not None:
        run_rows(args)
        return
    args.until = time.time() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as shared:
        args.cache, args.claims = Path(shared) / "training.npy", args.out / "rows"  # kept when the run is cut short
        args.claims.mkdir(exist_ok=True)
        for old in args.claims.iterdir():
            old.unlink()
        model = Path(shared) / "model"
        model.mkdir()
        own = ["--claims", str(args.claims), "--cache", str(args.cache), "--until", str(args.until)]
        jobs = [subprocess.Popen([sys.executable, *sys.argv, *own]) for _ in range(args.jobs)]
        tokenise_training(args.data, unpack_model(args.data, model), args.cache)
        failed = sum(job.wait() != 0 for job in jobs)
    if failed:
        sys.exit(f"{failed} of {args.jobs} processes failed; the rows of the others are in {args.out}")


if __name__ == "__main__":
    main()
