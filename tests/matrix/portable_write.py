"""Writes portable folders, and beside each the tokens and logits that spectrim gives; portable_read.py compares.

python tests/matrix/portable_write.py WHERE        where spectrim is installed
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import spectrim
from command_line import call, small_model

PROMPT = torch.tensor([[510, 2290, 281, 262, 1099]])
NEW_TOKENS = 16


def write(where: Path, name: str, source: str, storage: str) -> None:
    small = spectrim.compress(
        source, keep=0.7, method="svd", options={"storage": storage}, eval="none", calib_windows=2, calib_length=32
    )
    folder = small.save_pretrained(where / f"{name}-made")
    answer = call("export", folder, "--to", "portable", "--out", where / name)
    assert answer.code == 0, answer.err
    model: Any = spectrim.load(folder, device="cpu").float()
    with torch.no_grad():
        tokens = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        logits = model(input_ids=tokens, use_cache=False).logits
    save_file({"tokens": tokens, "logits": logits.contiguous()}, where / f"{name}.safetensors")


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.mkdir(parents=True)
    for storage in ("factor", "pivot"):
        write(where, storage, "builtin:tiny", storage)
    bases = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0}
    write(where, "rotary", str(small_model(where / "rotary-dense", rope_parameters=bases)), "pivot")
