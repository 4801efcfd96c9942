"""A folder for ONNX Runtime: the graph of one step with a cache, its weights beside it, the error measured.

transformers' own exporter traces and translates; each factor is a MatMul, the order of pivot outputs a Gather. Inputs
and outputs get the names that Optimum gave them, since those of the exporter change between its releases. What is
written is run by ONNX Runtime on other numbers of rows and tokens than were traced, first with an empty cache, then
with the one that came back, and compared with the model (graph_export.py).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from spectrim.integrations.exporters import missing_packages, program_of, quietly
from spectrim.integrations.graph_export import Graph, export_graph, sample_ids
from spectrim.models.load import Source

NEEDED = ("onnx", "onnxscript", "onnxruntime")
GRAPH = "model.onnx"


def export_onnx(source: Source, out: Path, *, size: float | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write `model.onnx` in float32 with its weights in `model.onnx.data`; `size` as in `load_model`.

    Inputs: `input_ids` (batch, length) and `attention_mask` (batch, past + length), int64, and for each block n
    `past_key_values.n.key` and `.value` (batch, heads, past, width), float32, where past may be 0. Outputs: `logits`
    (batch, length, vocabulary), `present.n.key` and `.value` (batch, heads, past + length, width).
    """
    graph = Graph(
        to="onnx", runtime="ONNX Runtime", file=GRAPH, missing=missing_packages(*NEEDED), write=_write_graph,
        logits=graph_logits, probe=(3, 13), remedy="--to dense, or another release of torch and onnxscript",
    )  # fmt: skip
    return export_graph(graph, source, out, size=size, overwrite=overwrite)


def _write_graph(model: PreTrainedModel, path: Path) -> None:
    """Trace, translate, name, save; batch, length and what the cache holds stay free."""
    ids = sample_ids(model, 2, 5)
    cache = _filled_cache(model, ids[:, :3])
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {
        "input_ids": free,
        "attention_mask": {0: Dim.DYNAMIC, 1: Dim.AUTO},  # the sum of two lengths that are free
        "past_key_values": [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC}] * (2 * len(cache.layers)),
    }
    inputs = {"input_ids": ids[:, 3:], "attention_mask": torch.ones_like(ids), "past_key_values": cache}
    with quietly():
        import onnx_ir  # type: ignore[import-not-found]  of an extra
        from transformers.exporters import OnnxConfig, OnnxExporter  # type: ignore[attr-defined]  not in older ones

        exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes))
        program = program_of(exported)
        model_ir = getattr(program, "model", program)  # torch's ONNXProgram, before 5.23, holds it
        _rename(model_ir.graph, blocks=len(cache.layers))
        onnx_ir.save(model_ir, str(path), external_data=f"{path.name}.data")


def _filled_cache(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """Keys and values of a few tokens. Without the model's config every layer keeps all tokens; where attention sees a
    window only, the mask says so, and the graph does not depend on how much a sliding layer had kept."""
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    for number, layer in enumerate(cache.layers):
        if getattr(getattr(layer, "keys", None), "ndim", 0) != 4:
            raise ValueError(f"block {number} keeps something else than keys and values ({type(layer).__name__})")
    return cache


def _rename(graph: Any, *, blocks: int) -> None:
    """Positions are those of the traced call: ids, mask, then key and value of each block."""
    pairs = [f"{block}.{part}" for block in range(blocks) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{pair}" for pair in pairs)]
    outputs = ["logits", *(f"present.{pair}" for pair in pairs)]
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        if len(values) != len(names):
            raise ValueError(f"{len(values)} inputs or outputs where {len(names)} were traced")
        for value, name in zip(values, names, strict=True):
            value.name = name


def graph_logits(path: Path, ids: Tensor) -> Tensor:
    """What ONNX Runtime computes in two steps, the second with the cache of the first."""
    import onnxruntime  # type: ignore[import-not-found]

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    past = {
        value.name: torch.zeros(len(ids), int(value.shape[1]), 0, int(value.shape[3])).numpy()
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    logits, seen = [], 0
    for part in ids.split(max(1, ids.shape[1] - 4), dim=1):
        seen += part.shape[1]
        mask = torch.ones(len(ids), seen, dtype=torch.int64)
        given = {"input_ids": part.numpy(), "attention_mask": mask.numpy(), **past}
        found = dict(zip(names, session.run(names, given), strict=True))
        logits.append(torch.from_numpy(found["logits"]))
        past = {name: found[name.replace("past_key_values", "present")] for name in past}
    return torch.cat(logits, dim=1)
