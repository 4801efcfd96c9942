"""The text of a run and the windows cut from it: what is asked for in request.py, read and counted."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from spectrim.data import (
    Texts,
    Windows,
    calibration_windows,
    evaluation_windows,
    held_out_samples,
    load_texts,
    load_tokenizer,
    sample_windows,
)
from spectrim.data.repeats import text_warnings
from spectrim.engines.measure import Progress
from spectrim.errors import InputError
from spectrim.method import Method, TrainedMethod
from spectrim.models.load import Source, check_vocabulary, context_length
from spectrim.models.walk import find_layers
from spectrim.options import RECOVERY_BATCH, recovery_of
from spectrim.request import Request

MAX_CHARS = 100_000_000
"""At most this much text is read; the report says so where it cuts."""
MOST_SAMPLED = 4096
"""Windows sampled from the model itself for learning (`calib="self"`), which is slow; they are then used again."""


@dataclass(frozen=True, kw_only=True)
class WindowsInUse:
    """The windows of one run."""

    calibration: Windows
    training: Windows | None
    evaluation: Windows | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TextRead:
    """The text of one run, read before the model is; None where the run needs none."""

    tokenizer: Any
    calibration: Texts | None
    evaluation: Texts | None


def read_text(request: Request, source: Source) -> TextRead:
    """Tokenizer and text; `calib="self"` with `eval="self"` or "none" needs neither."""
    calibration = evaluation = tokenizer = None
    if request.calib != "self":
        calibration = load_texts(request.calib, split="calibration", max_chars=MAX_CHARS)
    if request.eval not in ("none", "self"):
        evaluation = load_texts(request.eval, split="evaluation", max_chars=MAX_CHARS)
    if calibration or evaluation:
        try:
            tokenizer = load_tokenizer(request.tokenizer or source.folder)
        except InputError as error:
            raise InputError(f"{error}, or --calib self --eval self, which need no tokenizer") from error
    return TextRead(tokenizer=tokenizer, calibration=calibration, evaluation=evaluation)


def training_windows(request: Request, method: Method) -> int:
    """How many windows learning may use: those asked for, else as many as the longest trained stage goes through."""
    if request.train_windows is not None:
        return request.train_windows
    most = max(windows_by_stage(request, method))
    return min(most, MOST_SAMPLED) if request.calib == "self" else most


def windows_by_stage(request: Request, method: Method) -> list[int]:
    """Windows that the method's own training and each recovery step go through, each as often as it is used."""
    own = method.windows_trained
    if own and request.any_size and isinstance(method, TrainedMethod):
        own = request.any_size_steps * method.batch_size
    return [own, *((step.steps or 0) * RECOVERY_BATCH for step in recovery_of(method, request.recover))]


def has_steps(request: Request, method: Method) -> bool:
    """Whether the run, as configured, trains anything."""
    return method.windows_trained > 0 or any(step.steps for step in recovery_of(method, request.recover))


def cut_windows(
    request: Request,
    method: Method,
    dense: PreTrainedModel,
    text: TextRead,
    *,
    progress: Progress | None = None,
) -> WindowsInUse:
    """Calibration, training and evaluation windows, and what there is to say about them."""
    learns = has_steps(request, method)
    length = min(request.calib_length, context_length(dense.config) or request.calib_length)
    count = request.statistics_windows
    wanted = max(count, training_windows(request, method)) if learns else count
    if text.calibration is None:
        windows = sample_windows(dense, length=length, count=wanted, seed=request.seed, progress=progress)
    else:
        windows = calibration_windows(text.calibration, text.tokenizer, length=length, count=wanted, seed=request.seed)
    warnings = list(windows.warnings) if not learns or len(windows.ids) < count else []
    calibration = windows.first(count)
    widest = max(layer.inputs for layer in find_layers(dense).layers)
    if method.needs and calibration.num_tokens < widest:
        warnings.append(
            f"{calibration.num_tokens} calibration tokens for layers with up to {widest} inputs: the statistics are "
            "rank-deficient; it works, but more text gives a better result"
        )
    evaluation = None
    if text.evaluation is not None:
        evaluation = evaluation_windows(text.evaluation, text.tokenizer, length=length, count=request.eval_windows)
        warnings += [f"evaluation: {warning}" for warning in evaluation.warnings]
        if request.eval == request.calib and not request.eval.startswith("builtin:"):
            warnings.append("calibrated and evaluated on the same text: the figures flatter the result")
    elif request.eval == "self":
        evaluation = held_out_samples(
            dense, length=length, count=request.eval_windows, seed=request.seed, progress=progress
        )
    same = request.eval in ("self", request.calib)  # samples of its own, and what is warned about above
    judged = None if evaluation is None or same else evaluation.ids
    warnings += text_warnings(calibration.ids, judged, windows.ids if learns else None)
    for cut in (windows, evaluation):
        if cut is not None:
            check_vocabulary(dense, cut.ids)
    return WindowsInUse(
        calibration=calibration, training=windows if learns else None, evaluation=evaluation, warnings=tuple(warnings)
    )
