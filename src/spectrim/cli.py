"""The command line. Thin: it parses, calls, prints. Results go to stdout, everything else to stderr."""

import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spectrim.cli_any_size import compress_any_size
from spectrim.cli_doctor import doctor
from spectrim.cli_eval import eval_
from spectrim.cli_export import export
from spectrim.cli_generate import generate
from spectrim.cli_left import clean, resume, status, verify
from spectrim.cli_notes import say_if_slow
from spectrim.cli_options import (
    Deterministic,
    Json,
    ModelArg,
    QualityGate,
    Seed,
    ShardWeights,
    Size,
    TakeLock,
    Track,
    given_command,
    say_written,
)
from spectrim.cli_plan import plan
from spectrim.cli_push import PushTo, check_push_to, push, push_result
from spectrim.cli_ranks import started
from spectrim.cli_recipe import recipe_app
from spectrim.cli_report import report
from spectrim.cli_request import asks
from spectrim.cli_shard import ShardOption, compress_shard
from spectrim.cli_ui import ui
from spectrim.shard import parse_shard
from spectrim.terminal import emit, print_table, progress_printer, stdout
from spectrim.track import check_trackers, track_run

if TYPE_CHECKING:
    from spectrim.request import Request

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

app.command(name="eval")(eval_)
app.add_typer(recipe_app, name="recipe")
for command in (plan, doctor, verify, status, resume, clean, push, report):
    app.command()(command)


def main() -> None:
    """Entry point: exit codes as in docs/errors.md, a traceback only with SPECTRIM_DEBUG=1."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    with started():
        app()


@app.command()
@asks
def compress(
    request: "Request",
    out: Annotated[Path, typer.Option(help="folder to write; must not exist")],
    quality_gate: QualityGate = 100.0,
    seed: Seed = 0,
    deterministic: Deterministic = False,
    shard_weights: ShardWeights = None,
    shard: ShardOption = None,
    track: Track = [],  # noqa: B006  typer reads the default, nobody changes it
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="discard OUT.resume of a stopped run, start anew")] = False,
    take_lock: TakeLock = False,
    save_every: Annotated[float, typer.Option(help="seconds between saved states", min=0)] = 60.0,
    push_to: PushTo = None,
    json_: Json = False,
) -> None:
    """Compress a model and write a folder that plain transformers loads."""
    del quality_gate, seed, deterministic, shard_weights  # they are in the request
    method = request.check()  # before transformers is imported: a mistake is told at once
    check_push_to(push_to)
    trackers = check_trackers(track)
    part = None if shard is None else parse_shard(shard)
    say_if_slow(request, method, quiet=json_ or (part is not None and part.number is not None))
    from spectrim.evaluate.gate import refuse_failed
    from spectrim.report.card import table
    from spectrim.report.forms import FORMS_HEADER, forms_rows
    from spectrim.resume import ResumeOptions
    from spectrim.several_job import run_together

    options = ResumeOptions(
        save_every_s=save_every, restart=restart, take_lock=take_lock, command=given_command("compress")
    )
    if request.any_size and part is None:
        report = compress_any_size(request, out, overwrite, options, json_)
        track_run(trackers, report, out)
        refuse_failed(report)
        return push_result(out, push_to)
    if part is not None:
        made = compress_shard(request, out, part, overwrite, options, json_)
    else:
        made = run_together(request, out, overwrite=overwrite, options=options, progress=progress_printer(json_))
    if made is None:  # one of several processes, of which the first speaks, or of an array
        return None
    report = made.report

    def show() -> None:
        print_table(
            f"{request.model}, {report['method']['method']}, keep {report['stored']['keep']:.4f}",
            ["", "dense", "compressed"],
            [list(row) for row in table(report)],
        )
        print_table("by form", FORMS_HEADER, forms_rows(report["forms"]))
        say_written(out, report)

    emit(report, json_, show)
    track_run(trackers, report, out)
    refuse_failed(report)
    push_result(out, push_to)


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
            rows.append([r["name"], shape, r["form"], str(r["rank"]), f"{r['numbers']:,}", *values])
        header = ["layer", "shape", "form", "rank", "numbers", "largest s", "smallest s", "stable rank"]
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


for command in (generate, export, ui):
    app.command()(command)


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
