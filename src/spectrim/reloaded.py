"""A written folder gives the logits that the model had before: checked in a process that knows nothing of the run."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.errors import InputError, NumericalError
from spectrim.processes import environment_of_one

LOGIT_TOLERANCE = 1e-3
"""Largest difference between the logits before saving and after reloading, relative to the largest logit."""


def reload_difference(folder: Path, model: PreTrainedModel, *, allow_nonfinite: bool = False) -> float:
    """Largest logit difference, relative, between `model` and `folder` loaded in a fresh process.

    Logits that are not finite are an error; where they are allowed they must be the same ones on both sides.
    """
    ids = few_tokens(model)
    with torch.no_grad():
        here = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    return difference_of(folder, here, logits_elsewhere(folder, ids, model.device), allow_nonfinite=allow_nonfinite)


def few_tokens(model: PreTrainedModel) -> Tensor:
    """The tokens (1, S) that are compared."""
    return torch.arange(16)[None] * 7919 % model.config.get_text_config().vocab_size


def difference_of(folder: Path, here: Tensor, there: Tensor, *, allow_nonfinite: bool = False) -> float:
    """Largest difference, relative, between logits (1, S, V) in memory and those of the written folder."""
    bad = ~torch.isfinite(there)
    if there.shape != here.shape or (bool(bad.any()) and not (allow_nonfinite and torch.equal(bad, ~here.isfinite()))):
        raise NumericalError(f"{folder}: the reloaded model gives logits of shape {tuple(there.shape)} or not finite")
    here, there = here.masked_fill(bad, 0), there.masked_fill(bad, 0)
    difference = float((here - there).abs().max() / here.abs().max().clamp(min=1e-30))
    if not difference <= LOGIT_TOLERANCE:  # also where NaN came before saving
        raise NumericalError(
            f"the reloaded model's logits differ by {difference:.2e} (relative), allowed {LOGIT_TOLERANCE:.0e}; "
            "nothing was published. This is a bug of spectrim or of this transformers version, please report it"
        )
    return difference


def logits_elsewhere(folder: Path, ids: Tensor, device: torch.device, *, streamed: bool = False) -> Tensor:
    """Logits (1, S, V) in float32 of `folder`, loaded by a process that is started for it; block by block if asked."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"ids": ids}, Path(scratch) / "in.safetensors")
        command = [sys.executable, "-m", "spectrim.integrations.reload", str(folder), scratch, str(device)]
        command += ["streamed"] if streamed else []
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_of_one())
        if done.returncode != 0:
            raise InputError(
                f"{folder}: the written folder cannot be loaded in a fresh process:\n{done.stderr.strip()[-2000:]}"
            )
        return load_file(Path(scratch) / "out.safetensors")["logits"]
