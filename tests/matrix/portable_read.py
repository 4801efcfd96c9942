"""Portable folders where spectrim is not installed: the same greedy tokens and logits as with it.

python tests/matrix/portable_read.py WHERE         where transformers is installed and spectrim is not
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ALLOWED = 1e-5


@torch.no_grad()
def read(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    kept = load_file(folder.with_suffix(".safetensors"))
    new = len(kept["tokens"][0]) - 5
    prompt = kept["tokens"][:, :5]
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    assert torch.equal(tokens, kept["tokens"]), (tokens, kept["tokens"])
    logits = model(input_ids=tokens, use_cache=False).logits
    error = float((logits - kept["logits"]).norm() / kept["logits"].norm())
    assert error < ALLOWED, error
    release = f"transformers {transformers.__version__}"
    print(f"{release}, {folder.name}: {new} greedy tokens alike, logits differ by {error:.1e}")


if __name__ == "__main__":
    assert find_spec("spectrim") is None, "spectrim is installed here: nothing would be shown"
    found = [path.with_suffix("") for path in sorted(Path(sys.argv[1]).glob("*.safetensors"))]
    assert len(found) == 3, found
    for folder in found:
        read(folder)
    print(f"{len(found)} passed, 0 failed")
