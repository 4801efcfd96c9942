"""Write one tiny compressed folder for each layout of the present format version, with its logits.

    python tests/golden/make_folders.py          writes tests/golden/format-1/{factor,pivot,all-sizes}

Run once for a format version, when it is released; never again for an old one: what these files hold is what was
promised. A later spectrim must load them and give the same logits (tests/golden/test_folders.py).
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spectrim  # noqa: F401  registers the format
from spectrim.any_size_job import run_any_size
from spectrim.integrations.transformers import FORMAT_VERSION
from spectrim.job import run
from spectrim.request import Request

HERE = Path(__file__).parent
SIZES = (1.0, 0.8, 0.65, 0.5)
SOURCE = "golden-source"
LOGITS = "logits.safetensors"
"""Beside the folder, not in it: the folder's manifest lists all that it may hold."""


def token_ids() -> torch.Tensor:
    """Twelve tokens, three windows."""
    return (torch.arange(36) * 7 % 64).view(3, 12)


def source(folder: Path) -> None:
    """A random Llama of two blocks, with biases and grouped queries."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, initializer_range=0.15,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)


def request(method: str, keep: float, **more) -> Request:
    """On text that the model writes itself: no tokenizer is stored."""
    return Request(
        model=SOURCE, keep=keep, method=method, calib="self", calib_windows=16, calib_length=32, eval="none", **more
    )


def logits_of(folder: Path, **options) -> torch.Tensor:
    """What plain transformers gives."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits.contiguous()


def main() -> None:
    """All layouts of this format version; refuses to overwrite."""
    target = (HERE / f"format-{FORMAT_VERSION}").resolve()
    if target.exists():
        sys.exit(f"{target} exists: golden folders are written once for a format version and kept for ever")
    target.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the source's name is then the same on every machine
        source(Path(SOURCE))
        run(request("svd", 0.7), target / "factor")
        run(request("two-sided", 0.6, options={"storage": "pivot"}), target / "pivot")
        run_any_size(request("two-sided", 0.8, any_size=True, anchors=(0.8, 0.5)), target / "all-sizes")
    for name in ("factor", "pivot"):
        save_file({"logits": logits_of(target / name)}, target / f"{name}.{LOGITS}")
    by_size = {f"{size:g}": logits_of(target / "all-sizes", size_ratio=size) for size in SIZES}
    save_file({"logits": logits_of(target / "all-sizes"), **by_size}, target / f"all-sizes.{LOGITS}")


if __name__ == "__main__":
    main()
