"""README.md of a compressed folder: what it is, what it costs, how to load it."""

from collections.abc import Mapping
from typing import Any

from spectrim.report.forms import FORMS_HEADER, forms_rows


def model_card(report: Mapping[str, Any]) -> str:
    """Markdown with the measured table; every figure is from the report."""
    request, stored, source = report["request"], report["stored"], report["source"]
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [spectrim, {report['method']['method']}]",
        "---",
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
    ]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {w}" for w in report["warnings"])]
    return "\n".join(lines) + "\n"


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
