"""README.md of a compressed folder: what it is, what it costs, how to load it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from spectrim.report.forms import FORMS_HEADER, forms_rows

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(report: Mapping[str, Any]) -> str:
    """Markdown with the measured table; every figure is from the report."""
    request, stored, source = report["request"], report["stored"], report["source"]
    lines = [
        *head(report, figures_of(report)),
        f"# {source['name']} at keep {stored.get('keep', request['keep']):.4f}",
        "",
        f"Compressed by {report['tool']} with `{report['method']['method']}`: {stored_as(report)}.",
        "",
        "| | dense | compressed |",
        "|---|---|---|",
        *(_row(*cells) for cells in table(report)),
        "",
        *_forms(report),
        "## Load",
        "",
        "```python",
        *([] if is_plain(report) else ["import spectrim  # registers the format"]),
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "spectrim is not needed for that."
        if is_plain(report)
        else "Without `import spectrim` the load stops with a shape error (it never loads random weights).",
        "",
        "## Measured on",
        "",
        *_texts(report),
        "",
        *licence_lines(report),
        "",
        "Spectra, ranks, training, samples, time and memory: `report.html` in this folder.",
    ]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {w}" for w in report["warnings"])]
    return "\n".join(lines) + "\n"


def head(report: Mapping[str, Any], figures: Sequence[tuple[str, str, float]]) -> list[str]:
    """The metadata of the card between its two lines: what the hub shows and searches.

    Licence and languages are the source's own (`source.card` of the report); the base model is named where the source
    came from the hub. `figures` (name, type, value) were measured on the evaluation text.
    """
    source, method = report["source"], report["method"]["method"]
    carried = {k: v for k, v in source.get("card", {}).items() if k != "problem"}
    text = (report.get("text") or {}).get("evaluation")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["spectrim", "compressed", method],
        base_model=base_model(source),
        **carried,
    )
    if figures and text:
        data.model_name = f"{source['name']} by {method}"
        common = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": text["source"]}
        data.eval_results = [
            EvalResult(**common, metric_type=kind, metric_name=name, metric_value=value)
            for name, kind, value in figures
        ]
    return ["---", *data.to_yaml(line_break="\n").rstrip("\n").split("\n"), "---"]


def figures_of(report: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What was measured of the compressed model, as the metadata takes it."""
    if not report["quality"]:
        return []
    small = report["quality"]["compressed"]
    figures = [("perplexity", "perplexity", small["perplexity"]), ("KL to the dense model", "kl", small["kl"])]
    return [*figures, ("same top token as the dense model", "agreement", small["agreement"])]


def base_model(source: Mapping[str, Any]) -> str | None:
    """The hub id that was compressed; None for a folder or a model in memory."""
    name = source["name"]
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def licence_lines(report: Mapping[str, Any]) -> list[str]:
    """What the card says about the licence: the source's, or that it is not known."""
    card, name = report["source"].get("card", {}), report["source"]["name"]
    if "license" not in card:
        return ["## Licence", "", f"That of {name}, whose model card states none."]
    stated = card["license"] if card["license"] != "other" else card.get("license_name", "other")
    where = f" ({card['license_link']})" if "license_link" in card else ""
    return ["## Licence", "", f"That of {name}: {stated}{where}."]


def is_plain(report: Mapping[str, Any]) -> bool:
    """Whether the folder is one that any program loads, with nothing of ours in it."""
    return report["stored"].get("format") == "plain"


def stored_as(report: Mapping[str, Any]) -> str:
    """What became of the layers, in words."""
    codecs = sorted({layer["codec"] for layer in report.get("layers", [])} - {"dense"})
    if is_plain(report):
        return "an ordinary model of narrower layers"
    form = f"in the form `{'`, `'.join(codecs)}`" if codecs else "as they were"
    return f"the linear layers of the decoder are stored {form}, everything else is unchanged"


def table(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (what, dense, compressed) as text."""
    stored, source, quality = report["stored"], report["source"], report["quality"]
    rows = []
    if quality:
        dense, small = quality["dense"], quality["compressed"]
        rows += [
            ("perplexity", f"{dense['perplexity']:.2f}", f"{small['perplexity']:.2f}"),
            ("KL to dense, nats a token", "0", f"{small['kl']:.4f}"),
            ("same top token as dense", "1", f"{small['agreement']:.4f}"),
        ]
    if "linear_numbers" in stored:
        dense_numbers = stored["linear_numbers_dense"]
        rows += [
            ("bytes in decoder linears, at 16 bits", f"{2 * dense_numbers:,}", f"{stored['linear_counted']:,}")
            if stored.get("keep_unit") == "bytes"
            else ("numbers in decoder linears", f"{dense_numbers:,}", f"{stored['linear_numbers']:,}"),
            *bytes_row(report),
            ("numbers in all", f"{source['numbers']:,}", f"{stored['model_numbers']:,}"),
            ("bytes in all", f"{source['bytes']:,}", f"{stored['model_bytes']:,}"),
        ]
    return rows


def bytes_row(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of low-rank layers whose numbers are kept in few bits."""
    stored = report["stored"]
    if not report.get("factor_quantization"):
        return []
    return [("bytes of them, at 16 bits", f"{2 * stored['linear_numbers_dense']:,}",
             f"{stored['linear_bytes_counted']:,} ({stored['keep_bytes']:.4f})")]  # fmt: skip


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _forms(report: Mapping[str, Any]) -> list[str]:
    """What the layers became, by form."""
    found = report.get("forms", [])
    if is_plain(report) or not found:
        return []
    return ["## Forms", "", _row(*FORMS_HEADER), "|---" * len(FORMS_HEADER) + "|",
            *(_row(*cells) for cells in forms_rows(found)), ""]  # fmt: skip


def _texts(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for use, windows in report["text"].items():
        if windows:
            lines.append(
                f"- {use}: {windows['source']}, {windows['windows']} windows of {windows['length']} tokens, "
                f"no overlap; {windows['note']}"
            )
    return lines
