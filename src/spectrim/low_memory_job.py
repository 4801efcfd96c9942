"""One run of `--low-memory`, from a request to a published folder, with neither model ever in memory as a whole.

resolve and check the model -> preflight -> text -> look for NaN -> closed form, block by block (engines/low_memory.py)
-> write block by block beside the target (integrations/streamed_folder.py) -> read a few logits back in a fresh process
-> evaluate both models block by block -> publish by one rename

Scratch files lie in OUT.resume while it works. No states are saved: a run that is killed starts anew. The steps of
job.py that need whole models (samples of text, learned steps) are not taken; the report says so.
"""

import dataclasses
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from spectrim.closing import close_report
from spectrim.data import Windows
from spectrim.engines.clock import timed
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.low_memory import LowMemoryRun, limited
from spectrim.engines.low_memory_way import limit_of, low_memory_method
from spectrim.engines.measure import Progress
from spectrim.engines.outcome import Outcome
from spectrim.engines.plan import low_memory_bytes, sizes_of
from spectrim.engines.relay import Relay
from spectrim.engines.shelf import energies_in
from spectrim.evaluate.gate import gate_warning
from spectrim.evaluate.language import Quality
from spectrim.evaluate.streamed import evaluate_streamed
from spectrim.integrations.folder import finer_than_held
from spectrim.integrations.streamed_folder import hollow_result, write_streamed
from spectrim.job import Compressed, count_written, foresee, gate_of, seal
from spectrim.linalg.fallback import listening, summary
from spectrim.memory import held_dtype, release
from spectrim.method import LayerMethod, Method
from spectrim.models.load import Source, meta_model, pick_device, pick_dtype, resolve
from spectrim.models.streamed import Streamed, check_finite, open_streamed
from spectrim.models.walk import find_layers
from spectrim.reloaded import difference_of, few_tokens, logits_elsewhere
from spectrim.report.facts import build_report
from spectrim.reproducible import determinism, deterministic
from spectrim.request import Request
from spectrim.resume import Resume, ResumeOptions, resumable
from spectrim.store import open_checkpoint, preflight, staged
from spectrim.store.pieces import MOVED
from spectrim.store.scratch import Scratch
from spectrim.unsolved import unsolved_saved
from spectrim.windows_in_use import WindowsInUse, cut_windows, read_text

NO_SAMPLES = (
    "--low-memory: no samples of text were made, since each token would read the whole model again; "
    "`spectrim generate` makes them on a machine that holds the result"
)


def run_low_memory(
    request: Request,
    out: Path,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> Compressed:
    """The whole job. On any error the target is what it was before.

    The model of what comes back reads its blocks from `out` when they run.
    """
    started = time.perf_counter()
    method = request.check()
    source = resolve(request.model)
    method, told = low_memory_method(request, method)
    foresee(request, method, source)
    device = pick_device(request.device)
    needed = source.checkpoint.nbytes
    room = disk_room(request, method, source)
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=needed)
    kept = resumable(request, method, source, out, options=options, needs_bytes=needed, progress=progress)
    with unsolved_saved(out), kept as resume, deterministic(request.deterministic), limited(device):
        resume.folder.require_space(room)
        with listening() as fallbacks, closing(Scratch(resume.folder.path, device)) as scratch:
            job = _Job(request, method, source, device, scratch, progress)
            job.warnings += [*told, NO_SAMPLES]
            with staged(out, overwrite=overwrite, needed_bytes=needed) as stage:
                compressed = job.compress_into(stage)
                compressed.report["fallbacks"] = [fallback._asdict() for fallback in fallbacks]
                compressed.report["warnings"] += summary(fallbacks)
                _finish(stage, compressed, job, resume, options, started)
    compressed.report["folder"] = str(out)
    compressed.model = open_streamed(resolve(str(out)), device, job.dtype).model
    return compressed


def disk_room(request: Request, method: LayerMethod, source: Source) -> int:
    """Bytes of scratch files and the result at their most, from shapes."""
    device, model = pick_device(request.device), meta_model(source.config)
    sizes = sizes_of(source, method, request, find_layers(model), source.checkpoint.nbytes, device, whole=False)
    return low_memory_bytes(method, source, sizes, sum(p.numel() for p in model.parameters()), device).disk


def _finish(
    stage: Path, compressed: Compressed, job: "_Job", resume: Resume, options: ResumeOptions, started: float
) -> None:
    """What the report says last, and the checksums."""
    job.scratch.leave_if_stopped()
    report = compressed.report
    report["warnings"] += resume.warnings
    report["low_memory"] = {
        "gpu_limit_bytes": limit_of(job.device),
        "gpu_reserved_bytes": torch.cuda.max_memory_reserved(job.device) if job.device.type == "cuda" else None,
        "scratch_most_bytes": job.scratch.most_bytes,
        "read_bytes": MOVED.read - job.moved[0],
        "written_bytes": MOVED.written - job.moved[1],
    }
    close_report(stage, report, difference=job.difference, started=started, device=job.device, command=options.command)
    seal(stage, compressed)


class _Job:
    """One compression into a folder."""

    def __init__(
        self,
        request: Request,
        method: Method,
        source: Source,
        device: torch.device,
        scratch: Scratch,
        progress: Progress | None,
    ) -> None:
        self.request, self.method, self.source, self.device = request, method, source, device
        self.scratch, self.progress = scratch, progress
        self.dtype, self.held = (
            pick_dtype(request.dtype, source.dtype),
            held_dtype(device, source.dtype, source.checkpoint.numel),
        )
        self.clock: dict[str, float] = {}
        self.difference = math.nan  # of the logits read back, when they are
        self.warnings: list[str] = []
        self.moved = MOVED.read, MOVED.written

    def compress_into(self, stage: Path) -> Compressed:
        """The folder's model and tokenizer, and the report but for what only the end knows."""
        dense, texts = self._open()
        self.warnings += [*finer_than_held(dense.model, self.dtype), *texts.warnings]
        run = self._run(dense, texts)
        spectra, plan = run.closed_form(texts.calibration.ids)
        outcome = Outcome(
            model=hollow_result(run, self.source, plan, self.dtype),
            method=self.method,
            walk=run.walk,
            plan=plan,
            placed={},
            energies=energies_in(spectra),
            gradient_windows=run.gradient_windows,
        )
        with timed(self.clock, "write"):
            outcome.placed, logits = write_streamed(stage, run, spectra, outcome, self.dtype, self.source, dense.extra)
        del spectra
        release()
        with timed(self.clock, "reload"):
            there = logits_elsewhere(stage, few_tokens(dense.model), self.device, streamed=True)
            self.difference = difference_of(stage, logits, there)
        self.say("reload", 1, 1)
        with timed(self.clock, "evaluate"):
            quality = self._judge(run, stage, texts.evaluation)
        outcome.seconds, outcome.warnings = self.clock, [*self.warnings, *run.warnings]
        report = self._report(outcome, texts, quality)
        compressed = Compressed(
            model=outcome.model, outcome=outcome, report=report, source=self.source, extra=dense.extra
        )
        report["stored"] |= count_written(open_checkpoint(stage), compressed)
        report["stored"]["format"] = "spectrim"
        return compressed

    def _open(self) -> tuple[Streamed, WindowsInUse]:
        """The dense model, and the windows."""
        with timed(self.clock, "text"):
            text = read_text(self.request, self.source)
        self.say("load", 0, 1)
        with timed(self.clock, "load"):
            check_finite(self.source, self.device)
            dense = open_streamed(self.source, self.device, self.held)
        self.say("load", 1, 1)
        self.warnings += dense.warnings
        with timed(self.clock, "text"):
            return dense, cut_windows(self.request, self.method, dense.model, text, progress=self.progress)

    def _run(self, dense: Streamed, texts: WindowsInUse) -> LowMemoryRun:
        ids = texts.calibration.ids
        given = self.request.gradient_windows
        steep = default_gradient_windows(len(ids), self.device, ids.shape[1]) if given is None else given
        return LowMemoryRun(
            dense.model, self.method, dense.walk, self.request.keep, self.request.seed, self.progress, self.clock,
            steep, length=ids.shape[1], streamed=dense, scratch=self.scratch,
        )  # fmt: skip

    def _judge(self, run: LowMemoryRun, stage: Path, windows: Windows | None) -> dict[str, Quality] | None:
        """Quality of the dense model and of what was written, in the precision that the dense one is held in."""
        if windows is None:
            return None
        self.say("evaluate", 0, 1)
        small = open_streamed(resolve(str(stage)), self.device, self.held)
        relay = Relay(small.model, small.walk, run.relay.gives_tuple)
        dense, both = evaluate_streamed(run.relay, relay, windows.ids, hold=run.hold, after=run.streamed.home.let_go)
        return {"dense": dense, "compressed": both}

    def _report(self, outcome: Outcome, texts: WindowsInUse, quality: dict[str, Quality] | None) -> dict[str, Any]:
        verdict = gate_of(quality, self.request.quality_gate)
        outcome.warnings += filter(None, [gate_warning(verdict)])
        report = build_report(dataclasses.asdict(self.request), self.source, outcome, texts, quality, self.dtype)
        return report | {"quality_gate": verdict, "samples": [], "resumed": [], "determinism": determinism()}

    def say(self, stage: str, done: int, total: int) -> None:
        """Tell how far it is."""
        if self.progress is not None:
            self.progress(stage, done, total)
