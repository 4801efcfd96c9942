"""vLLM itself, on the CPU: it finds the plugin by its entry point and writes what transformers writes.

    tests/matrix/run.sh vllm        makes an environment with vLLM and runs this file in it

Skipped where vLLM is not installed; the arithmetic of fused and split layers is in tests/unit/test_serving.py.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim
from command_line import TINY

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PROMPTS = ["The history of the city", "def read(path):", "In 1914 the"]
NEW_TOKENS = 16


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu() -> None:
    """In this process, whose memory and cores it must not take whole."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def compress(folder: Path, method: str, **options: Any) -> Path:
    """The embedded model and its tokenizer, some layers dense."""
    small = spectrim.compress(
        "builtin:tiny", keep=0.8, method=method, options=options, eval="none", calib_windows=16, calib_length=64
    )
    small.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def by_transformers(folder: Path) -> list[list[int]]:
    words, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    found = []
    for prompt in PROMPTS:
        ids = words(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids))
        found.append(new[0, ids.shape[1] :].tolist())
    return found


def by_vllm(folder: Path, **options: Any) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    engine = LLM(model=str(folder), dtype="float32", max_model_len=64, max_num_seqs=4, seed=0, **options)
    asked = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    return [list(answer.outputs[0].token_ids) for answer in engine.generate(PROMPTS, asked, use_tqdm=False)]


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_the_same_greedy_text_as_transformers(storage, tmp_path):
    """Ranks by global allocation: different in every part of every fused layer."""
    folder = compress(tmp_path / "small", "two-sided", storage=storage)
    assert by_vllm(folder, enforce_eager=True) == by_transformers(folder)


def test_with_vllms_compiler(tmp_path):
    """Without `enforce_eager`: the model is traced as one graph and compiled: minutes, with a C++ compiler."""
    folder = compress(tmp_path / "small", "two-sided", storage="pivot")
    assert by_vllm(folder) == by_transformers(folder)


def test_two_processes_that_share_every_layer(tmp_path, monkeypatch):
    """Tensor parallelism: outputs of q, k, v, gate and up are cut, inputs of o and down."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = compress(tmp_path / "small", "two-sided", storage="pivot")
    found = by_vllm(folder, enforce_eager=True, tensor_parallel_size=2)
    assert found == by_transformers(folder)


def test_a_folder_of_another_storage_is_refused_with_what_to_do(tmp_path):
    folder = compress(tmp_path / "small", "rtn", group_size=16)
    with pytest.raises(Exception, match=r"layers stored as packed are not served.*--to dense"):
        by_vllm(folder, enforce_eager=True)
