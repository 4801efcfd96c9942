"""Which form each layer has, in words, and a table by form; read from the layers, whatever method made them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from spectrim.linalg.bits import VALUE_BYTES, size_of
from spectrim.models.walk import Walk
from spectrim.nn.codecs import StoredLinear


def form_of(module: nn.Module) -> str:
    """Such as `trellis 2.5`, `uniform 3 + rank 64`, `factor of trellis 3, trellis 3`, `dense`; no ranks of factors."""
    if not isinstance(module, StoredLinear):
        return "dense"
    entry = module.entry()
    if entry["codec"] == "packed":
        return store_words(entry["base"]) + (f" + rank {entry['correction']}" if entry["correction"] else "")
    parts = [store_words(part) for part in entry.values() if isinstance(part, Mapping) and "kind" in part]
    name = str(entry["codec"]).removeprefix("quantised-")
    return f"{name} of {', '.join(parts)}" if parts else name


def store_words(entry: Mapping[str, Any]) -> str:
    """A store's line of config.json in words."""
    kind = str(entry["kind"])
    if kind == "corrected":
        return f"{store_words(entry['inner'])} + low rank in {store_words(entry['right'])}"
    if kind == "outliers":
        return f"{store_words(entry['inner'])} + entries"
    inner = next((part for part in entry.values() if isinstance(part, Mapping) and "kind" in part), None)
    bits = entry.get("bits")
    words = kind if bits is None else f"{kind} {bits:g}"
    return words if inner is None else f"{words} of {store_words(inner)}"


def forms_table(model: nn.Module, walk: Walk) -> list[dict[str, Any]]:
    """One row a form, the most bytes first: layers, weights, bytes (numbers as 16 bits, biases too), bits a weight."""
    found: dict[str, dict[str, Any]] = {}
    for layer in walk.layers:
        module = model.get_submodule(layer.name)
        row = found.setdefault(form_of(module), {"layers": 0, "weights": 0, "bytes": 0})
        row["layers"] += 1
        row["weights"] += layer.weight_numbers
        row["bytes"] += size_of(module.state_dict().values(), "bytes")
    rows = [{"form": form, **row, "bits": 8 * row["bytes"] / row["weights"]} for form, row in found.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def forms_rows(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table as text."""
    return [
        [row["form"], f"{row['layers']:,}", f"{row['weights']:,}", f"{row['bytes']:,}", f"{row['bits']:.2f}"]
        for row in table
    ]


FORMS_HEADER = ["form", "layers", "weights", f"bytes (numbers as {VALUE_BYTES})", "bits a weight"]
