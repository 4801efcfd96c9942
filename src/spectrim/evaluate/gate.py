"""The last check of a run: a result whose perplexity on held-out text fell apart is marked, whatever its steps said.

A compression can go well step by step and still give a model that is of no use. Such a result is published, since it
may be what was asked for (a study of how methods fail), but nobody can miss it: the manifest, the report and the model
card say that it failed, and the command exits with 5.
"""

import math
from typing import Any

from spectrim.errors import NumericalError, UsageError

FACTOR = 100.0
"""Perplexity may rise by this factor. The worst result that anyone would still use is far below, garbage far above."""


def check_factor(factor: float) -> None:
    """0 switches the gate off; a factor below 1 would fail models that are as good as the dense one."""
    if factor != 0 and not (math.isfinite(factor) and factor >= 1):
        raise UsageError(f"quality_gate must be 0 (off) or a finite factor of at least 1, got {factor:g}")


def judge_gate(dense: float | None, compressed: float | None, factor: float, *, size: float | None = None) -> dict:
    """JSON-ready verdict on two perplexities; `passed` is None where nothing was measured or the gate is off.

    `size` says which size of a folder that holds all was measured.
    """
    passed = None if dense is None or compressed is None or not factor else compressed <= factor * dense
    verdict: dict[str, Any] = {
        "factor": factor,
        "dense_perplexity": dense,
        "compressed_perplexity": compressed,
        "passed": passed,
    }
    return verdict if size is None else {**verdict, "size": size}


def gate_warning(verdict: dict[str, Any]) -> str | None:
    """What the report and the model card say of a result that failed."""
    if verdict["passed"] is not False:
        return None
    at = f" at size {verdict['size']:g}" if "size" in verdict else ""
    dense, small = verdict["dense_perplexity"], verdict["compressed_perplexity"]
    return (
        f"quality gate failed{at}: perplexity went from {dense:.2f} to {small:.4g}, {small / dense:.4g} times as much, "
        f"allowed {verdict['factor']:g} times: the result is not usable; raise --keep or choose another method"
    )


def refuse_failed(report: dict[str, Any]) -> None:
    """NumericalError for a published result that did not pass; its folder stays."""
    says = gate_warning(report["quality_gate"])
    if says:
        raise NumericalError(
            f"{report['folder']}: published and marked as failed in manifest.json. {says[0].upper()}{says[1:]}, or "
            "allow more with --quality-gate"
        )
