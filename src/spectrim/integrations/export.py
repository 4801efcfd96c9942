"""A compressed folder in other forms."""

from pathlib import Path
from typing import Any

import torch

from spectrim.errors import UsageError
from spectrim.integrations.folder import write_folder
from spectrim.integrations.transformers import detach, make_dense
from spectrim.models.load import Source, load_model
from spectrim.store import open_checkpoint, preflight, staged, write_manifest


def export_dense(source: Source, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Multiply the factors back and write an ordinary folder that loads without spectrim."""
    if not source.is_compressed:
        raise UsageError(f"{source.name}: not a spectrim folder; it is dense already")
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=2 * source.checkpoint.nbytes)
    model = load_model(source, torch.device("cpu"))
    make_dense(model, source.dtype)
    detach(model)
    with staged(out, overwrite=overwrite) as stage:
        write_folder(stage, model, source.folder)
        written = open_checkpoint(stage)
        write_manifest(stage, facts={"tool": "spectrim", "exported_from": source.name})
    return {"folder": str(out), "numbers": written.numel, "bytes": written.nbytes}
