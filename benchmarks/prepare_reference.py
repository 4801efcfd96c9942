"""Pack a reference model and token windows into one small folder, for a machine without the texts.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry

Writes `model.tar.xz` (the model's folder), `training.txt.xz` (the head of the training text: 32,700 windows of 512
tokens, 256 for statistics, the rest for learning), `<name>.npy` (the first 300 windows of each held-out file) and
`tasks/<name>.jsonl.xz` (whole task files, for benchmarks/tasks.py).
"""

import argparse
import lzma
import tarfile
from pathlib import Path

import numpy as np
from reference_data import WINDOW, cut, tokens_of

from spectrim.data import load_tokenizer

TRAINING_CHARS = 63_600_000
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
        text = file.read(TRAINING_CHARS)
    with lzma.open(args.out / "training.txt.xz", "wt", encoding="utf-8") as file:
        file.write(text)
    for name, file_name in EVALUATION.items():
        text = (args.shared / "data/text" / file_name).read_text(encoding="utf-8")
        windows = cut(tokens_of(tokenizer, text, EVALUATION_WINDOWS * WINDOW), EVALUATION_WINDOWS)
        np.save(args.out / f"{name}.npy", windows)
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
