"""`spectrim verify`, `status`, `resume`, `clean`: whether a result is sound, and what runs have left behind."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli_options import Json
from spectrim.errors import InputError, ResourceError, UsageError
from spectrim.shard import SHARE, parse_shard, shard_target
from spectrim.terminal import command_line, emit, stdout

WAITS = "complete: waits for the run with --shard merge/N"


def verify(
    folder: Annotated[Path, typer.Argument(help="a folder that spectrim wrote")],
    json_: Json = False,
) -> None:
    """Check every file of a result against its manifest, and its tensors against config.json."""
    from spectrim.report.verify import find_problems

    problems = find_problems(folder)
    emit(
        {"folder": str(folder), "problems": problems},
        json_,
        lambda: stdout.print(f"{folder}: sound", soft_wrap=True) if not problems else None,
    )
    if problems:
        many = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        raise InputError(
            f"{folder}: {many}; copy or download the folder again, or make the model anew:\n  " + "\n  ".join(problems)
        )


def status(
    folder: Annotated[Path, typer.Argument(help="an output, or a folder of outputs")] = Path("."),
    json_: Json = False,
) -> None:
    """List runs that are under way or were stopped: whose, how far, how large, how to go on."""
    from spectrim.store.leftovers import find_leftovers

    found = find_leftovers(folder)

    def show() -> None:
        if not found:
            stdout.print(f"{folder}: nothing is left over", soft_wrap=True)
        for leftover in found:
            for line in describe(leftover):
                stdout.print(line, soft_wrap=True, markup=False)

    emit({"folder": str(folder), "found": [leftover.facts() for leftover in found]}, json_, show)


def describe(leftover: Any) -> list[str]:
    """What is to be said of one leftover, line by line."""
    age = f"{leftover.age_s / 3600:.1f} h" if leftover.age_s >= 3600 else f"{leftover.age_s / 60:.0f} min"
    lines = [f"{leftover.path}: {leftover.nbytes / 2**20:.1f} MiB, changed {age} ago"]
    if leftover.holder is not None:
        lines.append(f"  in use: {leftover.holder}")
    elif leftover.kind == "partial":
        lines.append("  left over by a run that was killed while it wrote; `spectrim clean` removes it")
    elif leftover.kind == "old":
        lines.append(f"  an old {leftover.out} that was to be replaced")
    if leftover.states:
        lines.append(f"  how far: {', '.join(f'step {step} of {stage}' for stage, step in leftover.states)}")
    elif leftover.kind == "resume":
        lines.append("  no state was saved yet")
    if leftover.scratch_bytes and leftover.holder is None and leftover.problem is None:
        scratch = f"{leftover.scratch_bytes / 2**20:.1f} MiB"
        lines.append(f"  {scratch} of it are scratch files of a dead run; `spectrim clean` removes them alone")
    if leftover.problem is not None:
        lines.append(f"  left alone: {leftover.problem}")
    elif leftover.holder is None and waits_for_merge(leftover):
        lines.append(f"  {WAITS}, which removes it")
    elif leftover.kind == "resume" and leftover.holder is None:
        lines.append(f"  to go on: {command_line(['resume', str(leftover.out)])}")
        if leftover.words is not None:
            lines.append(f"  that is:  {command_line(leftover.words)}    (in {leftover.folder})")
    return lines


def waits_for_merge(leftover: Any) -> bool:
    """Whether it is the complete sums of a task of a job array."""
    return any(stage == SHARE for stage, _ in leftover.states)


def resume(
    context: typer.Context, out: Annotated[Path, typer.Argument(help="the output of a run that was stopped")]
) -> None:
    """Go on with a run that was stopped, by the command that is recorded beside its output."""
    from spectrim.store.work import COMMAND, read_command, work_path

    work = work_path(out)
    if not work.is_dir():
        done = f"{out} is there; " if out.is_dir() else ""
        raise UsageError(f"{work}: no such folder: {done}there is no run to go on with (see `spectrim status`)")
    if not os.path.lexists(work / COMMAND):
        raise UsageError(f"{work}: has no {COMMAND}; type the command again that made it")
    words, folder = read_command(work)
    target = _target(words, folder)
    # The folder may come from anybody: it may go on with its own run, and with nothing else.
    if words[0] != "compress" or target is None or os.path.realpath(target) != os.path.realpath(out):
        raise InputError(f"{work / COMMAND}: is not a command that compresses to {out}; type the command yourself")
    try:
        os.chdir(folder)
    except OSError as error:
        raise ResourceError(
            f"{folder}: the run was started in this folder, which cannot be entered: {error.strerror}"
        ) from error
    typer.echo(command_line(words), err=True)
    sys.argv[1:] = words  # messages and records name the command that runs
    context.find_root().command.main(words)


def _target(words: list[str], folder: str) -> str | None:
    """The output that the words of a command work for, beside which its state lies; of a shard a name of its own."""
    out, shard = _last(words, "--out"), _last(words, "--shard")
    if out is None:
        return None
    path = Path(os.path.join(folder, out))
    return str(path if shard is None else shard_target(path, parse_shard(shard)))


def _last(words: list[str], option: str) -> str | None:
    """The value of the last `option`, as the parser takes it."""
    found = None
    for at, word in enumerate(words):
        if word == option and at + 1 < len(words):
            found = words[at + 1]
        elif word.startswith(f"{option}="):
            found = word.removeprefix(f"{option}=")
    return found


def clean(
    folder: Annotated[Path, typer.Argument(help="an output, or a folder of outputs")] = Path("."),
    all_: Annotated[
        bool,
        typer.Option(
            "--all",
            help="also the states of stopped runs, and old results set aside; complete shards only of an output that "
            "is named",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    json_: Json = False,
) -> None:
    """Remove what killed runs have left, scratch files included, unless a living process works in it."""
    from spectrim.store.leftovers import find_leftovers, is_named, removable, remove_leftover

    if json_ and not yes:
        raise UsageError("--json asks nothing: add --yes, or see `spectrim status --json`")
    found = find_leftovers(folder)
    chosen: list[tuple[Any, Any]] = []
    for leftover in found:
        shares = is_named(leftover, folder) or not waits_for_merge(leftover)
        part = removable(leftover, states=all_ and shares)
        if part is not None:
            chosen.append((leftover, part))
        if not json_:
            for line in _fate(leftover, part, asked=all_):
                stdout.print(line, soft_wrap=True, markup=False)
    if chosen and not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{folder}: {_counted(chosen)} to remove and nobody to ask; add --yes")
        chosen = chosen if typer.confirm(f"Remove {_counted(chosen)}?") else []
    for leftover, part in chosen:
        remove_leftover(leftover, part)
    gone = [leftover.facts() | {"part": part} for leftover, part in chosen]
    emit({"removed": gone}, json_, lambda: stdout.print(f"removed {_counted(chosen)}, of {len(found)} found"))


def _fate(leftover: Any, part: str | None, *, asked: bool) -> list[str]:
    """What `clean` will do with one leftover and, of complete shards that were asked for and stay, why."""
    line = describe(leftover)[0]
    if part is not None:
        return [f"remove  {line}" if part == "folder" else f"remove  the {part} in {line}"]
    lines = [f"keep    {line}"]
    if asked and waits_for_merge(leftover) and leftover.holder is None and leftover.problem is None:
        lines.append(f"        {WAITS}; to remove it: {command_line(['clean', str(leftover.whole), '--all'])}")
    return lines


def _counted(chosen: list[tuple[Any, Any]]) -> str:
    """How much is chosen, in words."""
    folders = sum(part == "folder" for _, part in chosen)
    runs = len(chosen) - folders
    told = [f"{folders} folder{'s' * (folders != 1)}"] if folders or not runs else []
    told += [f"the scratch files of {runs} run{'s' * (runs != 1)}"] if runs else []
    return " and ".join(told)
