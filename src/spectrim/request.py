"""What a run is asked for; like options.py, it imports neither torch nor transformers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from spectrim.errors import UsageError
from spectrim.evaluate.gate import FACTOR, check_factor
from spectrim.options import (
    ANCHORS,
    ANY_SIZE_STEPS,
    CALIB_WINDOWS,
    FACTOR_GROUP_SIZE,
    METHOD,
    SELF_WINDOWS,
    Nonfinite,
    check_anchors,
    check_choice,
    check_device,
    check_dtype,
    check_factor_bits,
    check_factors,
    check_keep,
    check_least,
    check_serves_all_sizes,
    parse_step,
    recovery_of,
)
from spectrim.registry import all_methods, check_name, make_method

if TYPE_CHECKING:
    from spectrim.method import Method

LEAST = {"calib_windows": 1, "calib_length": 2, "gradient_windows": 1, "train_windows": 1, "eval_windows": 1}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the result; written into the output as `recipe.json`."""

    model: str
    keep: float
    method: str = METHOD
    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    recover: tuple[str, ...] = ()
    factor_bits: int | None = None
    factor_group_size: int = FACTOR_GROUP_SIZE
    calib: str = "builtin:stdlib"
    calib_windows: int | None = None
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
    model_bytes: int | None = None
    """For the whole model, all tensors counted; `keep` then follows from it (byte_budget.py)."""
    keep_bytes: float | None = None
    """The same as a share of the dense model in 16 bits."""
    low_memory: bool = False
    """Block by block from the model's files, with neither model in memory as a whole (low_memory_job.py)."""
    deterministic: bool = False
    """Only algorithms that give the same bits every time (reproducible.py)."""
    shard_weights: bool | None = None
    """Of several processes, whether each holds a part of what is frozen while scores are learned; None: if need be."""
    any_size: bool = False
    anchors: tuple[float, ...] = ANCHORS
    any_size_steps: int = ANY_SIZE_STEPS

    @property
    def statistics_windows(self) -> int:
        """Windows that feed the statistics: those asked for, or as many as the kind of text needs."""
        if self.calib_windows is not None:
            return self.calib_windows
        return SELF_WINDOWS if self.calib == "self" else CALIB_WINDOWS

    def check(self) -> "Method":
        """Refuse what cannot work before anything is loaded, all of it at once; returns the configured method.

        Methods are imported, and torch with them, only where they could add to what is wrong.
        """
        wrong = self._mistakes()
        method: Method | None = None
        if not wrong or (self.method in all_methods() and self._looks_at_method):
            with noted(wrong):
                method = make_method(self.method, self.preset, dict(self.options))
        if method is not None:
            with noted(wrong):
                recovery_of(method, self.recover)
            with noted(wrong):
                check_factors(method, self.factor_bits)
            if self.any_size:
                with noted(wrong):
                    self._check_any_size(method)
        if wrong or method is None:
            raise UsageError(
                wrong[0] if len(wrong) == 1 else f"{len(wrong)} things are wrong:\n  " + "\n  ".join(wrong)
            )
        return method

    @property
    def _looks_at_method(self) -> bool:
        """Whether something else than the name could be wrong with the method."""
        return bool(self.preset or self.options or self.recover or self.any_size or self.factor_bits)

    def _mistakes(self) -> list[str]:
        """Those that show without the method."""
        wrong: list[str] = []
        checks = [
            partial(check_keep, self.keep),
            partial(check_choice, "allow_nonfinite", self.allow_nonfinite, get_args(Nonfinite)),
            partial(check_factor, self.quality_gate),
            partial(check_device, self.device),
            partial(check_dtype, self.dtype),
            partial(check_name, self.method),
            partial(check_factor_bits, self.factor_bits, self.factor_group_size),
            *(partial(check_least, name, getattr(self, name), low) for name, low in LEAST.items()),
            *(partial(parse_step, text) for text in self.recover),
        ]
        if self.any_size:
            checks.append(self._check_sizes)
        if self.model_bytes is not None or self.keep_bytes is not None:
            checks.append(self._check_bytes)
        for check in checks:
            with noted(wrong):
                check()
        if not 0 <= self.seed < 2**63:
            wrong.append(f"seed must be in [0, 2**63), got {self.seed}")
        return wrong

    def _check_bytes(self) -> None:
        if self.model_bytes is not None and self.keep_bytes is not None:
            raise UsageError("bytes and keep_bytes are two budgets for one thing; pass one of them")
        if self.any_size:
            raise UsageError("a budget in bytes is for one size; leave any_size out")
        if self.model_bytes is not None and self.model_bytes < 1:
            raise UsageError(f"bytes must be at least 1, got {self.model_bytes}")
        if self.keep_bytes is not None and not 0 < self.keep_bytes <= 1:
            raise UsageError(
                f"keep_bytes must be in (0, 1], got {self.keep_bytes:g}: a share of the dense model's bytes"
            )

    def _check_sizes(self) -> None:
        if self.shard_weights:
            raise UsageError("shard_weights is for several processes, which any_size is not for; leave one of them out")
        if self.factor_bits is not None:
            raise UsageError("factor_bits quantise the factors of one size; leave --factor-bits out with --any-size")
        check_anchors(self.anchors)
        if self.keep < self.anchors[-1]:
            raise UsageError(
                f"keep {self.keep:g} is to be the default size, but the sizes go from {self.anchors[-1]:g} to 1; "
                "add a smaller anchor (--anchors) or leave --keep out"
            )

    def _check_any_size(self, method: "Method") -> None:
        from spectrim.method import LearnedMethod, TrainedMethod

        check_serves_all_sizes(method, self.recover)
        if self.options.get("rank_multiple", 0) > 1:
            raise UsageError(
                f"rank_multiple={self.options['rank_multiple']}: with any_size ranks follow from one order of all "
                "components and may be any; leave --rank-multiple out"
            )
        if isinstance(method, LearnedMethod) and method.steps > 0 and self.any_size_steps < len(self.anchors):
            raise UsageError(
                f"any_size_steps must be at least the number of anchors, {len(self.anchors)}, got {self.any_size_steps}"
            )
        if isinstance(method, TrainedMethod) and method.steps > 0:
            check_least("any_size_steps", self.any_size_steps, 1)


@contextmanager
def noted(wrong: list[str]) -> Iterator[None]:
    """Go on after a usage error and keep what it says, once."""
    try:
        yield
    except UsageError as error:
        if str(error) not in wrong:
            wrong.append(str(error))
