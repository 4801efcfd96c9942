"""NVIDIA Model Optimizer: AWQ with its preset for 4 bits, saved in its own format."""

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from driver import Job, Made, main
from torch import nn

FILE = "modelopt.pt"


def quantise(job: Job) -> Made:
    """As in its README."""

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for batch in job.ids.split(8):
                model(batch.to(job.device))

    def save() -> None:
        job.saved.mkdir()
        mto.save(model, job.saved / FILE)

    model = mtq.quantize(job.load(), mtq.INT4_AWQ_CFG, calibrate)
    return Made(model, {"config": "INT4_AWQ_CFG"}, save)


def own(job: Job) -> nn.Module:
    """Its own loader, on the dense model."""
    return mto.restore(job.load(), job.saved / FILE)


if __name__ == "__main__":
    main("nvidia-modelopt", quantise, {"own": own})
