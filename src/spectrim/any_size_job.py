"""One run for all sizes, from a request to a published folder; the same order as in job.py.

Every anchor size is measured as it will be loaded; the default size is loaded again in a fresh process.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from spectrim.closing import close_report
from spectrim.data import Windows
from spectrim.engines.any_size import AnySize, compress_any_size
from spectrim.engines.clock import timed
from spectrim.engines.measure import Progress
from spectrim.engines.plan import all_sizes, untargeted_numbers
from spectrim.evaluate.gate import gate_warning, judge_gate
from spectrim.evaluate.language import Quality, evaluate
from spectrim.evaluate.samples import compare_samples
from spectrim.fingerprint import text_fields
from spectrim.integrations.folder import copy_in, round_to, write_nested
from spectrim.job import foresee_all
from spectrim.linalg.fallback import Fallback, listening, summary
from spectrim.method import LayerMethod, Method
from spectrim.models.load import Source, load_dense, meta_model, pick_device, pick_dtype, resolve
from spectrim.models.walk import find_layers
from spectrim.reloaded import reload_difference
from spectrim.report.any_size import build_any_size_report
from spectrim.reproducible import determinism, deterministic
from spectrim.request import Request
from spectrim.resume import Resume, ResumeOptions, resumable
from spectrim.several_job import refuse_several
from spectrim.store import TensorInfo, open_checkpoint, preflight, staged, write_manifest
from spectrim.unsolved import unsolved_saved
from spectrim.windows_in_use import cut_windows, read_text


def run_any_size(
    request: Request,
    out: Path,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The whole job; returns the report. On any error the target is what it was before; `options` as in job.run."""
    with unsolved_saved(out), deterministic(request.deterministic), listening() as fallbacks:
        return _run(request, out, overwrite, options, progress, fallbacks)


def _run(
    request: Request,
    out: Path,
    overwrite: bool,
    options: ResumeOptions,
    progress: Progress | None,
    fallbacks: list[Fallback],
) -> dict[str, Any]:
    refuse_several("a run for all sizes (--any-size)")
    started = time.perf_counter()
    skips = request.allow_nonfinite == "skip"
    method = request.check()
    source = resolve(request.model)
    foresee_all(request, method, source)
    device, dtype = pick_device(request.device), pick_dtype(request.dtype, source.dtype)
    needed = bytes_of_all_sizes(source, dtype, method, request.anchors)
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=needed)
    kept = resumable(request, method, source, out, options=options, needs_bytes=needed, progress=progress)
    with kept as resume:
        extra: dict[str, TensorInfo] = {}
        sizes, report = compress_sizes(request, method, source, resume, progress, fallbacks, extra)
        with staged(out, overwrite=overwrite, needed_bytes=needed) as stage:
            clock = report["seconds"]
            with timed(clock, "write"):
                write_nested(stage, sizes, dtype, request.keep, source, request.model, extra)
            written = open_checkpoint(stage)
            report["stored"] |= {"model_numbers": written.numel, "model_bytes": written.nbytes}
            default = sizes.at(request.keep)
            round_to(default, dtype, allow_nonfinite=skips)
            with timed(clock, "reload"):
                difference = reload_difference(stage, copy_in(default, dtype), allow_nonfinite=skips)
            report["reload"] = {"size": request.keep}
            close_report(stage, report, difference=difference, started=started, device=device, command=options.command)
            facts = {"tool": "spectrim", "method": sizes.method.to_config(), "source": source.name, "any_size": True}
            write_manifest(stage, facts={**facts, "quality_gate": report["quality_gate"]})
    report["folder"] = str(out)
    return report


def compress_sizes(
    request: Request,
    method: Method,
    source: Source,
    resume: Resume,
    progress: Progress | None,
    fallbacks: list[Fallback],
    extra: dict[str, TensorInfo],
) -> tuple[AnySize, dict[str, Any]]:
    """Text, model, all sizes, and the report on them; nothing is written but states. `extra` as in `load_dense`."""
    skips = request.allow_nonfinite == "skip"
    device, dtype = pick_device(request.device), pick_dtype(request.dtype, source.dtype)
    assert isinstance(method, LayerMethod)  # Request.check refuses others
    clock: dict[str, float] = {}
    with timed(clock, "text"):
        text = read_text(request, source)
    said: list[str] = []
    with timed(clock, "load"):
        dense = load_dense(source, device, allow_nonfinite=skips, warnings=said, extra=extra)
    with timed(clock, "text"):
        texts = cut_windows(request, method, dense, text, progress=progress)
    resume.folder.claim(text_fields(texts))
    with resume.signals():
        sizes = compress_any_size(
            dense,
            method,
            texts.calibration.ids,
            None if texts.training is None else texts.training.ids,
            anchors=request.anchors,
            steps=request.any_size_steps,
            dtype=dtype,
            gradient_windows=request.gradient_windows,
            nonfinite=request.allow_nonfinite,
            seed=request.seed,
            progress=progress,
            checkpoint=resume,
            insists=request.options,
        )
    sizes.warnings = (*sizes.warnings, *said, *texts.warnings, *resume.warnings)
    sizes.seconds |= clock
    with timed(sizes.seconds, "evaluate"):
        quality = judge_sizes(sizes, texts.evaluation, dtype, progress, allow_nonfinite=skips)
    samples: list[dict[str, Any]] = []
    unshown: list[str] = []
    if texts.evaluation is not None:
        with timed(sizes.seconds, "samples"):
            default = sizes.at(request.keep)
            round_to(default, dtype, allow_nonfinite=skips)
            samples = compare_samples(dense, default, texts.evaluation.ids, text.tokenizer, warnings=unshown)
    verdict = gate_of_sizes(quality, request.keep, request.quality_gate)
    sizes.warnings += (*unshown, *filter(None, [gate_warning(verdict)]), *summary(fallbacks))
    report = build_any_size_report(dataclasses.asdict(request), source, sizes, texts, quality, dtype)
    report |= {"quality_gate": verdict, "fallbacks": [f._asdict() for f in fallbacks], "samples": samples}
    report |= {"resumed": resume.resumed, "determinism": determinism()}
    return sizes, report


def bytes_of_all_sizes(source: Source, dtype: torch.dtype, method: Method, anchors: tuple[float, ...]) -> int:
    """What the folder's tensors will take: all components and adapters of all layers beside what is not touched."""
    model = meta_model(source.config)
    walk = find_layers(model)
    return untargeted_numbers(model, walk) * dtype.itemsize + all_sizes(walk, method, anchors, dtype).nbytes


def judge_sizes(
    sizes: AnySize,
    windows: Windows | None,
    dtype: torch.dtype,
    progress: Progress | None,
    *,
    allow_nonfinite: bool = False,
) -> dict[float | str, Quality] | None:
    """Quality of the dense model and of every anchor size on the same windows, each size rounded as it is stored."""
    if windows is None:
        return None
    quality: dict[float | str, Quality] = {"dense": evaluate(sizes.dense, windows.ids)}
    anchors = sizes.anchors[1:]
    for done, size in enumerate(anchors):
        if progress is not None:
            progress("evaluate sizes", done, len(anchors))
        model = sizes.at(size)
        round_to(model, dtype, allow_nonfinite=allow_nonfinite)
        quality[size] = evaluate(model, windows.ids, dense=sizes.dense)
    dense, last = quality["dense"].perplexity, quality[anchors[-1]].perplexity
    if last > 100 * dense:
        sizes.warnings += (
            f"perplexity goes from {dense:.2f} to {last:.0f} at size {anchors[-1]:g}: small sizes are not usable",
        )
    return quality


def gate_of_sizes(quality: dict[float | str, Quality] | None, size: float, factor: float) -> dict[str, Any]:
    """The verdict on the default size, or on the next smaller one that was measured."""
    if quality is None:
        return judge_gate(None, None, factor)
    measured = max((s for s in quality if isinstance(s, float) and s <= size), default=None)
    if measured is None:
        return judge_gate(None, None, factor)
    return judge_gate(quality["dense"].perplexity, quality[measured].perplexity, factor, size=measured)
