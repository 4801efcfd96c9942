"""The Python interface: compress, load, evaluate."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.byte_budget import settled
from spectrim.engines.pipeline import compress_model
from spectrim.errors import UsageError, did_you_mean
from spectrim.evaluate.gate import FACTOR, judge_gate
from spectrim.evaluate.language import Quality
from spectrim.evaluate.language import evaluate as evaluate_windows
from spectrim.integrations.folder import finalise, round_to
from spectrim.job import Compressed, Request, compress_source
from spectrim.linalg.fallback import listening, summary
from spectrim.models.load import load_model, pick_device, resolve
from spectrim.options import FACTOR_GROUP_SIZE, METHOD, METHOD_IN_BYTES
from spectrim.registry import make_method
from spectrim.report.facts import describe_outcome


def compress(
    model: str | PreTrainedModel,
    *,
    keep: float | None = None,
    method: str | None = None,
    preset: str | None = None,
    options: dict[str, Any] | None = None,
    calibration: Tensor | None = None,
    factor_bits: int | None = None,
    factor_group_size: int = FACTOR_GROUP_SIZE,
    seed: int = 0,
    **request: Any,
) -> Compressed:
    """Compress a model to `keep` of the stored numbers of its decoder linears.

    The given model is not changed. UsageError, InputError, ResourceError or NumericalError where it cannot be done.

    Args:
        model: A hub id, a local folder, `builtin:tiny`, or a model in memory.
        keep: Share of the stored numbers (of bytes, for methods of few bits) that remains, in (0, 1]. For a model by
            name `model_bytes` or `keep_bytes` may stand in its place: a budget for all tensors of the model.
        method: A name of `spectrim methods`; `soco` by default, of a budget in bytes `trellis`.
        preset: `fast`, `balanced` or `best`, for methods that have presets.
        options: Fields of the method.
        calibration: Token ids (windows, length), for a model in memory only.
        factor_bits: 8, 4 or 3, to which low-rank and dense layers are quantised at the end.
        factor_group_size: Inputs that share a grid with `factor_bits`; 0: whole rows.
        seed: Of everything that is random.
        request: Other fields of `spectrim.job.Request` (calib, calib_windows, device, dtype, ...), for a model by name.

    Examples:
        >>> import spectrim
        >>> small = spectrim.compress("builtin:tiny", keep=0.8, method="svd", eval="none")
        >>> round(small.outcome.plan.keep, 3)
        0.8
    """
    in_bytes = request.get("model_bytes") is not None or request.get("keep_bytes") is not None
    method = method or (METHOD_IN_BYTES if in_bytes else METHOD)
    if isinstance(model, str):
        if calibration is not None:
            raise UsageError("calibration= takes token ids for a model in memory; for a model by name use calib=")
        unknown = [name for name in request if name not in Request.__dataclass_fields__]
        if unknown:
            raise UsageError(f"compress(): unknown keyword {unknown[0]!r}{did_you_mean(unknown[0], _keywords())}")
        if (keep is None) != in_bytes:
            raise UsageError("compress(): pass one budget: keep=, model_bytes= or keep_bytes=")
        asked = Request(
            model=model, keep=1.0 if keep is None else keep, method=method, preset=preset, options=options or {},
            seed=seed, factor_bits=factor_bits, factor_group_size=factor_group_size, **request,
        )  # fmt: skip
        configured, source = asked.check(), resolve(model)
        return compress_source(settled(asked, configured, source), configured, source)
    if request:
        raise UsageError(f"compress(): {', '.join(request)} only apply to a model given by name, not in memory")
    if keep is None:
        raise UsageError("compress(): keep= is missing: the share of stored numbers that remains, in (0, 1]")
    rounding = {"factor_bits": factor_bits, "factor_group_size": factor_group_size}
    configured, insists = make_method(method, preset, options), options or {}
    return _compress_in_memory(model, keep, configured, calibration, seed, rounding, insists)


def _keywords() -> list[str]:
    return [*Request.__dataclass_fields__, "calibration"]


def _compress_in_memory(
    model: PreTrainedModel,
    keep: float,
    method: Any,
    calibration: Tensor | None,
    seed: int,
    rounding: dict[str, Any],
    insists: Collection[str],
) -> Compressed:
    from spectrim.data import sample_windows

    if calibration is None:
        calibration = sample_windows(model, length=128, count=256, seed=seed).ids
    dtype = next(model.parameters()).dtype
    wide = model if dtype == torch.float32 else _copy_in_float32(model)
    with listening() as fallbacks:
        outcome = compress_model(wide, method, keep, calibration, seed=seed, insists=insists, **rounding)
    outcome.warnings += summary(fallbacks)
    round_to(outcome.model, dtype)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    report = {
        "request": {"model": name, "keep": keep, **rounding},
        **describe_outcome(outcome),
        "tool": "spectrim",
        "source": {"name": name, "numbers": model.num_parameters(), "bytes": model.get_memory_footprint()},
        "stored": {"linear_numbers_dense": outcome.plan.numbers_before},
        "factor_quantization": rounding if rounding["factor_bits"] else None,
        "quality": None,
        "quality_gate": judge_gate(None, None, FACTOR),
        "fallbacks": [fallback._asdict() for fallback in fallbacks],
        "text": {},
    }
    return Compressed(model=finalise(outcome, dtype, base_model=name), outcome=outcome, report=report)


def _copy_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    import copy

    return copy.deepcopy(model).float()


def load(folder: str | Path, *, device: str = "auto") -> PreTrainedModel:
    """A compressed (or dense) folder as a model; the same as `from_pretrained`, with the folder checked first."""
    return load_model(resolve(str(folder)), pick_device(device))


def evaluate(model: PreTrainedModel, ids: Tensor, *, dense: PreTrainedModel | None = None) -> Quality:
    """Perplexity over token ids (windows, length), and KL and agreement when the dense model is given."""
    return evaluate_windows(model, ids, dense=dense)
