"""A folder for ONNX Runtime: the graph of one forward pass without a cache, its weights beside it, the error measured.

Each factor is a MatMul, the order of pivot outputs a Gather. What is written is run once by ONNX Runtime, on another
number of tokens than it was traced with, and compared with the model; a graph that disagrees is not published.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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

NEEDED = ("onnx", "onnxscript", "onnxruntime")
GRAPH = "model.onnx"
ALLOWED = 1e-3
"""Norm of the logits' difference over their norm; float32 gives some 1e-6."""


class Logits(nn.Module):
    """A model as a function of two tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Token ids and mask (B, T) to logits (B, T, vocabulary)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def export_onnx(source: Source, out: Path, *, size: float | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write `model.onnx` in float32 with its weights in `model.onnx.data`; `size` as in `load_model`.

    Inputs `input_ids` and `attention_mask` (batch, length), int64; output `logits` (batch, length, vocabulary).
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(f"--to onnx needs {', '.join(missing)}: pip install 'spectrim[onnx]'")
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=4 * source.checkpoint.numel)
    model = load_model(source, torch.device("cpu"), torch.float32, size=size)
    with staged(out, overwrite=overwrite) as stage:
        _write_graph(model, stage / GRAPH, source.name)
        error = graph_error(model, stage / GRAPH)
        if not error <= ALLOWED:  # NaN too
            raise NumericalError(
                f"{source.name}: ONNX Runtime's logits differ by {error:.2g} of their norm from the model's, allowed "
                f"is {ALLOWED:g}; nothing was written. Use --to dense, or another release of onnxscript"
            )
        facts = {"tool": "spectrim", "exported_from": source.name, **verdict_of(source)}
        copy_companions(source.folder, stage, COMPANIONS)
        _write_config(source.folder, stage)
        write_json(stage / "report.json", {**facts, "error": error, "graph": GRAPH})
        write_manifest(stage, facts=facts)
        bytes_ = sum(path.stat().st_size for path in stage.glob(f"{GRAPH}*"))
    return {"folder": str(out), "numbers": model.num_parameters(), "bytes": bytes_, "error": error}


def _write_config(folder: Path, stage: Path) -> None:
    """config.json as it is, but for the code of a portable folder, which is not there."""
    config = read_json(folder / "config.json")
    left = without_code(config.get("auto_map"))
    if left == config.get("auto_map", {}):
        copy_companions(folder, stage, ("config.json",))
    else:
        kept = {key: value for key, value in config.items() if key != "auto_map"}
        write_json(stage / "config.json", {**kept, **({"auto_map": left} if left else {})})


def _write_graph(model: PreTrainedModel, path: Path, name: str) -> None:
    """Trace, translate, save; batch and length stay free."""
    ids = sample_ids(model, 2, 8)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        with _quietly():
            program = torch.onnx.export(
                Logits(model), (ids, torch.ones_like(ids)), dynamo=True, dynamic_shapes=(free, free),
                input_names=["input_ids", "attention_mask"], output_names=["logits"],
            )  # fmt: skip
            cast(Any, program).save(str(path), external_data=True)
    except Exception as error:  # the exporter and onnxscript raise what they like
        raise InputError(
            f"{name}: torch.onnx cannot export {type(model).__name__} ({one_line(error)}); "
            "use --to dense, or a newer torch and onnxscript"
        ) from error


def sample_ids(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Token ids (B, T) that the model knows, the same each time."""
    rows = len(weight_of(cast(nn.Module, model.get_input_embeddings())))
    length = min(length, context_length(model.config) or length)
    return (torch.arange(batch * length) * 7919 % rows).view(batch, length)


@torch.no_grad()
def graph_error(model: PreTrainedModel, path: Path) -> float:
    """`||ONNX Runtime - model|| / ||model||` over the logits of three sequences of 13 tokens."""
    import onnxruntime  # type: ignore[import-not-found]

    ids = sample_ids(model, 3, 13)
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], given)[0])
    expected = model(input_ids=ids, use_cache=False).logits
    return float((found - expected).norm() / expected.norm())


@contextmanager
def _quietly() -> Iterator[None]:
    """The exporter prints its steps on stdout, which is for results, and warns about names of axes."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
