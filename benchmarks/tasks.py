"""Accuracy on tasks, and agreement with the dense model, of compressed folders.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry
    python benchmarks/tasks.py --data .carry --models small smaller --out results --device cuda

The dense model is --dense, or the one packed in --data. All items of the files in DATA/tasks, or --limit of each.
Prints a Markdown table and writes tasks.json, rewritten after every model. For models in memory: `Judge`.
"""

import argparse
import json
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.data import load_tasks, load_tokenizer
from spectrim.data.tasks import Task
from spectrim.evaluate.score import BATCH_TOKENS, encode_task
from spectrim.evaluate.tasks import TaskResult, score_items, summarise
from spectrim.models.load import context_length, load_model, pick_device, resolve
from spectrim.report.facts import environment
from spectrim.report.tasks import HEADER, facts, notes, rows


class Judge:
    """The dense model's answers, once; then the figures of any number of models of the same context length.

    >>> judge = Judge(dense, tokenizer, load_tasks(".carry/tasks").tasks)   # doctest: +SKIP
    >>> for result in judge(compressed): print(result.task, result.acc.value, result.acc.dense.agreement)
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Sequence[Task],
        *,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.tasks, self.batch_tokens = list(tasks), batch_tokens
        limit = context_length(dense.config)
        self.encoded = [encode_task(tokenizer, task, limit=limit) for task in tasks]
        self.dense = [score_items(dense, encoded, batch_tokens=batch_tokens) for encoded in self.encoded]

    def __call__(self, model: PreTrainedModel) -> list[TaskResult]:
        """Figures on every task; the model is left as it is."""
        found = [score_items(model, encoded, batch_tokens=self.batch_tokens) for encoded in self.encoded]
        return [summarise(*each) for each in zip(self.tasks, self.encoded, found, self.dense, strict=True)]


def table(results: Sequence[TaskResult]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [HEADER, ["---"] * len(HEADER), *rows(results)]]
    return "\n".join(lines)


def main() -> None:
    """Judge every folder, print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".carry"))
    parser.add_argument("--models", nargs="+", required=True, help="folders of compressed models")
    parser.add_argument("--dense", help="folder of the dense model (default: the one in DATA/model.tar.xz)")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the dense model's)")
    parser.add_argument("--limit", type=int, help="items of each task (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-tokens", type=int, help="default on a GPU: so many that the logits are 2 GiB; else 8,192"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    loaded = load_tasks(args.data / "tasks", limit=args.limit, seed=args.seed)
    sources = {name: resolve(name) for name in args.models}
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        dense_source = resolve(args.dense or str(unpack(args.data / "model.tar.xz", Path(scratch))))
        dense = load_model(dense_source, device, torch.float32)
        tokenizer = load_tokenizer(args.tokenizer or dense_source.folder)
    vocabulary = dense.config.get_text_config().vocab_size
    batch_tokens = args.batch_tokens or (2**29 // vocabulary if device.type == "cuda" else BATCH_TOKENS)
    clock = time.perf_counter()
    judge = Judge(dense, tokenizer, loaded.tasks, batch_tokens=batch_tokens)
    print(f"dense: {time.perf_counter() - clock:.1f} s", flush=True)
    report: dict[str, Any] = {"environment": environment(), "dense": dense_source.name, "models": []}
    for name, source in sources.items():
        clock = time.perf_counter()
        results = judge(load_model(source, device, torch.float32))
        seconds = time.perf_counter() - clock
        report["models"].append({"model": name, "seconds": seconds, "tasks": [facts(r) for r in results]})
        (args.out / "tasks.json").write_text(json.dumps(report, indent=1))
        print(f"\n{name} ({seconds:.1f} s)\n\n{table(results)}\n", flush=True)
        for note in notes(results, loaded.skipped):
            print(note)


def unpack(archive: Path, folder: Path) -> Path:
    """The one model folder in the archive."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (model,) = folder.iterdir()
    return model


if __name__ == "__main__":
    main()
