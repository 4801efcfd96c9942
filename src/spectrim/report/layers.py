"""The layers of a report as the page shows them: shares, a map of block x projection, spectra block by block."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from spectrim.linalg.allocate import factor_cost, pivot_cost
from spectrim.report.figures import spectrum_figure
from spectrim.report.reading import Facts

LAYERS_MOST = 2000
"""So many layers are named and drawn; a mixture of experts has more, all of them in report.json."""
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
_COUNTED = re.compile(r"(?<=\.)\d+(?=\.)")


class Layer(NamedTuple):
    """One layer; None where the report does not say."""

    name: str
    outputs: int
    inputs: int
    codec: str
    rank: int | None
    numbers: int | None
    share: float | None  # of what the dense weight stores, in the unit of the budget
    spectrum: Facts

    @property
    def block(self) -> str:
        """The number of its block, or what stands in its place."""
        found = _BLOCK.search(self.name)
        return found[1] if found else ""

    @property
    def projection(self) -> str:
        """Its name inside the block, experts under one name."""
        found = _BLOCK.search(self.name)
        return _COUNTED.sub("*", "." + self.name[found.end() :])[1:] if found else self.name

    @property
    def shown(self) -> str:
        """What stands in its cell."""
        if self.codec == "dense" and (self.share is None or self.share >= 1):
            return "dense"
        if self.codec == "packed" and self.share is not None:
            return f"{16 * self.share:.2f} b"
        return "?" if self.rank is None else str(self.rank)


def layers_of(report: Facts, size: str | None = None) -> list[Layer]:
    """Of one size, or of a folder that holds all: at `size`, as the report names it."""
    in_bytes = report.text("stored", "keep_unit") == "bytes"
    return [_layer(row, in_bytes, size, report.text("stored", "storage")) for row in report.rows("layers")]


def _layer(row: Facts, in_bytes: bool, size: str | None, storage: str | None) -> Layer:
    name = row.text("name") or "?"
    outputs, inputs = row.count("shape", 0) or 0, row.count("shape", 1) or 0
    codec, rank, numbers = row.text("codec") or "?", row.count("rank"), row.count("numbers")
    if size is not None:
        codec, rank = row.text("sizes", size, 0) or "?", row.count("sizes", size, 1)
        numbers = numbers_at(outputs, inputs, codec, rank)
    dense = outputs * inputs
    share = None if numbers is None or not dense else numbers / dense
    nbytes = row.count("bytes")
    if dense and nbytes is not None and (in_bytes or codec.startswith("quantised")):
        share = nbytes / (2 * dense)
    return Layer(name, outputs, inputs, codec, rank, numbers, share, row.at("spectrum"))


def numbers_at(outputs: int, inputs: int, codec: str, rank: int | None) -> int | None:
    """What a layer of a folder with all sizes stores, its bias apart."""
    if codec == "dense":
        return outputs * inputs
    if rank is None or codec not in ("factor", "pivot"):
        return None
    cost: Any = factor_cost if codec == "factor" else pivot_cost  # of tensors, but they serve whole numbers as well
    return cost(outputs, inputs, rank)


def heat_map(layers: Sequence[Layer]) -> dict[str, Any] | None:
    """Rows of blocks, columns of projections; each cell with text, full text, and how strong its colour is (0 to 1)."""
    blocks = list(dict.fromkeys(layer.block for layer in layers))
    columns = list(dict.fromkeys(layer.projection for layer in layers))
    cells: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        cells.setdefault((layer.block, layer.projection), []).append(layer)
    shares = [layer.share for layer in layers if layer.share is not None]
    if not layers:
        return None
    low, high = (min(shares), max(shares)) if shares else (0.0, 0.0)
    return {
        "columns": [{"name": name, "short": short} for name, short in zip(columns, short_names(columns), strict=True)],
        "rows": [
            {"name": block, "cells": [_cell(cells.get((block, column), []), low, high) for column in columns]}
            for block in blocks
        ],
        "low": low,
        "high": high,
        "measured": bool(shares),
    }


def _cell(layers: Sequence[Layer], low: float, high: float) -> dict[str, Any] | None:
    if not layers:
        return None
    shares = [layer.share for layer in layers if layer.share is not None]
    share = statistics.fmean(shares) if shares else None
    strength = 0.0 if share is None else 0.5 if high - low < 1e-9 else (share - low) / (high - low)
    shown = layers[0].shown if len(layers) == 1 else median_shown(layers)
    names = layers[0].name if len(layers) == 1 else f"{len(layers)} layers like {layers[0].name}"
    part = "" if share is None else f", {share:.1%} of the dense weight"
    full = f"{names}: {layers[0].codec}, rank {shown}{part}"
    return {"text": shown, "title": full, "strength": strength}


def median_shown(layers: Sequence[Layer]) -> str:
    """Of layers that share a cell: the rank in the middle."""
    ranks = [layer.rank for layer in layers if layer.rank is not None]
    return f"~{statistics.median_low(ranks)}" if ranks else "?"


def short_names(columns: Sequence[str]) -> list[str]:
    """The last part of each name, or all of it where two would be the same; without an end that all share."""
    last = [column.rpartition(".")[2] for column in columns]
    names = [part if last.count(part) == 1 else column for part, column in zip(last, columns, strict=True)]
    if len(names) > 1 and all(name.endswith("_proj") for name in names):
        return [name.removesuffix("_proj") for name in names]
    return names


def spectra_by_block(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """For each block its layers that were decomposed, with their figures; empty where none was."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer in layers[:LAYERS_MOST]:
        if layer.spectrum:
            groups.setdefault(layer.block, []).append(_spectrum(layer))
    return [{"name": block, "layers": found} for block, found in groups.items()]


def _spectrum(layer: Layer) -> dict[str, Any]:
    facts = layer.spectrum
    components, kept = facts.count("components") or 1, facts.count("kept")
    energy, shares = facts.number("energy_kept"), facts.numbers("kept_shares")
    places, values = facts.numbers("places"), facts.numbers("singular_values")
    several = len(places) == len(values) and values
    told = "which were kept is not recorded" if kept is None else f"{kept} of {components} kept"
    if kept is not None and energy is not None:
        told += f", {energy:.2%} of the energy"
    label = f"Singular values of {layer.name}: {told}"
    figure = spectrum_figure(
        places, values, components=components, kept=kept, shares=shares if len(shares) == len(places) else (),
        label=label,
    ) if several else ""  # fmt: skip
    return {"name": layer.name, "short": layer.projection, "told": told, "figure": figure}


def layer_rows(layers: Sequence[Layer], sizes: Mapping[str, Sequence[Layer]] | None = None) -> dict[str, Any]:
    """The table of all layers, up to LAYERS_MOST; with `sizes`, the rank at each."""
    header = ["layer", "shape", "codec", "rank", "numbers", "share", "energy kept"]
    if sizes:
        header = ["layer", "shape", *(f"size {size}" for size in sizes)]
    rows = []
    for i, layer in enumerate(layers[:LAYERS_MOST]):
        row = [layer.name, f"{layer.outputs} x {layer.inputs}"]
        if sizes:
            row += [at[i].shown for at in sizes.values()]
        else:
            energy = layer.spectrum.number("energy_kept")
            row += [layer.codec, _whole(layer.rank), _whole(layer.numbers)]
            row += ["" if layer.share is None else f"{layer.share:.4f}", "" if energy is None else f"{energy:.4f}"]
        rows.append(row)
    return {"header": header, "rows": rows, "left_out": max(0, len(layers) - LAYERS_MOST)}


def _whole(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
