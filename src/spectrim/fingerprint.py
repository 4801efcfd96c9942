"""What a run's numbers depend on, to be compared with what its states were made from."""

import dataclasses
from typing import Any

import torch
import transformers

from spectrim import version
from spectrim.method import Method
from spectrim.models.load import Source, pick_device
from spectrim.processes import present
from spectrim.request import Request
from spectrim.store.manifest import measure_file
from spectrim.windows_in_use import WindowsInUse

_NOT_COMPARED = {
    *("model", "tokenizer"),  # compared by content: files, tokens
    *("method", "preset", "options"),  # compared as the configured method
    *("eval", "eval_windows", "quality_gate"),  # no step sees them
    "device",  # compared by what it is
}


def fingerprint(request: Request, method: Method, source: Source) -> dict[str, Any]:
    """All that decides the numbers, as far as it is known before text is read; see also `text_fields`."""
    asked = {name: value for name, value in dataclasses.asdict(request).items() if name not in _NOT_COMPARED}
    files = [*source.checkpoint.shards, source.folder / "config.json"]
    return {
        "request": asked,
        "method": method.to_config(),
        "source": {path.name: measure_file(path, source.folder) for path in files},
        "spectrim": version.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device_name(pick_device(request.device)),
        "processes": present().world,
    }


def text_fields(texts: WindowsInUse) -> dict[str, Any]:
    """The part of the fingerprint that pins the tokens."""
    training = None if texts.training is None else texts.training.sha256
    return {"tokens": {"calibration": texts.calibration.sha256, "training": training}}


def device_name(device: torch.device) -> str:
    """What numbers depend on: the GPU's name; on a CPU its instruction set and the threads, which order sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
