"""A folder for ExecuTorch: a program for its XNNPACK kernels, made by transformers' own exporter, the error measured.

Each factor is a product of its own. The program is run once by ExecuTorch's runtime, on another number of tokens than
it was traced with, and compared with the model (graph_export.py).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.integrations.exporters import missing_packages, program_of, quietly
from spectrim.integrations.graph_export import Graph, export_graph, sample_ids
from spectrim.models.load import Source, context_length

PROGRAM = "model.pte"
LONGEST = 512
"""Tokens of a sequence, at most: the runtime sets memory aside for the logits of as many."""


def export_executorch(
    source: Source, out: Path, *, size: float | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Write `model.pte` in float32; `size` as in `load_model`.

    Inputs `input_ids` and `attention_mask` (1, length), int64, length up to 512 or the model's context; output the
    logits (1, length, vocabulary).
    """
    graph = Graph(
        to="executorch", runtime="ExecuTorch", file=PROGRAM, missing=missing_packages("executorch"),
        write=_write_program, logits=program_logits, probe=(1, 13),
        remedy="--to onnx or --to dense, or the release of executorch that transformers names as tested",
    )  # fmt: skip
    return export_graph(graph, source, out, size=size, overwrite=overwrite)


def _write_program(model: PreTrainedModel, path: Path) -> None:
    """Trace, lower, save; the length stays free."""
    most = min(LONGEST, context_length(model.config) or LONGEST)
    length = {1: torch.export.Dim("length", min=2, max=most)}
    ids = sample_ids(model, 1, 8)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with quietly():
        from transformers.exporters import ExecutorchConfig, ExecutorchExporter  # type: ignore[attr-defined]  not in older ones

        config = ExecutorchConfig(
            backend="xnnpack", dynamic=True, dynamic_shapes={"input_ids": length, "attention_mask": length}
        )
        program = program_of(ExecutorchExporter().export(model, inputs, config=config))
    with path.open("wb") as file:
        program.write_to_file(file)


def program_logits(path: Path, ids: Tensor) -> Tensor:
    """What ExecuTorch's runtime computes."""
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    method = Runtime.get().load_program(path).load_method("forward")
    return method.execute([ids, torch.ones_like(ids)])[0].clone()
