"""A model as a graph for a runtime of its own: load in float32, write, run what was written, compare, publish.

One way for every runtime (onnx.py, executorch.py); what is theirs is in `Graph`. A graph whose logits disagree with the
model's is not published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.integrations.export import verdict_of, without_code
from spectrim.integrations.folder import COMPANIONS
from spectrim.models.load import Source, context_length, load_model, one_line
from spectrim.models.walk import weight_of
from spectrim.store import copy_companions, preflight, read_json, staged, write_json, write_manifest

ALLOWED = 1e-3
"""Norm of the logits' difference over their norm; float32 gives some 1e-6."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A runtime and how it takes models."""

    to: str  # the name of `--to`, which is that of the extra
    runtime: str
    file: str
    missing: list[str]  # packages that it needs and that are not there
    write: Callable[[PreTrainedModel, Path], None]  # what this raises is said to be the exporter's
    logits: Callable[[Path, Tensor], Tensor]  # of token ids (B, T), by the runtime, from the written file
    probe: tuple[int, int]  # rows and tokens that are compared; other ones than were traced
    remedy: str


def export_graph(
    graph: Graph, source: Source, out: Path, *, size: float | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write the folder and give back its facts, the measured error among them; `size` as in `load_model`."""
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=4 * source.checkpoint.numel)
    if graph.missing:
        raise UsageError(f"--to {graph.to} needs {', '.join(graph.missing)}: pip install 'spectrim[{graph.to}]'")
    model = load_model(source, torch.device("cpu"), torch.float32, size=size)
    numbers = model.num_parameters()
    with staged(out, overwrite=overwrite) as stage:
        ids = sample_ids(model, *graph.probe)
        with torch.no_grad():  # before exporters work on the model
            expected = model(input_ids=ids, use_cache=False).logits
        try:
            graph.write(model, stage / graph.file)
        except ImportError as error:  # a package of the exporter's that is missing or too old
            raise UsageError(f"--to {graph.to}: {one_line(error)}; pip install -U 'spectrim[{graph.to}]'") from error
        except Exception as error:  # exporters raise what they like
            raise InputError(
                f"{source.name}: {graph.runtime}'s exporter cannot export {type(model).__name__} ({one_line(error)}); "
                f"use {graph.remedy}"
            ) from error
        error = relative_error(graph.logits(stage / graph.file, ids), expected)
        if not error <= ALLOWED:  # NaN too
            raise NumericalError(
                f"{source.name}: {graph.runtime}'s logits differ by {error:.2g} of their norm from the model's, "
                f"allowed is {ALLOWED:g}; nothing was written. Use {graph.remedy}"
            )
        facts = {"tool": "spectrim", "exported_from": source.name, **verdict_of(source)}
        copy_companions(source.folder, stage, COMPANIONS)
        write_config(source.folder, stage)
        write_json(stage / "report.json", {**facts, "error": error, "graph": graph.file})
        write_manifest(stage, facts=facts)
        bytes_ = sum(path.stat().st_size for path in stage.glob(f"{graph.file}*"))
    return {"folder": str(out), "numbers": numbers, "bytes": bytes_, "error": error}


def write_config(folder: Path, stage: Path) -> None:
    """config.json as it is, but for the code of a portable folder, which is not there."""
    config = read_json(folder / "config.json")
    left = without_code(config.get("auto_map"))
    if left == config.get("auto_map", {}):
        copy_companions(folder, stage, ("config.json",))
    else:
        kept = {key: value for key, value in config.items() if key != "auto_map"}
        write_json(stage / "config.json", {**kept, **({"auto_map": left} if left else {})})


def sample_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids (B, T) that the model knows, the same each time."""
    rows = len(weight_of(cast(nn.Module, model.get_input_embeddings())))
    length = min(length, context_length(model.config) or length)
    return (torch.arange(batch * length) * 7919 % rows).view(batch, length)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """`||found - expected|| / ||expected||`."""
    return float((found - expected).norm() / expected.norm())
