"""Load a folder in a process of its own and write its logits.

    python -m spectrim.integrations.reload DIR SCRATCH DEVICE [streamed]

Nothing but `import spectrim` and plain `from_pretrained`: what a user's program would do. `streamed`: for models that
do not fit, one block at a time (models/streamed.py).
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spectrim.integrations.transformers import register
from spectrim.models.load import resolve
from spectrim.models.streamed import open_streamed


def main() -> None:
    """Read `in.safetensors` (ids), write `out.safetensors` (logits, float32)."""
    register()
    folder, scratch, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if sys.argv[4:] == ["streamed"]:
        source = resolve(folder)
        model = open_streamed(source, torch.device(device), source.dtype).model
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map=device).eval()
    ids = load_file(scratch / "in.safetensors")["ids"].to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().cpu()
    save_file({"logits": logits.contiguous()}, scratch / "out.safetensors")


if __name__ == "__main__":
    main()
