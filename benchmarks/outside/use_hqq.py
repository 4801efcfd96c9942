"""HQQ: half-quadratic rounding without data; groups of 64 as in its README."""

import torch
from driver import Job, Made, main, plain
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from torch import nn


def quantise(job: Job) -> Made:
    """As `AutoHQQHFModel` is used in the README, which leaves the head alone."""
    settings = {"nbits": job.bits, "group_size": 64}
    model = job.load()
    AutoHQQHFModel.quantize_model(
        model, quant_config=BaseQuantizeConfig(**settings), compute_dtype=torch.bfloat16, device=job.device
    )
    return Made(model, settings, lambda: AutoHQQHFModel.save_quantized(model, str(job.saved)))


def own(job: Job) -> nn.Module:
    """Its own loader."""
    return AutoHQQHFModel.from_quantized(str(job.saved), compute_dtype=torch.bfloat16, device=job.device)


if __name__ == "__main__":
    main("hqq", quantise, {"own": own, "plain": plain})
