"""Report, card and size curve of a folder that holds all sizes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from spectrim import version
from spectrim.evaluate.intervals import named
from spectrim.method import MaskedMethod
from spectrim.report.card import head, licence_lines
from spectrim.report.facts import describe_source, describe_windows, environment
from spectrim.report.plot import line_chart
from spectrim.report.record import spectra_of

CURVE = "size-curve.svg"


def build_any_size_report(
    request: dict[str, Any], source: Any, sizes: Any, texts: Any, quality: Mapping[Any, Any] | None, dtype: torch.dtype
) -> dict[str, Any]:
    """All facts known before writing. `quality` holds "dense" and each measured size; `stored` is completed later."""
    plans = {size: sizes.plan(size) for size in sizes.anchors[1:]}
    masked = isinstance(sizes.method, MaskedMethod)  # no record of which components are kept
    default = sizes.plan(request["keep"]).targets
    ranks = {name: None if masked else default[name].rank for name in sizes.energies}
    spectra = spectra_of(sizes.energies, ranks)
    outside = source.checkpoint.numel - sizes.walk.numbers
    return {
        "format_version": 1,
        "tool": f"spectrim {version.__version__}",
        "request": request,
        "method": sizes.method.to_config(),
        "source": describe_source(source),
        "stored": {
            "dtype": str(dtype).removeprefix("torch."),
            "linear_numbers_dense": sizes.walk.numbers,
            "storage": sizes.method.alone,
        },
        "sizes": [
            {
                "size": size,
                "linear_numbers": plan.numbers_after,
                "keep": plan.keep,
                "model_numbers": outside + plan.numbers_after,
                "quality": None if quality is None else asdict(quality[size], dict_factory=named),
            }
            for size, plan in plans.items()
        ],
        "dense": None if quality is None else asdict(quality["dense"], dict_factory=named),
        "text": {
            "calibration": describe_windows(texts.calibration),
            "training": None if texts.training is None else describe_windows(texts.training),
            "evaluation": None if texts.evaluation is None else describe_windows(texts.evaluation),
        },
        "layers": [
            {
                "name": layer.name,
                "shape": [layer.outputs, layer.inputs],
                "sizes": {
                    f"{size:g}": [p.targets[layer.name].codec, p.targets[layer.name].rank] for size, p in plans.items()
                },
                "spectrum": spectra.get(layer.name),
            }
            for layer in sizes.walk.layers
        ],
        "untouched": [{"name": n, "numbers": k, "why": why} for n, k, why in sizes.walk.untouched],
        "learning": {"losses": list(sizes.losses), "details": dict(sizes.details)} if sizes.losses else None,
        "seconds": dict(sizes.seconds),
        "warnings": list(sizes.warnings),
        "environment": environment(),
    }


def size_curve(report: Mapping[str, Any]) -> str:
    """Perplexity over size, the dense model's as a dashed line, as SVG; needs a report with quality."""
    points = [(row["size"], row["quality"]["perplexity"]) for row in report["sizes"]]
    return line_chart(
        {report["method"]["method"]: points},
        title=f"{report['source']['name']} in all sizes",
        x="size: share of the decoder linears' numbers",
        y="perplexity",
        references={"dense": report["dense"]["perplexity"]},
    )


def size_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text: size, numbers, perplexity, KL, agreement; the dense model first."""
    dense, stored, source = report["dense"], report["stored"], report["source"]
    figures = [f"{dense['perplexity']:.2f}", "0", "1"] if dense else []
    rows = [["dense", f"{stored['linear_numbers_dense']:,}", f"{source['numbers']:,}", *figures]]
    for row in report["sizes"]:
        quality = row["quality"]
        figures = (
            [f"{quality[key]:.{n}f}" for key, n in (("perplexity", 2), ("kl", 4), ("agreement", 4))] if quality else []
        )
        rows.append([f"{row['size']:g}", f"{row['linear_numbers']:,}", f"{row['model_numbers']:,}", *figures])
    return rows


def size_header(report: Mapping[str, Any]) -> list[str]:
    """Names of the columns of `size_table`."""
    figures = ["perplexity", "KL to dense, nats a token", "same top token as dense"] if report["dense"] else []
    return ["size", "numbers in decoder linears", "numbers in all", *figures]


def any_size_card(report: Mapping[str, Any]) -> str:
    """README.md of the folder; every figure is from the report."""
    source, method, stored = report["source"]["name"], report["method"]["method"], report["stored"]
    header = size_header(report)
    smallest, default = report["sizes"][-1]["size"], report["request"]["keep"]
    lines = [
        *head(report, []),
        f"# {source} in all sizes from {smallest:g} to 1",
        "",
        f"Compressed by {report['tool']} with `{method}`: one order of all components of the decoder's linear layers. "
        "Each size is a slice of it, taken while loading; everything else is unchanged.",
        "",
        _row(header),
        _row(["---"] * len(header)),
        *(_row(row) for row in size_table(report)),
        "",
        *([f"![size curve]({CURVE})", ""] if report["dense"] else []),
        f"The folder holds {stored.get('model_numbers', 0):,} numbers, {stored.get('model_bytes', 0):,} bytes; a load "
        "reads what its size needs.",
        "",
        "## Load",
        "",
        "```python",
        "import spectrim  # registers the format",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", size_ratio={default:g})',
        "```",
        "",
        f"`size_ratio` is any number from {smallest:g} to 1; without it, {default:g}. "
        "`spectrim export THIS_FOLDER --keep 0.6 --out SMALL` writes one size as an ordinary folder.",
        "Without `import spectrim` the load stops with a shape error (it never loads random weights).",
        "",
        "## Measured on",
        "",
        *(
            f"- {use}: {w['source']}, {w['windows']} windows of {w['length']} tokens, no overlap; {w['note']}"
            for use, w in report["text"].items()
            if w
        ),
        "",
        *licence_lines(report),
        "",
        "Spectra, ranks, training, samples, time and memory: `report.html` in this folder.",
    ]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {w}" for w in report["warnings"])]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
