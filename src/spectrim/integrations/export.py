"""A compressed folder in other forms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.errors import UsageError
from spectrim.integrations.folder import write_folder
from spectrim.integrations.transformers import detach, make_dense
from spectrim.models.load import Source, load_model, meta_model, quantization_of
from spectrim.models.walk import find_layers
from spectrim.store import (
    Checkpoint,
    TensorInfo,
    open_checkpoint,
    preflight,
    read_json,
    staged,
    write_json,
    write_manifest,
)
from spectrim.store.manifest import MANIFEST

CODE = "modeling_spectrim.py"
"""The code in a portable folder, which no other form carries."""


def export_dense(source: Source, out: Path, *, size: float | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Multiply the factors back and write an ordinary folder that loads without spectrim; `size` as in `load_model`."""
    if not source.is_compressed:
        raise UsageError(f"{source.name}: not a spectrim folder; it is dense already")
    refuse_new_biases(source)
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=2 * source.checkpoint.nbytes)
    extra: dict[str, TensorInfo] = {}
    model = load_model(source, torch.device("cpu"), size=size, extra=extra)
    make_dense(model, source.dtype)
    detach(model)
    forget_code(model)
    with staged(out, overwrite=overwrite) as stage:
        write_folder(stage, model, source, extra)
        written = open_checkpoint(stage)
        write_manifest(stage, facts={"tool": "spectrim", "exported_from": source.name, **verdict_of(source)})
    return {"folder": str(out), "numbers": written.numel, "bytes": written.nbytes}


def forget_code(model: PreTrainedModel) -> None:
    """A model of a portable folder no longer names the code there, which is not written with it."""
    config: Any = model.config  # whose classes do not all declare the field
    known = getattr(config, "auto_map", None)
    left = without_code(known)
    if left:
        config.auto_map = left
    elif known is not None:
        del config.auto_map


def without_code(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an `auto_map` that name no class of our file, which may follow a repository (`USER/NAME--`)."""
    ours = CODE.removesuffix(".py")
    return {key: name for key, name in (auto_map or {}).items() if str(name).split("--")[-1].split(".")[0] != ours}


def refuse_new_biases(source: Source) -> None:
    """An ordinary folder has no place for a bias that the architecture lacks; loading would drop it without a word."""
    modules = quantization_of(source.config).get("modules") or {}
    new = [
        layer.name
        for layer in find_layers(meta_model(source.config)).layers
        if not layer.has_bias and modules.get(layer.name, {}).get("bias")
    ]
    if new:
        raise UsageError(
            f"{source.name}: {len(new)} layers have a bias that the architecture has no place for (first: {new[0]}); "
            "no dense folder can hold this model; compress again with a method that adds no bias (svd-llm)"
        )


def export_size(source: Source, out: Path, *, size: float, overwrite: bool = False) -> dict[str, Any]:
    """Write one size of a folder that holds all sizes as an ordinary compressed folder of that size."""
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=source.checkpoint.nbytes)
    extra: dict[str, TensorInfo] = {}
    model = load_model(source, torch.device("cpu"), size=size, extra=extra)
    forget_code(model)
    with staged(out, overwrite=overwrite) as stage:
        write_folder(stage, model, source, extra)
        written = open_checkpoint(stage)
        facts = {"tool": "spectrim", "exported_from": source.name, "size_ratio": size}
        stored = stored_share(source, written)
        report = {**facts, "method": quantization_of(source.config).get("method"), "stored": stored}
        write_json(stage / "report.json", report)
        write_manifest(stage, facts={**facts, "quality_gate": {"passed": None}})  # this size was not judged
    return {"folder": str(out), "numbers": written.numel, "bytes": written.nbytes, **report}


def verdict_of(source: Source) -> dict[str, Any]:
    """What the manifest of the source says about its quality: an export is no better."""
    path = source.folder / MANIFEST
    verdict = read_json(path).get("quality_gate") if path.is_file() else None
    return {} if verdict is None else {"quality_gate": verdict}


def stored_share(source: Source, written: Checkpoint) -> dict[str, Any]:
    """Numbers of the decoder linears and of the whole model, counted from the written headers."""
    walk = find_layers(meta_model(source.config))
    prefixes = tuple(layer.name + "." for layer in walk.layers)
    after = sum(info.numel for name, info in written.tensors.items() if name.startswith(prefixes))
    return {
        "linear_numbers_dense": walk.numbers,
        "linear_numbers": after,
        "keep": after / walk.numbers,
        "model_numbers": written.numel,
        "model_bytes": written.nbytes,
    }
