"""The command line. Thin: it parses, calls, prints. Results go to stdout, everything else to stderr."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli_eval import eval_
from spectrim.cli_left import clean, resume, status, verify
from spectrim.cli_options import (
    ANCHORS,
    AllowNonfinite,
    Anchors,
    AnySize,
    AnySizeSteps,
    Bytes,
    Calib,
    CalibWindows,
    Device,
    Dtype,
    FactorBits,
    FactorGroupSize,
    Json,
    Keep,
    KeepBytes,
    KeepOrNone,
    Method,
    MethodOrNone,
    ModelArg,
    Preset,
    QualityGate,
    Recover,
    Seed,
    Set,
    Size,
    TakeLock,
    Tokenizer,
    given_command,
    parse_anchors,
    parse_options,
    say_written,
)
from spectrim.cli_ranks import started
from spectrim.errors import UsageError
from spectrim.options import METHOD, METHOD_IN_BYTES, parse_bytes
from spectrim.terminal import emit, print_table, progress_printer, stdout

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.command(name="eval")(eval_)
for command in (verify, status, resume, clean):
    app.command()(command)


def main() -> None:
    """Entry point: exit codes as in docs/errors.md, a traceback only with SPECTRIM_DEBUG=1."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with started():
        app()


@app.command()
def compress(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    keep: KeepOrNone = None,
    bytes_: Bytes = None,
    keep_bytes: KeepBytes = None,
    any_size: AnySize = False,
    anchors: Anchors = ANCHORS,
    any_size_steps: AnySizeSteps = 1600,
    method: MethodOrNone = None,
    preset: Preset = None,
    set_: Set = [],  # noqa: B006  typer reads the default, nobody changes it
    recover: Recover = [],  # noqa: B006
    factor_bits: FactorBits = None,
    factor_group_size: FactorGroupSize = 128,
    calib: Calib = "builtin:stdlib",
    calib_windows: CalibWindows = None,
    calib_length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    gradient_windows: Annotated[
        int | None, typer.Option(help="windows that give gradients (default: all on a GPU, a quarter on a CPU)")
    ] = None,
    train_windows: Annotated[
        int | None, typer.Option(help="windows for learned steps, at most (default: as many as the steps go through)")
    ] = None,
    eval_: Annotated[str, typer.Option("--eval", help="evaluation text, as for --calib, or none")] = "builtin:stdlib",
    eval_windows: Annotated[int, typer.Option(help="evaluation windows")] = 40,
    quality_gate: QualityGate = 100.0,
    allow_nonfinite: AllowNonfinite = "refuse",
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard OUT.resume of a stopped run, start anew")] = False,
    take_lock: TakeLock = False,
    save_every: Annotated[float, typer.Option(help="seconds between saved states", min=0)] = 60.0,
    json_: Json = False,
) -> None:
    """Compress a model and write a folder that plain transformers loads."""
    from spectrim.request import Request

    sizes = parse_anchors(anchors)
    in_bytes = bytes_ is not None or keep_bytes is not None
    if in_bytes and keep is not None:
        raise UsageError("--keep and a budget in bytes (--bytes, --keep-bytes) exclude each other; pass one of them")
    keep = (sizes[0] if any_size else 0.8) if keep is None else keep
    request = Request(
        model=model, keep=keep, method=method or (METHOD_IN_BYTES if in_bytes else METHOD), preset=preset,
        options=parse_options(set_), recover=tuple(recover),
        model_bytes=None if bytes_ is None else parse_bytes(bytes_), keep_bytes=keep_bytes,
        calib=calib, calib_windows=calib_windows, calib_length=calib_length, gradient_windows=gradient_windows,
        train_windows=train_windows, eval=eval_, eval_windows=eval_windows, tokenizer=tokenizer, device=device,
        dtype=dtype, seed=seed, any_size=any_size, anchors=sizes, any_size_steps=any_size_steps,
        quality_gate=quality_gate, factor_bits=factor_bits, factor_group_size=factor_group_size,
        allow_nonfinite=allow_nonfinite,  # type: ignore[arg-type]  checked there
    )  # fmt: skip
    request.check()  # before transformers is imported: a mistake is told at once
    from spectrim.evaluate.gate import refuse_failed
    from spectrim.report.card import table
    from spectrim.resume import ResumeOptions
    from spectrim.several_job import run_together

    options = ResumeOptions(
        save_every_s=save_every, restart=restart, take_lock=take_lock, command=given_command("compress")
    )
    if any_size:
        _compress_any_size(request, out, overwrite, options, json_)
        return
    made = run_together(request, out, overwrite=overwrite, options=options, progress=progress_printer(json_))
    if made is None:  # one of several processes; the first speaks
        return
    report = made.report

    def show() -> None:
        print_table(
            f"{model}, {report['method']['method']}, keep {report['stored']['keep']:.4f}",
            ["", "dense", "compressed"],
            [list(row) for row in table(report)],
        )
        say_written(out, report)

    emit(report, json_, show)
    refuse_failed(report)


def _compress_any_size(request: Any, out: Path, overwrite: bool, options: Any, json_: bool) -> None:
    from spectrim.any_size_job import run_any_size
    from spectrim.evaluate.gate import refuse_failed
    from spectrim.report.any_size import size_header, size_table

    report = run_any_size(request, out, overwrite=overwrite, options=options, progress=progress_printer(json_))

    def show() -> None:
        print_table(f"{request.model}, {report['method']['method']}", size_header(report), size_table(report))
        say_written(out, report, f", size_ratio={request.keep:g}")

    emit(report, json_, show)
    refuse_failed(report)


@app.command()
def plan(
    model: ModelArg,
    keep: Keep = 0.8,
    method: Method = "soco",
    preset: Preset = None,
    set_: Set = [],  # noqa: B006
    calib_windows: CalibWindows = None,
    calib_length: Annotated[int, typer.Option(help="tokens in a window")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_: Json = False,
) -> None:
    """Say what `compress` would do, without touching a weight."""
    from spectrim.request import Request

    request = Request(
        model=model, keep=keep, method=method, preset=preset, options=parse_options(set_), device=device, dtype=dtype,
        calib_windows=calib_windows, calib_length=calib_length,
    )  # fmt: skip
    configured = request.check()  # as above
    from spectrim.engines.plan import estimate
    from spectrim.job import foresee
    from spectrim.models.load import pick_device, pick_dtype, resolve

    source = resolve(model)
    foresee(request, configured, source)
    facts = estimate(
        source, configured, keep, windows=request.statistics_windows, length=calib_length,
        dtype=pick_dtype(dtype, source.dtype), device=pick_device(device),
    )  # fmt: skip

    def show() -> None:
        rows = [
            [
                r["name"],
                "x".join(map(str, r["shape"])),
                r["codec"],
                str(r["rank"] or "by calibration"),
                f"{r['dense']:,}",
            ]
            for r in facts["layers"]
        ]
        print_table(f"{model}, {method}, keep {keep}", ["layer", "shape", "codec", "rank", "dense numbers"], rows)
        for part in ("linear_numbers", "model_numbers", "model_bytes"):
            stdout.print(f"{part:18} {facts[part]['before']:>16,} -> {facts[part]['after']:,}")
        stdout.print(f"{'peak memory':18} about {facts['peak_memory_bytes'] / 2**30:.2f} GiB")
        stdout.print(f"{'disk':18} {facts['disk_bytes'] / 2**20:.1f} MiB")
        stdout.print(f"{'time':18} about {facts['seconds']:.0f} s on {facts['device']}")
        for row in facts["untouched"]:
            stdout.print(f"untouched: {row['name']} ({row['numbers']:,} numbers): {row['why']}")

    emit(facts, json_, show)


@app.command()
def inspect(
    folder: ModelArg,
    size: Size = None,
    spectrum: Annotated[bool, typer.Option(help="compute singular values")] = True,
    json_: Json = False,
) -> None:
    """Show what a folder holds: codecs, ranks, sizes, spectra."""
    from spectrim.models.load import resolve
    from spectrim.report.inspect import inspect_folder

    facts = inspect_folder(resolve(folder), spectrum=spectrum, size=size)

    def show() -> None:
        rows = []
        for r in facts["layers"]:
            s = r.get("spectrum")
            values = [f"{s[k]:.4g}" for k in ("largest", "smallest", "stable_rank")] if s else ["", "", ""]
            shape = "x".join(map(str, r["shape"]))
            rows.append([r["name"], shape, r["codec"], str(r["rank"]), f"{r['numbers']:,}", *values])
        header = ["layer", "shape", "codec", "rank", "numbers", "largest s", "smallest s", "stable rank"]
        all_sizes = facts["any_size"]
        at = f", size {facts['size_ratio']:g}" if all_sizes else ""
        print_table(f"{folder}: {facts['format']}, {facts['dtype']}{at}", header, rows)
        share = facts["linear_numbers"] / facts["linear_numbers_dense"]
        codecs = {r["codec"] for r in facts["layers"]}
        packed = any(codec == "packed" or codec.startswith("quantised") for codec in codecs)  # bytes are what counts
        of_bytes = facts["linear_bytes"] / facts["linear_bytes_dense"]
        keep = f"keep {of_bytes:.4f} of {facts['linear_bytes_dense']:,} bytes" if packed else f"keep {share:.4f}"
        stdout.print(
            f"decoder linears {facts['linear_numbers']:,} numbers ({keep}); "
            f"{'folder' if all_sizes else 'whole model'} {facts['numbers']:,} numbers, {facts['bytes']:,} bytes",
            markup=False,
        )
        if all_sizes:
            stdout.print(
                f"holds every size from {all_sizes['anchors'][-1]:g} to 1 in {all_sizes['storage']} storage, scores at "
                f"{', '.join(f'{a:g}' for a in all_sizes['anchors'])}; shown: {facts['size_ratio']:g} (--size)",
                markup=False,
            )

    emit(facts, json_, show)


@app.command()
def generate(
    folder: ModelArg,
    prompt: Annotated[str, typer.Option(help="text to continue")],
    size: Size = None,
    max_new_tokens: Annotated[int, typer.Option(help="how many tokens, at most", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    tokenizer: Tokenizer = None,
    device: Device = "auto",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt."""
    import torch

    from spectrim.data import load_tokenizer
    from spectrim.models.load import check_vocabulary, context_length, load_model, pick_device, resolve

    source, where = resolve(folder), pick_device(device)
    words = load_tokenizer(tokenizer or source.folder)
    ids = words(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if ids.shape[1] == 0:
        raise UsageError("--prompt is empty; give at least one word")
    limit = context_length(source.config)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise UsageError(
            f"a prompt of {ids.shape[1]} tokens and --max-new-tokens {max_new_tokens} pass the {limit} tokens that "
            "the model reads; shorten one of them"
        )
    model = load_model(source, where, size=size)
    check_vocabulary(model, ids)
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **sampling)  # type: ignore[operator]
    text = str(words.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    emit({"prompt": prompt, "text": text}, json_, lambda: stdout.print(prompt + text, soft_wrap=True))


@app.command()
def export(
    folder: ModelArg,
    out: Annotated[Path, typer.Option(help="folder to write")],
    to: Annotated[
        str | None,
        typer.Option(help="dense: multiply the factors back; size: one of all sizes, the default with --keep"),
    ] = None,
    keep: Annotated[float | None, typer.Option(help="the size to take from a folder that holds all sizes")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    json_: Json = False,
) -> None:
    """Write a compressed folder in another form."""
    to = to or ("dense" if keep is None else "size")
    if to not in ("dense", "size"):
        raise UsageError(f"--to {to}: not supported; known: dense, size")
    if to == "size" and keep is None:
        raise UsageError("--to size needs --keep, the size to write")
    from spectrim.integrations.export import export_dense, export_size
    from spectrim.models.load import resolve

    source = resolve(folder)
    if to == "size" and keep is not None:
        facts = export_size(source, out, size=keep, overwrite=overwrite)
    else:
        facts = export_dense(source, out, size=keep, overwrite=overwrite)
    emit(facts, json_, lambda: stdout.print(f"written to {out}: {facts['numbers']:,} numbers", soft_wrap=True))


@app.command()
def methods(json_: Json = False) -> None:
    """List all methods."""
    from spectrim.registry import describe_methods

    rows = describe_methods()
    emit(
        rows,
        json_,
        lambda: print_table(
            "methods",
            ["name", "family", "paper", "needs", "cost", "presets", "promise"],
            [[r["name"], r["family"], r["paper"], ", ".join(r["needs"]) or "nothing", r["cost"],
              ", ".join(r["presets"]), r["promise"]] for r in rows],
        ),
    )  # fmt: skip
