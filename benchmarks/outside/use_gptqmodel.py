"""GPTQModel, the successor of AutoGPTQ: GPTQ, symmetric, groups of 128."""

from driver import Job, Made, main, plain
from gptqmodel import GPTQModel, QuantizeConfig
from torch import nn


def quantise(job: Job) -> Made:
    """As in its README."""
    settings = {"bits": job.bits, "group_size": 128}
    tool = GPTQModel.load(str(job.model), QuantizeConfig(**settings))
    tool.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.ids.tolist()], batch_size=8)
    return Made(tool.model, settings, lambda: tool.save(str(job.saved)))


def own(job: Job) -> nn.Module:
    """As in its README."""
    return GPTQModel.load(str(job.saved)).model


if __name__ == "__main__":
    main("gptqmodel", quantise, {"own": own, "plain": plain})
