"""Training of low-rank corrections beside frozen codes, against the dense model; used by `int2.1` and `lq-lora`."""

from typing import TYPE_CHECKING

from spectrim.engines.distil import train_in_place
from spectrim.model_method import Job, TrainedModelMethod
from spectrim.nn.packed import PackedLinear, TrainedPackedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_corrections(method: TrainedModelMethod, model: "PreTrainedModel", job: Job) -> list[float]:
    """`method.steps` steps of all corrections of `model`, in place; the losses. Codes, scales, biases stay."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLinear) and module.correction
    }
    assert layers, f"{method.info.name} must refuse, before it starts, to train corrections of rank 0"
    trained = {name: TrainedPackedLinear(layer, numbers=False) for name, layer in layers.items()}
    with job.timed("distil"):
        return train_in_place(
            model, job.dense, layers, trained, lambda name: trained[name].stored(layers[name]), job.training,
            advice=f"Lower the learning rate (--set learning_rate={method.learning_rate / 3:.2g})", steps=method.steps,
            batch_size=method.batch_size, learning_rate=method.learning_rate, seed=job.seed, stage="corrections",
            progress=job.progress, checkpoint=job.checkpoint,
        )  # fmt: skip
