"""The command line called inside the test's own process, and small model folders to call it on."""

import functools
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import spectrim
from spectrim import cli

TINY = Path(spectrim.__file__).parent / "assets" / "tiny"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARY = 512
"""Tokens of small models. Their logits, and training on them, cost sixteen times less than with all 8,192."""
QUICK = ("--calib-windows", "8", "--calib-length", "64", "--eval-windows", "2")
"""Options of `compress` that keep a run short."""
PLAIN = (*QUICK, "--eval", "none")


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out, self.err
        return json.loads(self.out)

    @property
    def message(self) -> str:
        """The error without the frame that typer draws and without line breaks."""
        return " ".join("".join(c for c in self.err if c not in "│╭╮╰╯─").split())


def call(*arguments: object) -> Answer:
    """`spectrim ARGUMENTS` through the entry point itself, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["spectrim", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


def small_model(folder: Path, *, tokenizer: bool = True, seed: int = 0, **config: Any) -> Path:
    """A random Llama of two blocks, 32 wide, with the first tokens of the embedded model: compressed in a second."""
    values = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**values, **config})).save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.json").write_text(small_tokenizer())
        shutil.copyfile(TINY / "tokenizer_config.json", folder / "tokenizer_config.json")
    return folder


@functools.cache
def small_tokenizer() -> str:
    """The embedded model's tokenizer.json with its first tokens: the special ones, all bytes, some 250 merges."""
    whole = json.loads((TINY / "tokenizer.json").read_text())
    model = whole["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocabulary]
    assert len(merges) + 258 == len(vocabulary) == VOCABULARY
    return json.dumps({**whole, "model": {**model, "vocab": vocabulary, "merges": merges}})


def small_text(path: Path) -> Path:
    """A text of some 7,000 tokens; the built-in one takes a second to tokenise."""
    path.write_text(Path(json.__file__).read_text() + Path(json.__file__).with_name("decoder.py").read_text())
    return path


def shortest_run(where: Path, **config: Any) -> list[str]:
    """The words of a run of a second: one block, no training, a state saved whenever it may be."""
    return [
        *(
            "compress",
            str(small_model(where / "model", num_hidden_layers=1, **config)),
            "--method",
            "svd-llm",
            "--eval",
            "none",
        ),
        *("--calib", str(small_text(where / "text.txt")), "--calib-windows", "4", "--calib-length", "16"),
        *("--save-every", "0"),
    ]


def change_weights(folder: Path, prefix: str, change: Callable[[torch.Tensor], object]) -> Path:
    """Apply `change` in place to the tensors of the single weights file in `folder` whose names start so."""
    tensors = load_file(folder / "model.safetensors")
    chosen = [name for name in tensors if name.startswith(prefix)]
    assert chosen, prefix
    for name in chosen:
        change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Overwrite fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
