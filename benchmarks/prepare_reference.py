"""Pack the reference model and seeded token windows into one small folder, for a machine without the texts.

    python benchmarks/prepare_reference.py --shared ../shared --out .carry

Writes `model.xz` (the folder's files; bf16 bytes split into high and low halves, which lets them compress),
`calibration.xz` (windows of 512 tokens drawn at random places of the training text: the first 256 are used for
statistics, all for training) and `evaluation.xz` (the first 300 windows of each held-out file).
"""

import argparse
import lzma
import pickle
import random
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

WINDOW = 512
EVALUATION = {"wikitext2": "wikitext2.test.raw.txt", "valid.wiki": "valid.wiki.txt", "novels": "valid.novels.txt"}


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
    encoded = tokenizer._tokenizer.encode_batch(pieces, add_special_tokens=False)
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in encoded])


def random_windows(tokenizer: PreTrainedTokenizerFast, text: str, count: int, seed: int) -> np.ndarray:
    """`count` windows that start at a line break after a random place and cross no document border."""
    rng = random.Random(seed)
    windows: list[list[int]] = []
    while len(windows) < count:
        starts = [text.find("\n", rng.randrange(len(text) - 10_000)) + 1 for _ in range(1024)]
        pieces = [text[s : s + 3500] for s in starts]
        pieces = [p for p in pieces if "<|endoftext|>" not in p]
        for e in tokenizer._tokenizer.encode_batch(pieces, add_special_tokens=False):
            if len(e.ids) > WINDOW:
                windows.append(e.ids[:WINDOW])
    return np.array(windows[:count], dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", default="ref-llama-24m")
    parser.add_argument("--windows", type=int, default=6144)
    parser.add_argument("--out", type=Path, default=Path(".carry"))
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    folder = args.shared / "models" / args.model
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    files = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        files[path.name] = (data[0::2], data[1::2]) if path.suffix == ".safetensors" else data
    with lzma.open(args.out / "model.xz", "wb", preset=1) as f:
        pickle.dump(files, f)
    text = lzma.open(args.shared / "data/text/train.txt.xz", "rt", encoding="utf-8").read()
    with lzma.open(args.out / "calibration.xz", "wb", preset=1) as f:
        np.save(f, random_windows(tokenizer, text, args.windows, seed=0))
    evaluation = {}
    for name, file in EVALUATION.items():
        ids = encode(tokenizer, (args.shared / "data/text" / file).read_text(encoding="utf-8"))
        count = min(300, len(ids) // WINDOW)
        evaluation[name] = ids[: count * WINDOW].reshape(count, WINDOW)
    with lzma.open(args.out / "evaluation.xz", "wb", preset=1) as f:
        pickle.dump(evaluation, f)
    for path in sorted(args.out.iterdir()):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
