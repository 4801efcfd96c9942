"""One run, from a request to a published folder.

resolve and check the model -> preflight the output -> text -> load -> compress in memory -> evaluate
-> write beside the target -> count what was written -> reload in a fresh process -> publish by one rename

Its state is kept in OUT.resume until then: resume.py.
"""

import dataclasses
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.byte_budget import settled
from spectrim.data import Windows
from spectrim.engines.layerwise import refuse_large_sides
from spectrim.engines.masked import budget_of
from spectrim.engines.measure import Progress
from spectrim.engines.pipeline import Outcome, compress_model
from spectrim.engines.quantise_factors import check_groups
from spectrim.engines.shared_checkpoint import shared
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.evaluate.gate import gate_warning, judge_gate
from spectrim.evaluate.language import Quality, evaluate
from spectrim.integrations.folder import COMPANIONS, finalise, round_to, write_folder
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
from spectrim.processes import environment_of_one, present
from spectrim.report.card import model_card
from spectrim.report.facts import build_report
from spectrim.request import Request
from spectrim.resume import Resume, ResumeOptions, resumable, text_fields
from spectrim.same_for_all import facts_of_processes, of_all_ranks, require_same
from spectrim.store import (
    TensorInfo,
    check_companions,
    open_checkpoint,
    preflight,
    staged,
    write_json,
    write_manifest,
    write_text,
)
from spectrim.unsolved import unsolved_saved
from spectrim.windows_in_use import cut_windows, read_text

LOGIT_TOLERANCE = 1e-3
"""Largest difference between the logits before saving and after reloading, relative to the largest logit."""


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
            _seal(stage, self)
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
    started = time.perf_counter()
    method = request.check()
    source = resolve(request.model)
    request = settled(request, method, source)
    foresee(request, method, source)
    needed = source.checkpoint.nbytes
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=needed)
    kept = resumable(request, method, source, out, options=options, needs_bytes=needed, progress=progress)
    with unsolved_saved(out), kept as resume:
        compressed = compress_source(request, method, source, progress=progress, resume=resume)
        with staged(out, overwrite=overwrite, needed_bytes=needed) as stage:
            _say(progress, "write", 0, 1)
            _fill(stage, compressed)
            _say(progress, "reload in a fresh process", 0, 1)
            difference = reload_difference(stage, compressed.model, allow_nonfinite=request.allow_nonfinite == "skip")
            compressed.report["reload"] = {"relative_logit_difference": difference, "allowed": LOGIT_TOLERANCE}
            compressed.report["seconds"]["total"] = time.perf_counter() - started
            compressed.report["peak_memory_bytes"] = peak_memory(pick_device(request.device))
            _write_documents(stage, compressed.report)
            _seal(stage, compressed)
    compressed.report["folder"] = str(out)
    return compressed


def foresee(request: Request, method: Method, source: Source) -> None:
    """Refuse, from headers alone, what would otherwise fail after the weights are loaded."""
    require_dense(source)
    pick_device(request.device)
    pick_dtype(request.dtype, source.dtype)
    check_against_config(source)
    walk = find_layers(meta_model(source.config))
    refuse_large_sides(method, walk)
    check_groups(walk, request.factor_bits, request.factor_group_size)
    check_companions(source.folder, COMPANIONS)
    budget_of(method, walk, request.keep)
    if isinstance(method, ModelMethod):
        method.check_model(source.config, walk, request.keep)


def compress_source(
    request: Request,
    method: Method,
    source: Source,
    *,
    progress: Progress | None = None,
    resume: Resume | None = None,
) -> Compressed:
    """Load, compress and evaluate; nothing is written but states, where `resume` is given."""
    with listening() as fallbacks:
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
    device = pick_device(request.device)
    dtype = pick_dtype(request.dtype, source.dtype)
    said = require_same(request, source)
    text = present().first_only(lambda: read_text(request, source))
    clock = time.perf_counter()
    _say(progress, "load", 0, 1)
    extra: dict[str, TensorInfo] = {}
    dense = load_dense(source, device, allow_nonfinite=request.allow_nonfinite == "skip", warnings=said, extra=extra)
    load_s = time.perf_counter() - clock
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
        )
    outcome.seconds["load"] = load_s
    outcome.warnings += [*said, *texts.warnings]
    round_to(outcome.model, dtype, allow_nonfinite=request.allow_nonfinite == "skip")
    quality = judge(outcome, dense, texts.evaluation, progress)
    verdict = gate_of(quality, request.quality_gate)
    fallbacks = of_all_ranks(fallbacks)
    outcome.warnings += [*filter(None, [gate_warning(verdict)]), *summary(fallbacks)]
    if resume is not None:
        outcome.warnings.extend(resume.warnings)
    report = build_report(dataclasses.asdict(request), source, outcome, texts, quality, dtype)
    report |= {"quality_gate": verdict, "fallbacks": [fallback._asdict() for fallback in fallbacks]}
    report |= facts_of_processes()
    if resume is not None:
        report["resumed"] = resume.resumed
    model = finalise(outcome, dtype, base_model=request.model)
    report["stored"]["format"] = "spectrim" if hasattr(model.config, "quantization_config") else "plain"
    return Compressed(model=model, outcome=outcome, report=report, source=source, extra=extra)


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
    """Model, tokenizer, report, card."""
    write_folder(stage, compressed.model, compressed.source, compressed.extra)
    written = open_checkpoint(stage)
    compressed.report["stored"] = {**compressed.report["stored"], **_count(written, compressed)}
    _write_documents(stage, compressed.report)


def _write_documents(stage: Path, report: Mapping[str, Any]) -> None:
    write_json(stage / "report.json", report)
    if "method" in report["request"]:  # a model that was given in memory cannot be found again
        write_json(stage / "recipe.json", report["request"])
    write_text(stage / "README.md", model_card(report))


def _seal(stage: Path, compressed: Compressed) -> None:
    """Checksums of everything; nothing is written after this."""
    facts = {"method": compressed.outcome.method.to_config(), "source": compressed.report["source"]["name"]}
    gate = {"quality_gate": compressed.report["quality_gate"]}
    write_manifest(stage, facts={"tool": "spectrim", **facts, **gate})


def _count(checkpoint: Any, compressed: Compressed) -> dict[str, Any]:
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


def reload_difference(folder: Path, model: PreTrainedModel, *, allow_nonfinite: bool = False) -> float:
    """Largest logit difference, relative, between `model` and `folder` loaded in a fresh process.

    Logits that are not finite are an error; where they are allowed they must be the same ones on both sides.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16)[None] * 7919 % vocabulary
    with torch.no_grad():
        here = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    there = _logits_elsewhere(folder, ids, model.device)
    bad = ~torch.isfinite(there)
    if there.shape != here.shape or (bool(bad.any()) and not (allow_nonfinite and torch.equal(bad, ~here.isfinite()))):
        raise NumericalError(f"{folder}: the reloaded model gives logits of shape {tuple(there.shape)} or not finite")
    here, there = here.masked_fill(bad, 0), there.masked_fill(bad, 0)
    difference = float((here - there).abs().max() / here.abs().max().clamp(min=1e-30))
    if not difference <= LOGIT_TOLERANCE:  # also where NaN came before saving
        raise NumericalError(
            f"the reloaded model's logits differ by {difference:.2e} (relative), allowed {LOGIT_TOLERANCE:.0e}; "
            "nothing was published. This is a bug of spectrim or of this transformers version, please report it"
        )
    return difference


def _logits_elsewhere(folder: Path, ids: Tensor, device: torch.device) -> Tensor:
    with tempfile.TemporaryDirectory() as scratch:
        save_file({"ids": ids}, Path(scratch) / "in.safetensors")
        command = [sys.executable, "-m", "spectrim.integrations.reload", str(folder), scratch, str(device)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment_of_one())
        if done.returncode != 0:
            raise InputError(
                f"{folder}: the written folder cannot be loaded in a fresh process:\n{done.stderr.strip()[-2000:]}"
            )
        return load_file(Path(scratch) / "out.safetensors")["logits"]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Largest resident memory of this process, and of the GPU where there is one, in bytes."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def _say(progress: Progress | None, stage: str, done: int, total: int) -> None:
    if progress is not None:
        progress(stage, done, total)
