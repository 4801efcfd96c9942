"""Pack a reference model and token windows into one small folder, for a machine without the texts.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry

Writes `model.tar.xz` (the model's folder), `training.npy` (the first 4,352 windows of 512 tokens of the training text,
in order: 256 for statistics, 4,096 for learning), `<name>.npy` (the first 300 windows of each held-out file) and
`tasks/<name>.jsonl.xz` (whole task files, for benchmarks/tasks.py).
"""

import argparse
import itertools
import lzma
import tarfile
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from spectrim.data import load_tokenizer

WINDOW = 512
TRAINING_WINDOWS = 256 + 4096
EVALUATION_WINDOWS = 300
EVALUATION = {"wikitext2": "wikitext2.test.raw.txt", "valid.wiki": "valid.wiki.txt", "novels": "valid.novels.txt"}
TASKS = ("blimp", "lambada", "piqa", "sciq", "arc_easy")


def pack_tasks(source: Path, out: Path) -> None:
    """Each of TASKS as .jsonl.xz in `out`, line by line what it is in `source` (.jsonl or .jsonl.xz)."""
    out.mkdir(exist_ok=True)
    for name in TASKS:
        packed = source / f"{name}.jsonl.xz"
        raw = lzma.decompress(packed.read_bytes()) if packed.exists() else (source / f"{name}.jsonl").read_bytes()
        (out / packed.name).write_bytes(lzma.compress(raw))


def windows_of(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> np.ndarray:
    """The first `count` non-overlapping windows, tokenised in pieces of 200,000 characters as in training."""
    ids: list[int] = []
    for start in range(0, len(text), 200_000):
        ids.extend(tokenizer(text[start : start + 200_000], add_special_tokens=False)["input_ids"])
        if len(ids) >= count * WINDOW:
            break
    count = min(count, len(ids) // WINDOW)
    return np.array(ids[: count * WINDOW], dtype=np.uint16).reshape(count, WINDOW)


def main() -> None:
    """Parse, pack, list what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", default="ref-llama-24m")
    parser.add_argument("--out", type=Path, default=Path(".carry"))
    parser.add_argument("--only-tasks", action="store_true", help="add the task files to an OUT that has the rest")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    pack_tasks(args.shared / "data/tasks", args.out / "tasks")
    if args.only_tasks:
        return
    folder = args.shared / "models" / args.model
    tokenizer = load_tokenizer(folder)
    with tarfile.open(args.out / "model.tar.xz", "w:xz", preset=1) as tar:
        tar.add(folder, arcname=args.model)
    with lzma.open(args.shared / "data/text/train.txt.xz", "rt", encoding="utf-8") as file:
        text = "".join(itertools.islice(iter(lambda: file.read(1_000_000), ""), 12))
    np.save(args.out / "training.npy", windows_of(tokenizer, text, TRAINING_WINDOWS))
    for name, file_name in EVALUATION.items():
        text = (args.shared / "data/text" / file_name).read_text(encoding="utf-8")
        np.save(args.out / f"{name}.npy", windows_of(tokenizer, text, EVALUATION_WINDOWS))
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
