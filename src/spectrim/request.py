"""What a run is asked for, and the text it then reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from spectrim.data import (
    Texts,
    Windows,
    calibration_windows,
    evaluation_windows,
    load_texts,
    load_tokenizer,
    sample_windows,
)
from spectrim.engines.pipeline import check_keep
from spectrim.engines.recovery import recovery_of
from spectrim.errors import InputError, UsageError
from spectrim.method import LayerMethod, TrainedMethod
from spectrim.models.load import Source, check_vocabulary, context_length
from spectrim.models.walk import find_layers
from spectrim.registry import make_method

MAX_CHARS = 50_000_000
"""At most this much text is read; the report says so where it cuts."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the result; written into the output as `recipe.json`."""

    model: str
    keep: float
    method: str = "soco"
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recover: tuple[str, ...] = ()
    calib: str = "builtin:stdlib"
    calib_windows: int = 256
    calib_length: int = 512
    gradient_windows: int | None = None
    train_windows: int = 4096
    eval: str = "builtin:stdlib"
    eval_windows: int = 40
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def check(self) -> LayerMethod:
        """Refuse what cannot work before anything is loaded; returns the configured method."""
        check_keep(self.keep)
        least = {"calib_windows": 1, "calib_length": 2, "gradient_windows": 1, "train_windows": 1, "eval_windows": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be in [0, 2**63), got {self.seed}")
        method = make_method(self.method, self.preset, dict(self.options))
        recovery_of(method, self.recover)
        return method


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
    """Tokenizer and text; only `calib="self"` with `eval="none"` works without a tokenizer."""
    calibration = evaluation = tokenizer = None
    if request.calib != "self":
        calibration = load_texts(request.calib, split="calibration", max_chars=MAX_CHARS)
    if request.eval != "none":
        evaluation = load_texts(request.eval, split="evaluation", max_chars=MAX_CHARS)
    if calibration or evaluation:
        try:
            tokenizer = load_tokenizer(request.tokenizer or source.folder)
        except InputError as error:
            raise InputError(f"{error} --eval none") from error
    return TextRead(tokenizer=tokenizer, calibration=calibration, evaluation=evaluation)


def cut_windows(request: Request, method: LayerMethod, dense: PreTrainedModel, text: TextRead) -> WindowsInUse:
    """Calibration, training and evaluation windows, and what there is to say about them."""
    learns = (isinstance(method, TrainedMethod) and method.steps > 0) or any(
        step.steps for step in recovery_of(method, request.recover)
    )
    length = min(request.calib_length, context_length(dense.config) or request.calib_length)
    count = request.calib_windows
    wanted = max(count, request.train_windows) if learns else count
    if text.calibration is None:
        windows = sample_windows(dense, length=length, count=wanted, seed=request.seed)
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
    for cut in (windows, evaluation):
        if cut is not None:
            check_vocabulary(dense, cut.ids)
    return WindowsInUse(
        calibration=calibration, training=windows if learns else None, evaluation=evaluation, warnings=tuple(warnings)
    )
