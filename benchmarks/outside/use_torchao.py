"""torchao, by way of transformers, which can save what it makes.

4 bits on a GPU: the call of its README. Elsewhere, and for 3 and 2 bits, which that call does not have: its portable
`IntxWeightOnlyConfig` in the same groups of 32, which stores a code in a byte.
"""

import torch
from driver import Job, Made, main, plain
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerGroup
from transformers import TorchAoConfig


def quantise(job: Job) -> Made:
    """Layers in few bits as the model is loaded."""
    if job.bits == 4 and job.device != "cpu":
        packed = {"int4_packing_format": "tile_packed_to_4d", "int4_choose_qparams_algorithm": "hqq"}
        how = Int4WeightOnlyConfig(group_size=32, **packed)
    else:
        how = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{job.bits}"), granularity=PerGroup(32))
    model = job.load(quantization_config=TorchAoConfig(how))
    return Made(model, {"config": repr(how)}, lambda: model.save_pretrained(str(job.saved)))


if __name__ == "__main__":
    main("torchao", quantise, {"plain": plain})
