"""optimum-quanto: rounding without data, groups of 128; every call is that of its README."""

import optimum.quanto
from driver import Job, Made, main, plain
from optimum.quanto import QuantizedModelForCausalLM
from torch import nn


def quantise(job: Job) -> Made:
    """`quantize` and `save_pretrained`."""
    kind = f"qint{job.bits}"
    model = job.load()
    wrapped = QuantizedModelForCausalLM.quantize(model, weights=getattr(optimum.quanto, kind), exclude="lm_head")
    return Made(model, {"weights": kind, "exclude": "lm_head"}, lambda: wrapped.save_pretrained(str(job.saved)))


def own(job: Job) -> nn.Module:
    """`from_pretrained` of the same class."""
    return QuantizedModelForCausalLM.from_pretrained(str(job.saved)).to(job.device)


if __name__ == "__main__":
    main("optimum-quanto", quantise, {"own": own, "plain": plain})
