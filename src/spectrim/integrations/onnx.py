"""A folder for ONNX Runtime: the graph of one forward pass without a cache, its weights beside it, the error measured.

Each factor is a MatMul, the order of pivot outputs a Gather. What is written is run once by ONNX Runtime, on another
number of tokens than it was traced with, and compared with the model (graph_export.py).
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

from spectrim.integrations.graph_export import Graph, export_graph, sample_ids
from spectrim.models.load import Source

NEEDED = ("onnx", "onnxscript", "onnxruntime")
GRAPH = "model.onnx"


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
    graph = Graph(
        to="onnx", runtime="ONNX Runtime", file=GRAPH, missing=[name for name in NEEDED if find_spec(name) is None],
        write=_write_graph, logits=graph_logits, probe=(3, 13),
        remedy="--to dense, or another release of torch and onnxscript",
    )  # fmt: skip
    return export_graph(graph, source, out, size=size, overwrite=overwrite)


def _write_graph(model: PreTrainedModel, path: Path) -> None:
    """Trace, translate, save; batch and length stay free."""
    ids = sample_ids(model, 2, 8)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quietly():
        program = torch.onnx.export(
            Logits(model), (ids, torch.ones_like(ids)), dynamo=True, dynamic_shapes=(free, free),
            input_names=["input_ids", "attention_mask"], output_names=["logits"],
        )  # fmt: skip
        cast(Any, program).save(str(path), external_data=True)


def graph_logits(path: Path, ids: Tensor) -> Tensor:
    """What ONNX Runtime computes."""
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    return torch.from_numpy(session.run(["logits"], given)[0])


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
