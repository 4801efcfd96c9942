"""What a folder holds: codecs, ranks, sizes and the spectrum of every linear layer, read from the files."""

from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import NumericalError
from spectrim.models.load import Source, load_model, meta_model, quantization_of
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.codecs import StoredLinear
from spectrim.report.forms import form_of


def inspect_folder(source: Source, *, spectrum: bool = True, size: float | None = None) -> dict[str, Any]:
    """Facts about a dense or compressed folder; of one with all sizes, the layers are those at `size`."""
    model = load_model(source, torch.device("cpu"), torch.float32, size=size)
    layers = find_layers(meta_model(source.config)).layers  # of the dense architecture, whatever is stored now
    names = tuple(f"{layer.name}." for layer in layers)
    rows = [describe_layer(layer.name, model.get_submodule(layer.name), spectrum) for layer in layers]
    format_ = quantization_of(source.config)
    method = format_.get("method")
    return {
        "folder": str(source.folder),
        "format": format_.get("quant_method", "dense"),
        "format_version": format_.get("format_version"),
        "base_model": format_.get("base_model"),
        "method": method.get("method") if isinstance(method, dict) else None,
        "any_size": source.any_size,
        "size_ratio": quantization_of(model.config).get("size_ratio") if source.any_size else None,
        "dtype": str(source.dtype).removeprefix("torch."),
        "numbers": source.checkpoint.numel,
        "bytes": source.checkpoint.nbytes,
        "linear_numbers": sum(r["numbers"] for r in rows),
        "linear_numbers_dense": sum(layer.numbers for layer in layers),
        "linear_bytes": sum(info.nbytes for name, info in source.checkpoint.tensors.items() if name.startswith(names)),
        "linear_bytes_dense": sum(layer.numbers for layer in layers) * source.dtype.itemsize,
        "layers": rows,
    }


def describe_layer(name: str, module: nn.Module, spectrum: bool) -> dict[str, Any]:
    """Codec, rank, numbers; with `spectrum` also the largest and smallest kept singular value and the stable rank."""
    if isinstance(module, StoredLinear):
        row: dict[str, Any] = {
            "name": name,
            "codec": module.codec,
            "form": form_of(module),
            "rank": module.rank,
            "shape": [module.out_features, module.in_features],
            "numbers": module.numbers,
        }
        weight = module.dense_weight()
    else:
        weight = weight_of(module).detach()
        row = {
            "name": name,
            "codec": "dense",
            "form": "dense",
            "rank": min(weight.shape),
            "shape": list(weight.shape),
            "numbers": sum(p.numel() for p in module.parameters()),
        }
    if spectrum:
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{name}: its weight holds NaN or Inf and has no spectrum; pass --no-spectrum")
        row["spectrum"] = summarise(torch.linalg.svdvals(weight.float()), row["rank"])
    return row


def summarise(singular: Tensor, rank: int) -> dict[str, float]:
    """Largest, median and smallest kept singular value, and the stable rank |W|_F^2 / |W|_2^2."""
    kept = singular[:rank]
    return {
        "largest": float(kept[0]),
        "median": float(kept[len(kept) // 2]),
        "smallest": float(kept[-1]),
        "stable_rank": float(kept.square().sum() / kept[0].square().clamp(min=1e-30)),
    }
