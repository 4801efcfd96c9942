"""auto-round: rounding learned block by block with signed gradients; 200 steps a block.

Variant `best`: its recipe `auto-round-best`, with the extension that the README recommends beside it for 2 bits.
"""

from typing import Any

from driver import Job, Made, main, plain, stand_in_for_datasets
from torch.utils.data import DataLoader

stand_in_for_datasets()
from auto_round import AutoRound  # noqa: E402

DEFAULTS: dict[str, Any] = {"iters": 200, "batch_size": 8}
BEST: dict[str, Any] = {"iters": 1000, "batch_size": 8}
"""The recipe `auto-round-best`; its 512 samples are the windows that there are."""


def quantise(job: Job) -> Made:
    """A scheme of the README, on the windows that all methods are given."""
    recipe = BEST | ({"enable_alg_ext": True} if job.bits == 2 else {}) if job.variant == "best" else DEFAULTS
    options = {**recipe, "scheme": f"W{job.bits}A16", "nsamples": len(job.ids), "seqlen": job.ids.shape[1]}
    tool = AutoRound(
        str(job.model), **options, device_map=job.device, dataset=DataLoader(job.ids, batch_size=recipe["batch_size"])
    )
    model, _ = tool.quantize()
    return Made(
        model.to(job.device), options, lambda: tool.save_quantized(output_dir=str(job.saved), format="auto_round")
    )


if __name__ == "__main__":
    main("auto-round", quantise, {"plain": plain})
