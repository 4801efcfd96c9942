"""Everything that is written beside the weights for people and programs: report, recipe, model card, page, curve."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectrim.recipe import RESOLVED, resolved_yaml
from spectrim.report.any_size import CURVE, any_size_card, size_curve
from spectrim.report.card import model_card
from spectrim.report.page import report_page
from spectrim.store import write_json, write_text

REPORT, PAGE, CARD, RECIPE = "report.json", "report.html", "README.md", "recipe.json"


def write_documents(stage: Path, report: Mapping[str, Any]) -> None:
    """Write them all; each says what `report` says."""
    any_size = "sizes" in report
    write_json(stage / REPORT, report)
    if "method" in report["request"]:  # a model that was given in memory cannot be found again
        write_json(stage / RECIPE, report["request"])
        write_text(stage / RESOLVED, resolved_yaml(report["request"]))
    write_text(stage / CARD, any_size_card(report) if any_size else model_card(report))
    if any_size and report["dense"]:
        write_text(stage / CURVE, size_curve(report))
    write_text(stage / PAGE, report_page(report))
