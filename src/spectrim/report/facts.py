"""report.json: everything that was asked, done and measured, in one dict."""

import platform
from dataclasses import asdict
from typing import Any

import torch
import transformers

from spectrim import version
from spectrim.evaluate.intervals import named
from spectrim.linalg.bits import size_of
from spectrim.report.forms import form_of, forms_table
from spectrim.report.licence import carried_over
from spectrim.report.record import spectra_of


def build_report(
    request: dict[str, Any], source: Any, outcome: Any, texts: Any, quality: Any, dtype: torch.dtype
) -> dict[str, Any]:
    """All facts known before writing; `stored` is completed from the written files."""
    plan, rounded = outcome.plan, outcome.factor_quantization
    return {
        "format_version": 1,
        "tool": f"spectrim {version.__version__}",
        "request": request,
        **describe_outcome(outcome),
        "source": describe_source(source),
        "stored": {
            "dtype": str(dtype).removeprefix("torch."),
            "linear_numbers_dense": plan.numbers_before,
            "linear_numbers_planned": plan.numbers_after,
        },
        "quality": None if quality is None else {name: asdict(q, dict_factory=named) for name, q in quality.items()},
        "text": {
            "calibration": describe_windows(texts.calibration),
            "training": None if texts.training is None else describe_windows(texts.training),
            "evaluation": None if texts.evaluation is None else describe_windows(texts.evaluation),
        },
        "gradient_windows": outcome.gradient_windows,
        "factor_quantization": None if rounded is None else rounded._asdict(),
        "untouched": [{"name": n, "numbers": k, "why": why} for n, k, why in outcome.walk.untouched],
        "learning": describe_learning(outcome),
    }


def describe_outcome(outcome: Any) -> dict[str, Any]:
    """What is known of every compression, of a model by name or in memory."""
    return {
        "method": outcome.method.to_config(),
        "layers": describe_layers(outcome),
        "forms": forms_table(outcome.model, outcome.walk),
        "frontier": list(outcome.frontier),
        "seconds": dict(outcome.seconds),
        "warnings": list(outcome.warnings),
        "environment": environment(),
    }


def describe_layers(outcome: Any) -> list[dict[str, Any]]:
    """What became of each layer, and of its spectrum where it was decomposed alone (`energies` of an Outcome)."""
    placed, kept = outcome.placed, {} if outcome.learned is None else outcome.learned.kept
    spectra = spectra_of(outcome.energies, {name: placed[name].rank for name in outcome.energies}, kept)
    return [
        {
            "name": layer.name,
            "shape": [layer.outputs, layer.inputs],
            "codec": codec_of(outcome, layer.name),
            "form": form_of(outcome.model.get_submodule(layer.name)),
            "rank": placed[layer.name].rank,
            "numbers": placed[layer.name].numbers,
            "bytes": bytes_of(outcome, layer.name),
            "spectrum": spectra.get(layer.name),
        }
        for layer in outcome.walk.layers
    ]


def bytes_of(outcome: Any, name: str) -> int:
    """Of one layer as it is stored: two for a number, one for a byte of codes."""
    if outcome.factor_quantization is None:
        return outcome.placed[name].size("bytes")
    return size_of(outcome.model.get_submodule(name).state_dict().values(), "bytes")


def codec_of(outcome: Any, name: str) -> str:
    """How a layer is stored in the end."""
    placed = outcome.placed[name].codec
    return placed if outcome.factor_quantization is None else outcome.model.get_submodule(name).codec


def describe_source(source: Any) -> dict[str, Any]:
    """Which model it was; the commit where it came from the hub."""
    numbers = {"numbers": source.checkpoint.numel, "bytes": source.checkpoint.nbytes}
    return {"name": source.name, "revision": source.revision, **numbers, "card": carried_over(source.folder)}


def describe_windows(windows: Any) -> dict[str, Any]:
    """Where the tokens came from and which they are."""
    return {
        "source": windows.source,
        "note": windows.note,
        "windows": int(windows.ids.shape[0]),
        "length": int(windows.ids.shape[1]),
        "sha256": windows.sha256,
    }


def describe_learning(outcome: Any) -> dict[str, Any] | None:
    """Trajectories of the learned steps."""
    if outcome.learned is None and not outcome.recovered:
        return None
    learned = outcome.learned
    return {
        "losses": [] if learned is None else list(learned.losses),
        "keeps": [] if learned is None else list(learned.keeps),
        "score_path": [] if learned is None else [list(point) for point in learned.score_path],
        "components_returned": 0 if learned is None else learned.returned,
        "details": {} if learned is None else dict(learned.details),
        "distil_losses": list(outcome.distil_losses),
        "recovery": [
            {"step": str(done.step), "losses": [list(losses) for losses in done.losses]} for done in outcome.recovered
        ],
    }


def environment() -> dict[str, str]:
    """Versions and hardware that figures depend on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        # not platform.platform(), which runs `uname -p`, whatever that is on the PATH
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "gpu": gpu,
        "threads": str(torch.get_num_threads()),
    }
