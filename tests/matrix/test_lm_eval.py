"""lm-evaluation-harness as a program that never imports spectrim: `python -m spectrim.run -m lm_eval ...`.

The task and its data are local files, so that no hub is asked. Skipped where lm_eval (extra `eval`) is not installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import spectrim
from command_line import TINY, TOKENIZER_FILES, call

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS = [
    {"question": "The history of the", "choices": [" city", " of", " banana"], "gold": 0},
    {"question": "In the United", "choices": [" States", " for", " Kingdoms"], "gold": 0},
    {"question": "import", "choices": [" os", " the", " was"], "gold": 0},
    {"question": "He was born in", "choices": [" and", " London", " 1"], "gold": 1},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@torch.no_grad()
def accuracy_by_hand(folder: Path) -> float:
    words, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    right = 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            start = len(words(row["question"])["input_ids"])
            ids = words(row["question"] + choice, return_tensors="pt")["input_ids"]
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            scores.append(float(log_p[start - 1 :].sum()))
        right += scores.index(max(scores)) == row["gold"]
    return right / len(ROWS)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)


def test_the_harness_scores_a_compressed_folder(tmp_path):
    small = spectrim.compress(
        "builtin:tiny", keep=0.8, method="svd-llm", eval="none", calib_windows=16, calib_length=64
    )
    folder = small.save_pretrained(tmp_path / "small")
    for name in TOKENIZER_FILES:
        (folder / name).write_bytes((TINY / name).read_bytes())
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    asked = (
        *("-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--device", "cpu"),
        *("--tasks", "local_choice", "--include_path", tmp_path / "tasks", "--output_path", tmp_path / "out"),
    )
    done = run("-m", "spectrim.run", *asked)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]["local_choice"]["acc,none"]
    assert found == accuracy_by_hand(folder)
    ours = ("--lm-eval", "local_choice", "--lm-eval-include", tmp_path / "tasks", "--windows", 1, "--length", 32)
    answer = call("eval", folder, *ours, "--device", "cpu", "--no-speed", "--json")
    assert answer.code == 0, answer.err
    assert f'"value": {found}' in answer.out
