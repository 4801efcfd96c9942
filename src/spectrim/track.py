"""Curves and figures of a run for an experiment tracker, through accelerate's interface; off unless asked for.

Written when the run has ended and its folder is published, from its report: a tracker that fails, or a run that is
resumed, then changes nothing of the result, and no step waits for a network. Losses go under `losses/STAGE` by step,
figures under the names that they have in report.json. What a tracker needs beside its package (an account, a server) is
that tracker's own affair.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrim.errors import ResourceError, UsageError, did_you_mean, without_tokens

PACKAGES: Mapping[str, str] = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""Trackers that accelerate knows, and the package of each."""


def check_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The names; UsageError for one that accelerate does not know, or whose package is missing."""
    for name in names:
        if name not in PACKAGES:
            raise UsageError(f"--track {name}: no such tracker{did_you_mean(name, PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            extra = " (or 'spectrim[track]')" if name == "tensorboard" else ""
            raise UsageError(f"--track {name}: its package is not installed; pip install {PACKAGES[name]}{extra}")
    return tuple(names)


def track_run(names: Sequence[str], report: Mapping[str, Any], out: Path) -> None:
    """Hand the report of a finished run to each tracker; ResourceError when one fails, with the result in place."""
    if names:
        from spectrim.processes import as_one

        with as_one():  # of several processes the first has the report; accelerate would look for the others
            _track(names, report, out)


def _track(names: Sequence[str], report: Mapping[str, Any], out: Path) -> None:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers log from the main process, which it has to know
    logs = out.with_name(f"{out.name}.track")
    for name in names:
        try:
            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(out.name, logging_dir=str(logs)) if kind.requires_logging_directory else kind(out.name)
            if hasattr(tracker, "start"):  # before accelerate 1.8 they start when they are made
                tracker.start()
            tracker.store_init_configuration(settings_of(report))
            for values, step in values_of(report):
                tracker.log(values, step=step)
            tracker.finish()
        except Exception as error:  # of the tracker, its server or its network
            said = without_tokens(" ".join(str(error).split()))[:300]
            raise ResourceError(
                f"--track {name}: {type(error).__name__}: {said}; the result in {out} is complete, only its log is not"
            ) from error


def settings_of(report: Mapping[str, Any]) -> dict[str, int | float | str | bool]:
    """What was asked for, flat and in plain values."""
    given = {**report["request"], **{f"method.{key}": value for key, value in report["method"].items()}}
    return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in given.items()}


def values_of(report: Mapping[str, Any]) -> Iterator[tuple[dict[str, float], int]]:
    """Losses step by step, then the figures at step 0."""
    for name, losses in curves_of(report).items():
        for step, loss in enumerate(losses):
            yield {f"losses/{name}": float(loss)}, step
    figures = {f"seconds/{stage}": float(value) for stage, value in report["seconds"].items()}
    figures |= {f"stored/{key}": float(v) for key, v in report["stored"].items() if isinstance(v, int | float)}
    for model, quality in (report.get("quality") or {}).items():
        figures |= {f"quality/{model}/{key}": float(v) for key, v in quality.items() if isinstance(v, int | float)}
    yield figures, 0


def curves_of(report: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Losses of every stage that trained something."""
    learning = report.get("learning") or {}
    curves = {"learn": learning.get("losses") or []}
    for done in learning.get("recovery", []):
        many = len(done["losses"]) > 1
        for block, losses in enumerate(done["losses"]):
            name = done["step"].partition(":")[0]
            curves[f"{name}/{block}" if many else name] = losses
    return {name: losses for name, losses in curves.items() if losses}
