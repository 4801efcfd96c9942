"""Load a folder in a process of its own and write its logits.

    python -m spectrim.integrations.reload DIR SCRATCH DEVICE

Nothing but `import spectrim` and plain `from_pretrained`: what a user's program would do.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spectrim.integrations.transformers import register


def main() -> None:
    """Read `in.safetensors` (ids), write `out.safetensors` (logits, float32)."""
    register()
    folder, scratch, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map=device).eval()
    ids = load_file(scratch / "in.safetensors")["ids"].to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float().cpu()
    save_file({"logits": logits.contiguous()}, scratch / "out.safetensors")


if __name__ == "__main__":
    main()
