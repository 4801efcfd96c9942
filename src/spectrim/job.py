"""One run, from a request to a published folder.

resolve and check the model -> preflight the output -> text -> load -> compress in memory -> evaluate
-> write beside the target -> count what was written -> reload in a fresh process -> publish by one rename

Its state is kept in OUT.resume until then: resume.py.
"""

import dataclasses
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spectrim.byte_budget import settled
from spectrim.closing import close_report
from spectrim.data import Windows
from spectrim.engines.clock import timed
from spectrim.engines.layerwise import refuse_large_sides
from spectrim.engines.low_memory_way import low_memory_method
from spectrim.engines.masked import budget_of
from spectrim.engines.measure import Progress
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.engines.quantise_factors import check_groups
from spectrim.engines.sharded import check_sharding
from spectrim.engines.shared_checkpoint import shared
from spectrim.engines.way import way_of
from spectrim.errors import NumericalError, UsageError
from spectrim.evaluate.gate import gate_warning, judge_gate
from spectrim.evaluate.language import Quality, evaluate
from spectrim.evaluate.samples import compare_samples
from spectrim.fingerprint import text_fields
from spectrim.integrations.folder import COMPANIONS, finalise, finer_than_held, round_to, write_folder
from spectrim.linalg.bits import PER_NUMBER, Unit, stored_size
from spectrim.linalg.fallback import Fallback, listening, summary
from spectrim.method import Method
from spectrim.model_method import ModelMethod
from spectrim.models.load import (
    STORED_DTYPES,
    Source,
    check_against_config,
    load_dense,
    meta_model,
    pick_device,
    pick_dtype,
    require_dense,
    resolve,
)
from spectrim.models.walk import find_layers
from spectrim.processes import present
from spectrim.reloaded import reload_difference
from spectrim.report.documents import write_documents
from spectrim.report.facts import build_report
from spectrim.reproducible import determinism, deterministic
from spectrim.request import Request
from spectrim.resume import Resume, ResumeOptions, resumable
from spectrim.same_for_all import facts_of_processes, of_all_ranks, require_same
from spectrim.store import (
    TensorInfo,
    check_companions,
    open_checkpoint,
    preflight,
    staged,
    write_manifest,
)
from spectrim.unsolved import unsolved_saved
from spectrim.windows_in_use import TextRead, cut_windows, read_text


@dataclass(kw_only=True)
class Compressed:
    """A compressed model in memory, with the report of what was done and measured."""

    model: PreTrainedModel  # stored dtype, spectrim format attached
    outcome: Outcome
    report: dict[str, Any]
    source: Source | None = None
    extra: Mapping[str, TensorInfo] = field(default_factory=dict)  # of the source, copied into the folder

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the folder atomically; it appears complete or not at all."""
        out = Path(folder)
        needed = sum(parameter.nbytes for parameter in self.model.parameters())
        preflight(out, source=self.source.folder if self.source else None, overwrite=overwrite, bytes_needed=needed)
        with staged(out, overwrite=overwrite) as stage:
            _fill(stage, self)
            write_documents(stage, self.report)
            seal(stage, self)
        return out


def run(
    request: Request,
    out: Path,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> Compressed:
    """The whole job. On any error the target is what it was before.

    Its state is saved in `OUT.resume` as `options` say; it goes on from the one it finds there. See resume.py.
    """
    if request.low_memory:
        from spectrim.low_memory_job import run_low_memory

        return run_low_memory(request, out, overwrite=overwrite, options=options, progress=progress)
    started = time.perf_counter()
    method = request.check()
    source = resolve(request.model)
    request = settled(request, method, source)
    foresee(request, method, source)
    check_sharding(method, request.shard_weights)
    needed = source.checkpoint.nbytes
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=needed)
    kept = resumable(request, method, source, out, options=options, needs_bytes=needed, progress=progress)
    with unsolved_saved(out), kept as resume:
        compressed = compress_source(request, method, source, progress=progress, resume=resume)
        with staged(out, overwrite=overwrite, needed_bytes=needed) as stage:
            clock = compressed.report["seconds"]
            _say(progress, "write", 0, 1)
            with timed(clock, "write"):
                _fill(stage, compressed)
            _say(progress, "reload in a fresh process", 0, 1)
            with timed(clock, "reload"):
                skips = request.allow_nonfinite == "skip"
                difference = reload_difference(stage, compressed.model, allow_nonfinite=skips)
            close_report(
                stage, compressed.report, difference=difference, started=started, device=pick_device(request.device),
                command=options.command,
            )  # fmt: skip
            seal(stage, compressed)
    compressed.report["folder"] = str(out)
    return compressed


def foresee(request: Request, method: Method, source: Source) -> None:
    """Refuse, from headers alone, what would otherwise fail after the weights are loaded."""
    if request.low_memory:
        method, _ = low_memory_method(request, method)
    require_dense(source)
    pick_device(request.device)
    pick_dtype(request.dtype, source.dtype)
    check_against_config(source)
    walk = find_layers(meta_model(source.config))
    refuse_large_sides(method, walk)
    check_groups(walk, request.factor_bits, request.factor_group_size)
    check_companions(source.folder, COMPANIONS)
    budget_of(method, walk, request.keep)
    way_of(pick_device(request.device), walk, method, request.options)
    if isinstance(method, ModelMethod):
        method.check_model(source.config, walk, request.keep)


def foresee_all(request: Request, method: Method, source: Source) -> None:
    """The same for a request of one size or of all, of which the smallest is the hardest."""
    hardest = dataclasses.replace(request, keep=request.anchors[-1]) if request.any_size else request
    foresee(hardest, method, source)


def compress_source(
    request: Request,
    method: Method,
    source: Source,
    *,
    progress: Progress | None = None,
    resume: Resume | None = None,
) -> Compressed:
    """Load, compress and evaluate; nothing is written but states, where `resume` is given."""
    with deterministic(request.deterministic), listening() as fallbacks:
        return _compress_source(request, method, source, progress, resume, fallbacks)


def _compress_source(
    request: Request,
    method: Method,
    source: Source,
    progress: Progress | None,
    resume: Resume | None,
    fallbacks: list[Fallback],
) -> Compressed:
    if request.any_size:
        raise UsageError(
            "any_size: this makes one size; for a folder that holds all sizes use `spectrim compress --any-size`, or "
            "spectrim.any_size_job.run_any_size(request, out)"
        )
    if request.low_memory:
        raise UsageError("low_memory writes a folder as it goes; use `spectrim.job.run(request, out)` or the command")
    device = pick_device(request.device)
    dtype = pick_dtype(request.dtype, source.dtype)
    said = require_same(request, source)
    clock: dict[str, float] = {}
    with timed(clock, "text"):
        text = present().first_only(lambda: read_text(request, source))
    _say(progress, "load", 0, 1)
    extra: dict[str, TensorInfo] = {}
    skips = request.allow_nonfinite == "skip"
    with timed(clock, "load"):
        dense = load_dense(source, device, allow_nonfinite=skips, warnings=said, extra=extra)
    with timed(clock, "text"):
        texts = present().from_first(lambda: cut_windows(request, method, dense, text, progress=progress))
    if resume is not None:
        resume.folder.claim(text_fields(texts))
    with nullcontext() if resume is None else resume.signals():
        outcome = compress_model(
            dense,
            method,
            request.keep,
            texts.calibration.ids,
            None if texts.training is None else texts.training.ids,
            recovery=request.recover,
            factor_bits=request.factor_bits,
            factor_group_size=request.factor_group_size,
            gradient_windows=request.gradient_windows,
            nonfinite=request.allow_nonfinite,
            seed=request.seed,
            progress=progress,
            checkpoint=shared(resume),
            insists=request.options,
            shard_weights=request.shard_weights,
        )
    outcome.seconds |= clock
    outcome.warnings += [*said, *finer_than_held(dense, dtype), *texts.warnings]
    round_to(outcome.model, dtype, allow_nonfinite=skips)
    with timed(outcome.seconds, "evaluate"):
        quality = judge(outcome, dense, texts.evaluation, progress)
    with timed(outcome.seconds, "samples"):
        samples = present().first_only(lambda: samples_of(dense, outcome, texts.evaluation, text))
    verdict = gate_of(quality, request.quality_gate)
    fallbacks = of_all_ranks(fallbacks)
    outcome.warnings += [*filter(None, [gate_warning(verdict)]), *summary(fallbacks)]
    if resume is not None:
        outcome.warnings.extend(resume.warnings)
    report = build_report(dataclasses.asdict(request), source, outcome, texts, quality, dtype)
    report |= {"quality_gate": verdict, "fallbacks": [f._asdict() for f in fallbacks], "samples": samples}
    report |= {"determinism": determinism(), **facts_of_processes()}
    if resume is not None:
        report["resumed"] = resume.resumed
    model = finalise(outcome, dtype, base_model=request.model)
    report["stored"]["format"] = "spectrim" if hasattr(model.config, "quantization_config") else "plain"
    return Compressed(model=model, outcome=outcome, report=report, source=source, extra=extra)


def samples_of(
    dense: PreTrainedModel, outcome: Outcome, windows: Windows | None, text: TextRead
) -> list[dict[str, Any]]:
    """What both models say after the beginnings of some evaluation windows."""
    if windows is None:
        return []
    return compare_samples(dense, outcome.model, windows.ids, text.tokenizer, warnings=outcome.warnings)


def judge(
    outcome: Outcome, dense: PreTrainedModel, windows: Windows | None, progress: Progress | None
) -> dict[str, Quality] | None:
    """Quality of the dense and the compressed model on the same windows."""
    if windows is None:
        return None
    _say(progress, "evaluate", 0, 1)
    quality = {
        "dense": evaluate(dense, windows.ids),
        "compressed": evaluate(outcome.model, windows.ids, dense=dense),
    }
    return quality


def gate_of(quality: Mapping[str, Quality] | None, factor: float) -> dict[str, Any]:
    """The verdict on what was measured, if anything was."""
    if quality is None:
        return judge_gate(None, None, factor)
    return judge_gate(quality["dense"].perplexity, quality["compressed"].perplexity, factor)


def _fill(stage: Path, compressed: Compressed) -> None:
    """Model and tokenizer; what they hold is counted for the report."""
    write_folder(stage, compressed.model, compressed.source, compressed.extra)
    written = open_checkpoint(stage)
    compressed.report["stored"] = {**compressed.report["stored"], **count_written(written, compressed)}


def seal(stage: Path, compressed: Compressed) -> None:
    """Checksums of everything; nothing is written after this."""
    facts = {"method": compressed.outcome.method.to_config(), "source": compressed.report["source"]["name"]}
    gate = {"quality_gate": compressed.report["quality_gate"]}
    write_manifest(stage, facts={"tool": "spectrim", **facts, **gate})


def count_written(checkpoint: Any, compressed: Compressed) -> dict[str, Any]:
    """Numbers and bytes of the decoder linears and of the whole model, counted from the written headers."""
    names = {layer.name for layer in compressed.outcome.walk.layers}
    linear = [info for name, info in checkpoint.tensors.items() if _is_inside(name, names)]
    unit = compressed.outcome.method.budget_unit
    after, numbers = sum(stored_in(info, unit) for info in linear), sum(info.numel for info in linear)
    nbytes = sum(stored_in(info, "bytes") for info in linear)
    if compressed.outcome.factor_quantization is not None:  # `keep` is of the numbers that codes stand for
        after = numbers = sum(replacement.numbers for replacement in compressed.outcome.placed.values())
    before = PER_NUMBER[unit] * compressed.outcome.plan.numbers_before
    if after > before * compressed.report["request"]["keep"] + 1e-6:
        raise NumericalError(
            f"the written decoder linears hold {after:,} {unit}, more than keep "
            f"{compressed.report['request']['keep']} of {before:,} allows; this is a bug of spectrim, please report it"
        )
    return {
        "linear_numbers": numbers,
        "linear_bytes": sum(info.nbytes for info in linear),
        "linear_counted": after,
        "keep": after / before,
        "keep_unit": unit,
        "linear_bytes_counted": nbytes,
        "keep_bytes": nbytes / (PER_NUMBER["bytes"] * compressed.outcome.plan.numbers_before),
        "model_numbers": checkpoint.numel,
        "model_bytes": checkpoint.nbytes,
    }


def stored_in(info: TensorInfo, unit: Unit) -> int:
    """What a tensor of the file counts."""
    return stored_size(info.numel, info.nbytes, floating=info.dtype in STORED_DTYPES, unit=unit)


def _is_inside(tensor: str, names: set[str]) -> bool:
    """Whether a tensor belongs to one of the named modules."""
    parts = tensor.split(".")
    return any(".".join(parts[:i]) in names for i in range(1, len(parts)))


def _say(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
