"""What a run may be asked for, and the checks of it; what needs the model or its files is refused in job.foresee.

Nothing here imports torch or transformers: a mistake is told at once, not after seconds of imports.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from spectrim.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from spectrim.method import Method
    from spectrim.model_method import ModelMethod

Nonfinite = Literal["refuse", "skip"]
"""What becomes of a layer that holds NaN or Inf: the run stops, or the layer is copied unchanged."""
DTYPE_NAMES = ("float32", "bfloat16", "float16")
ANCHORS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35)
"""Sizes at which a folder of all sizes learns and measures."""
ANY_SIZE_STEPS = 1600
"""Training steps of all anchors together: as many as four runs of the preset `balanced` take."""
CALIB_WINDOWS, SELF_WINDOWS = 256, 512
"""Windows that feed the statistics when nothing is said: of text, and of text that the model writes, which costs only
time and needs more to serve as well (benchmarks/README.md, without data)."""
FACTOR_BITS = (8, 4, 3)
"""Widths of codes that low-rank layers may be quantised to."""
FACTOR_GROUP_SIZE = 128
METHOD, METHOD_IN_BYTES = "soco", "trellis"
"""What compresses when nothing is said: under a share of numbers, and under a budget in bytes."""
MOST_STEPS = 1_000_000
RECOVERY_BATCH = 32
"""Windows in a step of distillation."""
DEFAULT_STEPS: Mapping[str, int | None] = {"refit": None, "reconstruct": None, "block": 100, "kl": 300}
"""Recovery steps by name, with how many optimizer steps they take when nothing is said; None: it does not train."""


def check_keep(keep: float) -> None:
    """keep is a fraction of stored numbers, in (0, 1]."""
    if not 0 < keep <= 1:
        hint = f"; did you mean {keep / 100:g}?" if 1 < keep <= 100 else ""
        raise UsageError(f"keep must be in (0, 1], got {keep:g}: the share of stored numbers that remains{hint}")


_UNITS = {"": 1, "B": 1} | {f"{p}{i}B": (1024 if i else 1000) ** n for n, p in enumerate("KMGT", 1) for i in ("", "i")}


def parse_bytes(text: str) -> int:
    """`"4GB"`, `"1.5 GiB"`, `"120_000_000"` to bytes."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = {name.upper(): size for name, size in _UNITS.items()}.get(match[2].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(f"--bytes {text}: expected a number of bytes such as 4GB, 3.5GiB or 120000000")
    return int(float(match[1].replace("_", "")) * unit)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """A value that is one of those allowed."""
    if value not in allowed:
        raise UsageError(f"{name}: {value!r} is not supported{did_you_mean(str(value), allowed)}")


def check_least(name: str, value: int | None, least: int) -> None:
    """A count that is large enough, or None."""
    if value is not None and value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}")


def check_factor_bits(bits: int | None, group_size: int) -> None:
    """Bits that codes are offered in, or None; a group size that some weight could have."""
    if bits is not None and bits not in FACTOR_BITS:
        raise UsageError(f"factor_bits must be one of {', '.join(map(str, FACTOR_BITS))}, got {bits!r}")
    check_least("factor_group_size", group_size, 0)


def check_factors(method: "Method", bits: int | None) -> None:
    """factor_bits are for methods whose layers are low-rank ones, or stay dense."""
    from spectrim.method import LayerMethod
    from spectrim.model_method import ModelMethod

    if bits is None:
        return
    if not isinstance(method, ModelMethod):
        if isinstance(method, LayerMethod) and method.shares:
            raise UsageError(
                f"method {method.info.name}: factor_bits quantise layers that have both factors to themselves, and "
                f"storage={method.storage} shares them; leave --factor-bits out, or take storage=pivot"
            )
        return
    if not method.codecs or not {*method.codecs} <= {"factor", "pivot"}:
        raise UsageError(
            f"method {method.info.name}: factor_bits quantise layers of the codecs factor and pivot, its layers are "
            f"{', '.join(method.codecs) or 'plain ones'}; leave --factor-bits out, or take a low-rank method (soco, "
            "svd-llm, ...)"
        )


def check_device(name: str) -> None:
    """A device that computes, by its name; whether this machine has it is another question."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:(0|[1-9]\d?))?", name):
        raise UsageError(f"--device {name}: not a device that computes; use auto, cpu, cuda, cuda:N or mps")


def check_dtype(name: str) -> None:
    """A dtype of stored weights, or `auto`."""
    if name != "auto" and name not in DTYPE_NAMES:
        raise UsageError(f"--dtype {name}: not supported{did_you_mean(name, DTYPE_NAMES)}")


class Step(NamedTuple):
    """One recovery step; `steps` is None for one that does not train."""

    name: str
    steps: int | None

    def __str__(self) -> str:
        return self.name if self.steps is None else f"{self.name}:{self.steps}"


def parse_step(text: str) -> Step:
    """`"kl"` or `"kl:300"`; UsageError for an unknown name or a count that does not fit."""
    name, colon, count = text.partition(":")
    if name not in DEFAULT_STEPS:
        raise UsageError(f"unknown recovery step {name!r}{did_you_mean(name, DEFAULT_STEPS)}")
    steps = DEFAULT_STEPS[name]
    if not colon:
        return Step(name, steps)
    if steps is None:
        raise UsageError(
            f"recovery step {text!r}: {name} is solved directly and takes no number of steps; write {name}"
        )
    if not (count.isascii() and count.isdigit()) or not 1 <= int(count) <= MOST_STEPS:
        raise UsageError(
            f"recovery step {text!r}: the number of steps must be a whole number in [1, {MOST_STEPS}], got {count!r}; "
            f"e.g. {name}:{steps}"
        )
    return Step(name, int(count))


def recovery_of(method: "Method", asked: Iterable[str]) -> tuple[Step, ...]:
    """The method's own steps, those asked for, and `distil_steps` of a method that has them as a last `kl` step."""
    from spectrim.method import LayerMethod
    from spectrim.model_method import ModelMethod

    steps = [parse_step(text) for text in (*method.recovery, *asked)]
    if method.centres and any(step.steps is None for step in steps):
        raise UsageError(
            f"method {method.info.name}: refit and reconstruct solve for factors without the bias that this method has "
            "moved; leave them out (block and kl train biases too)"
        )
    wrong = [step.name for step in steps if step.name != "kl"]
    if isinstance(method, LayerMethod) and method.shares and wrong:
        raise UsageError(
            f"method {method.info.name}: the recovery step {wrong[0]} is for layers with both factors to themselves, "
            f"and storage={method.storage} shares them; take kl, or storage=pivot"
        )
    if isinstance(method, ModelMethod) and not method.trains_factors:
        _check_without_factors(method, steps)
    distil_steps = getattr(method, "distil_steps", 0)
    return (*steps, *([Step("kl", distil_steps)] if distil_steps else []))


def _check_without_factors(method: "ModelMethod", steps: list[Step]) -> None:
    """Layers in few bits have numbers that kl trains; other layers without factors have nothing."""
    if "packed" not in method.codecs:
        wrong, way = steps[:1], "leave --recover out"
    else:
        wrong, way = [s for s in steps if s.name != "kl"], "of the recovery steps it takes only kl[:STEPS]"
    if wrong:
        raise UsageError(
            f"method {method.info.name}: the recovery step {wrong[0].name} is for low-rank factors, and its layers "
            f"have none ({', '.join(method.codecs) or 'they are plain ones'}); {way}"
        )


def check_anchors(anchors: tuple[float, ...]) -> None:
    """Anchors descend strictly inside (0, 1)."""
    descending = all(a > b for a, b in pairwise(anchors))
    if not anchors or not descending or not 0 < anchors[-1] <= anchors[0] < 1:
        raise UsageError(f"anchors must descend strictly between 1 and 0, got {', '.join(f'{a:g}' for a in anchors)}")


def check_serves_all_sizes(method: "Method", recovery: tuple[str, ...] = ()) -> None:
    """Steps that change factors for one size only cannot serve all sizes."""
    from spectrim.method import SEARCHED, LayerMethod

    if not isinstance(method, LayerMethod):
        raise UsageError(
            f"method {method.info.name} makes a model of one size; --any-size needs a method whose components serve "
            "all ranks (soco, two-sided, svd-llm, ...)"
        )
    if method.centres or type(method).at_rank is not LayerMethod.at_rank:
        raise UsageError(
            f"method {method.info.name} solves for each layer's factors or bias at one rank; --any-size needs a method "
            "whose components serve all ranks (soco, two-sided, svd-llm, ...)"
        )
    if method.allocation in (*SEARCHED, "order"):
        raise UsageError(
            f"method {method.info.name}: allocation={method.allocation} finds the ranks of one size; --any-size takes "
            "uniform or global"
        )
    if method.shares:
        raise UsageError(
            f"method {method.info.name}: storage={method.storage} chooses who shares a factor at one size; --any-size "
            "takes storage factor or pivot"
        )
    distil_steps = getattr(method, "distil_steps", 0)
    if distil_steps:
        raise UsageError(
            f"method {method.info.name}: distil_steps={distil_steps} trains the factors of one size; "
            "--any-size needs factors that serve all sizes: use --preset balanced or fast"
        )
    steps = (*method.recovery, *recovery)
    if steps:
        raise UsageError(
            f"method {method.info.name}: the recovery step {steps[0]!r} refits the factors of one size; leave it out "
            "with --any-size"
        )
