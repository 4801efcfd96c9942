"""What a run is asked for, and the text it then reads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

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
from spectrim.engines.any_size import ANCHORS, check_anchors, check_method
from spectrim.engines.descent import STEPS
from spectrim.engines.layerwise import Nonfinite
from spectrim.engines.measure import Progress
from spectrim.engines.pipeline import check_keep
from spectrim.engines.recovery import RECOVERY_BATCH, recovery_of
from spectrim.errors import InputError, UsageError, did_you_mean
from spectrim.evaluate.gate import FACTOR, check_factor
from spectrim.method import LearnedMethod, Method
from spectrim.models.load import Source, check_vocabulary, context_length
from spectrim.models.walk import find_layers
from spectrim.registry import make_method

MAX_CHARS = 100_000_000
"""At most this much text is read; the report says so where it cuts."""
MOST_SAMPLED = 4096
"""Windows sampled from the model itself for learning (`calib="self"`), which is slow; they are then used again."""


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
    train_windows: int | None = None
    eval: str = "builtin:stdlib"
    eval_windows: int = 40
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    allow_nonfinite: Nonfinite = "refuse"
    quality_gate: float = FACTOR
    any_size: bool = False
    anchors: tuple[float, ...] = ANCHORS
    any_size_steps: int = STEPS

    def check(self) -> Method:
        """Refuse what cannot work before anything is loaded, all of it at once; returns the configured method."""
        wrong: list[str] = []
        method: Method | None = None
        with noted(wrong):
            check_keep(self.keep)
        with noted(wrong):
            self._check_counts()
        with noted(wrong):
            if self.allow_nonfinite not in get_args(Nonfinite):
                known = did_you_mean(str(self.allow_nonfinite), get_args(Nonfinite))
                raise UsageError(f"allow_nonfinite: {self.allow_nonfinite!r} is not supported{known}")
        with noted(wrong):
            check_factor(self.quality_gate)
        with noted(wrong):
            method = make_method(self.method, self.preset, dict(self.options))
        if method is not None:
            with noted(wrong):
                recovery_of(method, self.recover)
            if self.any_size:
                with noted(wrong):
                    self._check_any_size(method)
        if wrong or method is None:
            raise UsageError(
                wrong[0] if len(wrong) == 1 else f"{len(wrong)} things are wrong:\n  " + "\n  ".join(wrong)
            )
        return method

    def _check_counts(self) -> None:
        least = {"calib_windows": 1, "calib_length": 2, "gradient_windows": 1, "train_windows": 1, "eval_windows": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name} must be at least {low}, got {value}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be in [0, 2**63), got {self.seed}")

    def _check_any_size(self, method: Method) -> None:
        check_anchors(self.anchors)
        check_method(method, self.recover)
        if not self.anchors[-1] <= self.keep <= 1:
            raise UsageError(
                f"keep {self.keep:g} is to be the default size, but the sizes go from {self.anchors[-1]:g} to 1; "
                "add a smaller anchor (--anchors) or leave --keep out"
            )
        if isinstance(method, LearnedMethod) and method.steps > 0 and self.any_size_steps < len(self.anchors):
            raise UsageError(
                f"any_size_steps must be at least the number of anchors, {len(self.anchors)}, got {self.any_size_steps}"
            )


@contextmanager
def noted(wrong: list[str]) -> Iterator[None]:
    """Go on after a usage error and keep what it says."""
    try:
        yield
    except UsageError as error:
        wrong.append(str(error))


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
    own = method.windows_trained
    if own and request.any_size and isinstance(method, LearnedMethod):
        own = request.any_size_steps * method.batch_size
    most = max([own, *((step.steps or 0) * RECOVERY_BATCH for step in recovery_of(method, request.recover))])
    return min(most, MOST_SAMPLED) if request.calib == "self" else most


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
    count = request.calib_windows
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
