"""A job array: tasks with one disk and no network between them measure a share of the windows each, one run goes on.

    --shard 1/8 ... 8/8   load the model, measure, leave the sums in OUT.shard-I-of-8.resume      shard_parts.py
    --shard merge/8       an ordinary run (job.py) that finds its first statistics there

Both are runs with a work folder, so that a stopped one goes on, two with the same name exclude each other, and another
command is refused. No task waits for another.
"""

import dataclasses
from pathlib import Path
from typing import Any

from spectrim.byte_budget import settled
from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.measure import Progress
from spectrim.engines.measure_blocks import whole_bytes
from spectrim.engines.pipeline import measure_share
from spectrim.engines.way import way_of
from spectrim.errors import ResourceError, UsageError
from spectrim.fingerprint import text_fields
from spectrim.job import Compressed, foresee, run
from spectrim.linalg.fallback import listening
from spectrim.method import Method
from spectrim.model_method import ModelMethod
from spectrim.models.load import Source, load_dense, meta_model, pick_device, resolve
from spectrim.models.walk import find_layers
from spectrim.processes import share_of
from spectrim.reproducible import deterministic
from spectrim.request import Request
from spectrim.resume import Resume, ResumeOptions, resumable
from spectrim.several_job import refuse_several
from spectrim.shard import SHARE, Shard, shard_target
from spectrim.shard_parts import ShardParts
from spectrim.stats import GRADIENT_STATS
from spectrim.store import preflight
from spectrim.windows_in_use import WindowsInUse, cut_windows, read_text

WITHOUT = "run it without --shard"


def run_shard(
    request: Request,
    out: Path,
    shard: Shard,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One task: its sums, in a folder beside `out`; what to say of it. Nothing is done where they are there already."""
    method, source, request = accepted(request)
    needed = whole_bytes(find_layers(meta_model(source.config)), method.needs)
    preflight(out, source=source.folder, overwrite=overwrite, bytes_needed=needed)
    options = dataclasses.replace(options, fields={"shards": shard.of, "shard": str(shard)}, stays=True)
    kept = resumable(
        request, method, source, shard_target(out, shard), options=options, needs_bytes=0, progress=progress
    )
    with deterministic(request.deterministic), listening(), kept as resume:
        found = resume.load(SHARE, optional=True)
        if found is None:
            _measure(request, method, source, shard, resume, progress)
        return {"shard": str(shard), "folder": str(resume.folder.path), "measured": found is None}


def run_merged(
    request: Request,
    out: Path,
    shard: Shard,
    *,
    overwrite: bool = False,
    options: ResumeOptions = ResumeOptions(),
    progress: Progress | None = None,
) -> Compressed:
    """The run whose first statistics are the sums of all tasks; they are removed when its result is there."""
    accepted(request)
    parts = ShardParts(out, shard.of, take_lock=options.take_lock, progress=progress)
    options = dataclasses.replace(options, fields={"shards": shard.of}, given=parts)
    return run(request, out, overwrite=overwrite, options=options, progress=progress)


def accepted(request: Request) -> tuple[Method, Source, Request]:
    """What every task of an array checks before anything is loaded; UsageError for what cannot be shared out so."""
    refuse_several("--shard")
    if request.any_size:
        raise UsageError(f"--shard is for one size, --any-size measures at several; {WITHOUT}")
    if request.low_memory:
        raise UsageError(f"--low-memory measures layer by layer, which --shard does not share out; {WITHOUT}")
    if request.shard_weights:
        raise UsageError(
            "--shard-weights shares weights out among processes that learn together, and what follows --shard is done "
            "by one; leave --shard-weights out"
        )
    if request.calib == "self":
        raise UsageError(f"--shard: with --calib self every task would write all of it; name a text, or {WITHOUT}")
    method = request.check()
    name = method.info.name
    if not method.needs:
        raise UsageError(f"method {name} has no first pass over the windows that could be shared out; {WITHOUT}")
    if isinstance(method, ModelMethod) and not method.reads_dense_stats:
        raise UsageError(f"method {name} measures layers behind those that it has compressed; {WITHOUT}")
    source = resolve(request.model)
    request = settled(request, method, source)
    foresee(request, method, source)
    walk = find_layers(meta_model(source.config))
    if not way_of(pick_device(request.device), walk, method, request.options).whole:
        raise UsageError(
            f"method {name}: the sums of all layers do not fit this device at once, so that the model is measured "
            f"block by block, which --shard does not share out; {WITHOUT}, or with --device cpu"
        )
    return method, source, request


def _measure(
    request: Request, method: Method, source: Source, shard: Shard, resume: Resume, progress: Progress | None
) -> None:
    """Load, measure the share of the windows, keep the sums."""
    assert shard.number is not None
    request = dataclasses.replace(request, eval="none")  # nothing is evaluated here
    text = read_text(request, source)
    dense = load_dense(
        source, pick_device(request.device), allow_nonfinite=request.allow_nonfinite == "skip", warnings=[], extra={}
    )
    texts = cut_windows(request, method, dense, text, progress=progress)
    _refuse_few(request, method, texts, shard)
    resume.folder.claim(text_fields(texts))
    with resume.signals():
        sums = measure_share(
            dense, method, texts.calibration.ids, share_of(shard.number - 1, shard.of),
            gradient_windows=request.gradient_windows, nonfinite=request.allow_nonfinite, seed=request.seed,
            progress=progress, checkpoint=resume,
        )  # fmt: skip
        if not resume.save(SHARE, sums, needed=True):
            raise ResourceError(f"the sums of shard {shard} could not be saved: {resume.warnings[-1]}")
        resume.forget("statistics")


def _refuse_few(request: Request, method: Method, texts: WindowsInUse, shard: Shard) -> None:
    """UsageError, in every task alike, where one of them would have no window, or none of those that give gradients."""
    ids = texts.calibration.ids
    least = len(ids)
    if method.needs & GRADIENT_STATS:
        default = default_gradient_windows(len(ids), pick_device(request.device), ids.shape[1])
        least = min(least, request.gradient_windows or default)
    if least < shard.of:
        raise UsageError(
            f"--shard {shard}: {least} calibration windows (those that give gradients, where there are fewer of them) "
            f"for {shard.of} tasks; each needs one at least: --calib-windows, --gradient-windows, or fewer tasks"
        )
