"""bitsandbytes: blocks of 64 weights in a table of 16 values, by way of transformers.

The default table is `fp4`; variant `nf4` is QLoRA's.
"""

from driver import Job, Made, main, plain
from transformers import BitsAndBytesConfig


def quantise(job: Job) -> Made:
    """Layers in few bits as the model is loaded."""
    options = {"load_in_4bit": True} | ({"bnb_4bit_quant_type": job.variant} if job.variant else {})
    model = job.load(quantization_config=BitsAndBytesConfig(**options))
    return Made(model, options, lambda: model.save_pretrained(str(job.saved)))


if __name__ == "__main__":
    main("bitsandbytes", quantise, {"plain": plain})
