"""A compressed folder in other forms."""

from pathlib import Path
from typing import Any

import torch

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
    with staged(out, overwrite=overwrite) as stage:
        write_folder(stage, model, source, extra)
        written = open_checkpoint(stage)
        write_manifest(stage, facts={"tool": "spectrim", "exported_from": source.name, **verdict_of(source)})
    return {"folder": str(out), "numbers": written.numel, "bytes": written.nbytes}


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
