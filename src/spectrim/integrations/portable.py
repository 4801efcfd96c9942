"""A folder that loads with `trust_remote_code=True` where spectrim is not installed: the model and its own code.

With spectrim imported the same folder loads natively, and its code is not run.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from spectrim.errors import UsageError
from spectrim.integrations.export import CODE, verdict_of
from spectrim.integrations.folder import write_folder
from spectrim.integrations.portable_model import CODECS
from spectrim.integrations.transformers import SpectrimConfig, attach
from spectrim.models.load import Source, load_model
from spectrim.nn.codecs import StoredLinear
from spectrim.store import TensorInfo, open_checkpoint, preflight, staged, write_manifest, write_text


def export_portable(source: Source, out: Path, *, size: float | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the model with the code of its layers beside it; `size` as in `load_model`."""
    if not source.is_compressed:
        raise UsageError(f"{source.name}: not a spectrim folder; it loads everywhere already")
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=source.checkpoint.nbytes)
    extra: dict[str, TensorInfo] = {}
    model = load_model(source, torch.device("cpu"), size=size, extra=extra)
    code = code_for(model, source.name)
    model.config.auto_map = {"AutoModelForCausalLM": f"{CODE.removesuffix('.py')}.{class_name(model)}"}
    attach(model, with_paths_of(model))
    with staged(out, overwrite=overwrite) as stage:
        write_folder(stage, model, source, extra)
        write_text(stage / CODE, code)
        written = open_checkpoint(stage)
        write_manifest(stage, facts={"tool": "spectrim", "exported_from": source.name, **verdict_of(source)})
    return {"folder": str(out), "numbers": written.numel, "bytes": written.nbytes}


def class_name(model: PreTrainedModel) -> str:
    """Of the class in the folder's code."""
    return f"Spectrim{type(model).__name__}"


def code_for(model: PreTrainedModel, name: str) -> str:
    """The file that stands in the folder: our layers, and a class of this model's architecture."""
    used = {module.codec for module in model.modules() if isinstance(module, StoredLinear)}
    if other := sorted(used - CODECS.keys()):
        raise UsageError(
            f"{name}: holds layers stored as {', '.join(other)}, whose code is too long to carry in a folder; portable "
            f"folders hold {' and '.join(sorted(CODECS))}. Use --to dense, or load it with spectrim installed"
        )
    base = type(model).__name__
    if not hasattr(transformers, base):
        raise UsageError(f"{name}: transformers offers no class {base} that a folder's own code could build on")
    layers = (files("spectrim") / "integrations" / "portable_model.py").read_text(encoding="utf-8")
    return (
        f"{layers}\n\nfrom transformers import {base}  # noqa: E402  all above is the same in every folder\n\n\n"
        f'class {class_name(model)}(Portable, {base}):\n    """{base} with low-rank layers."""\n'
    )


def with_paths_of(model: PreTrainedModel) -> SpectrimConfig:
    """What config.json says, with layers named as in this model: a list may come from one without a head."""
    known = model.config.quantization_config
    modules = {name: module.entry() for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    return SpectrimConfig(modules=modules, format_version=known.format_version, **known.information)
