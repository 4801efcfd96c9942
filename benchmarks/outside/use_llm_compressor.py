"""llm-compressor: GPTQ, symmetric, groups of 128; variant `awq`: AWQ, asymmetric, as in its examples."""

from typing import Any

import torch
from driver import Job, Made, main, plain, stand_in_for_datasets
from torch.utils.data import DataLoader

stand_in_for_datasets()
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402

GROUP = 128


def recipe_of(job: Job) -> tuple[list[Any], dict[str, Any]]:
    """Modifiers, and what they are in words; W4A16 is a preset, other bits are written out in the same form."""
    if job.variant == "awq":
        from llmcompressor.modifiers.awq import AWQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        scheme = {"targets": "Linear", "scheme": "W4A16_ASYM", "ignore": ["lm_head"]}
        return [AWQModifier(), QuantizationModifier(**scheme)], {"modifier": "AWQ", **scheme}
    if job.bits == 4:
        scheme = {"targets": "Linear", "scheme": "W4A16", "ignore": ["lm_head"]}
        return [GPTQModifier(**scheme)], {"modifier": "GPTQ", **scheme}
    weights = QuantizationArgs(num_bits=job.bits, type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])], {"modifier": "GPTQ", "weights": repr(weights)}


def quantise(job: Job) -> Made:
    """`oneshot` on all windows."""
    recipe, words = recipe_of(job)
    windows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in job.ids]
    model = job.load()
    oneshot(
        model=model, dataset=DataLoader(windows), recipe=recipe, max_seq_length=job.ids.shape[1],
        num_calibration_samples=len(windows),
    )  # fmt: skip
    return Made(model, words, lambda: model.save_pretrained(str(job.saved), save_compressed=True))


if __name__ == "__main__":
    main("llmcompressor", quantise, {"plain": plain})
