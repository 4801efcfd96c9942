"""`spectrim doctor`: what this machine can do, what is installed, what is missing and for what it would be needed."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli_options import Json
from spectrim.terminal import emit, stdout


def doctor(
    folder: Annotated[Path, typer.Option(help="where results would be written: its disk is looked at")] = Path("."),
    hub: Annotated[bool, typer.Option(help="try to reach the model hub, for two seconds at most")] = True,
    json_: Json = False,
) -> None:
    """Say what this machine can do: exit 0 unless something that is needed is broken, else 4."""
    from spectrim.doctor import examine, lines

    found = examine(folder, hub=hub)

    def show() -> None:
        for line in lines(found):
            stdout.print(line, soft_wrap=True)

    emit(found, json_, show)
    if found["broken"]:
        raise typer.Exit(4)
