"""Several folders on one page: what each is, size against quality, ranks layer by layer.

Figures of different texts or of different dense models are not comparable: where that is so, the page says it first.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spectrim.report import sections
from spectrim.report.figures import Line, chart
from spectrim.report.layers import LAYERS_MOST, Layer, layers_of
from spectrim.report.page import default_size, environment, sizes_of
from spectrim.report.reading import Facts, read_report


class Folder(NamedTuple):
    """One folder to compare; `label` stands for it in figures."""

    label: str
    path: str
    report: Facts


def read_folders(paths: Sequence[Path]) -> list[Folder]:
    """The reports of all folders, checked; labels are 1, 2, 3 in the order given."""
    return [Folder(str(i + 1), str(path), read_report(path)) for i, path in enumerate(paths)]


def points_of(folder: Folder) -> list[dict[str, Any]]:
    """JSON-ready: a row for each size that a folder holds, with all figures that were measured."""
    report = folder.report
    common = {
        "label": folder.label,
        "folder": folder.path,
        "model": report.text("source", "name") or report.text("exported_from"),
        "method": report.text("method", "method"),
        "unit": report.text("stored", "keep_unit") or "numbers",
        "seconds": report.number("seconds", "total"),
        "gate_passed": report.raw("quality_gate", "passed"),
    }
    if report.raw("sizes") is not None:
        return [
            {
                **common,
                "keep": row.number("keep"),
                "share": _ratio(row.number("model_numbers"), report.number("source", "numbers")),
                "model_bytes": None,
                **_quality(row.at("quality")),
            }
            for row in report.rows("sizes")
        ]
    one = {"keep": report.number("stored", "keep"), "share": share_at_16_bits(report)}
    one["model_bytes"] = report.number("stored", "model_bytes")
    return [{**common, **one, **_quality(report.at("quality", "compressed"))}]


def _quality(facts: Facts) -> dict[str, Any]:
    return {key: facts.number(key) for key in ("perplexity", "kl", "agreement")}


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def share_at_16_bits(report: Facts) -> float | None:
    """Of the whole model's bytes when every number takes two of them, so that ranks and bits stand on one axis."""
    stored, numbers = report.at("stored"), report.number("source", "numbers")
    dense, small = stored.number("linear_numbers_dense"), stored.number("linear_numbers")
    if numbers is None or dense is None or small is None:
        return None
    linear = stored.number("linear_bytes_counted")
    rest = numbers - dense
    if stored.text("format") == "plain":  # a narrower model: what lies outside the linear layers shrank too
        rest = (stored.number("model_numbers") or numbers) - small
    return _ratio((2 * small if linear is None else linear) + 2 * rest, 2 * numbers)


def differences(folders: Sequence[Folder]) -> list[str]:
    """Why figures of these folders may not be comparable."""
    said = []
    texts = {f.report.text("text", "evaluation", "sha256") for f in folders} - {None}
    if len(texts) > 1:
        said.append(f"The folders were evaluated on {len(texts)} different texts: their figures cannot be compared.")
    sources = {(f.report.text("source", "name"), f.report.number("source", "numbers")) for f in folders}
    names = sorted(str(name) for name, numbers in sources if numbers is not None)
    if len(names) > 1:
        said.append(f"The folders come from different models ({', '.join(names)}).")
    unmeasured = [f.label for f in folders if all(point["perplexity"] is None for point in points_of(f))]
    if unmeasured:
        said.append(f"Nothing was evaluated in {', '.join(unmeasured)}.")
    return said


def curve(points: Sequence[dict[str, Any]], key: str, name: str, dense: float | None) -> str | None:
    """A figure of `key` over the share of the whole model: lines of folders with several sizes, points of others."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        if point["share"] is not None and point[key] is not None:
            groups.setdefault(point["label"], []).append((point["share"], point[key]))
    if not groups:
        return None
    lines = [Line(label, found, dots=len(found) == 1) for label, found in groups.items()]
    told = "; ".join(f"{la}: " + ", ".join(f"{y:.4g} at {x:.3g}" for x, y in found) for la, found in groups.items())
    return chart(
        lines, label=f"{name} over size. {told}", x="share of the whole model, at 16 bits a number", y=name,
        references=[] if dense is None else [("dense", dense)], log=True, reach=(0, 1),
    )  # fmt: skip


def dense_perplexity(folders: Sequence[Folder]) -> float | None:
    """The dense model's, where all folders agree on it."""
    found = {
        f.report.number(*path)
        for f in folders
        for path in (("quality", "dense", "perplexity"), ("dense", "perplexity"))
        if f.report.raw(path[0]) is not None
    } - {None}
    return found.pop() if len(found) == 1 else None


def rank_table(folders: Sequence[Folder]) -> dict[str, Any] | None:
    """Rows of layers, columns of folders, as `heat_map` of layers.py; None where no report names layers."""
    named = [{layer.name: layer for layer in layers_of(f.report, default_size(f.report))} for f in folders]
    names = list(dict.fromkeys(name for layers in named for name in layers))
    if not names:
        return None
    shares = [la.share for layers in named for la in layers.values() if la.share is not None]
    low, high = (min(shares), max(shares)) if shares else (0.0, 0.0)
    return {
        "columns": [{"name": f.path, "short": f.label} for f in folders],
        "rows": [
            {"name": name, "cells": [_cell(layers.get(name), low, high) for layers in named]}
            for name in names[:LAYERS_MOST]
        ],
        "low": low,
        "high": high,
        "measured": bool(shares),
        "left_out": max(0, len(names) - LAYERS_MOST),
    }


def _cell(layer: Layer | None, low: float, high: float) -> dict[str, Any] | None:
    if layer is None:
        return None
    strength = 0.0 if layer.share is None else 0.5 if high - low < 1e-9 else (layer.share - low) / (high - low)
    part = "" if layer.share is None else f", {layer.share:.1%} of the dense weight"
    return {"text": layer.shown, "strength": strength, "title": f"{layer.name}: {layer.codec}{part}"}


HEADER = ("", "method", "keep", "share of all", "perplexity", "KL", "same top token", "time", "gate", "folder")


def only_model(points: Sequence[dict[str, Any]]) -> str | None:
    """The model that all come from, if it is one."""
    names = {point["model"] for point in points}
    return names.pop() if len(names) == 1 else None


def row_of(point: dict[str, Any], only: str | None) -> list[Any]:
    """A point as cells under HEADER; its model is named unless it is the `only` one."""
    keep, unit = point["keep"], point["unit"]
    seconds, passed = point["seconds"], point["gate_passed"]
    return [
        point["label"],
        point["method"] or sections.NOTHING,
        sections.NOTHING if keep is None else sections.Value(f"{keep:.4f} of {unit}", keep),
        sections.plain(point["share"], ".4f"),
        sections.perplexity(point["perplexity"]),
        sections.plain(point["kl"], ".4f"),
        sections.plain(point["agreement"], ".4f"),
        sections.NOTHING if seconds is None else sections.Value(sections.span(seconds), seconds),
        {True: "passed", False: "failed"}.get(passed, "not judged"),
        point["folder"] if only is not None else f"{point['folder']} (from {point['model'] or 'an unnamed model'})",
    ]


def compare_page(folders: Sequence[Folder]) -> str:
    """The page of several folders."""
    points = [point for folder in folders for point in points_of(folder)]
    dense, only = dense_perplexity(folders), only_model(points)
    figures = [
        ("Perplexity", curve(points, "perplexity", "perplexity", dense)),
        ("KL to the dense model", curve(points, "kl", "KL, nats a token", None)),
    ]
    return environment().get_template("compare.html.j2").render(
        title=f"{len(folders)} compressed folders" if len(folders) != 1 else "One compressed folder",
        folders=[
            {"label": f.label, "path": f.path, "command": sections.command(f.report), "sizes": len(sizes_of(f.report))}
            for f in folders
        ],
        differences=differences(folders),
        dense=sections.perplexity(dense),
        header=HEADER,
        rows=[row_of(point, only) for point in points],
        model=only,
        figures=[(name, figure) for name, figure in figures if figure],
        ranks=rank_table(folders),
    )  # fmt: skip
