"""The dense export, as far as it can be followed towards GGUF without llama.cpp: every tensor has a name there.

llama.cpp's converter is in no Python package. Its table of names is, in `gguf`; a tensor without an entry is what it
stops at ("Can not map tensor"). Skipped where `gguf` is not installed; `make matrix` installs it.
"""

from typing import Any

import pytest
from safetensors import safe_open

import spectrim
from command_line import call
from tiny_models import tiny, token_ids

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
