"""`spectrim push`, and `--push-to` of `spectrim compress`: a finished folder to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli_options import Json
from spectrim.terminal import emit, stderr, stdout

PushTo = Annotated[
    str | None, typer.Option(help="USER/NAME on the Hugging Face hub, to which the finished folder is uploaded")
]


def push(
    folder: Annotated[Path, typer.Argument(help="a folder that spectrim wrote")],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hugging Face hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="a repository that is made is private")] = False,
    json_: Json = False,
) -> None:
    """Upload a result to the Hugging Face hub, after its checksums were verified."""
    from spectrim.integrations.hub_push import push_folder

    done = push_folder(folder, repo, private=private)
    emit(done, json_, lambda: stdout.print(f"{folder}: pushed to {done['url']}", soft_wrap=True))


def check_push_to(repo: str | None) -> None:
    """Refuse at the start of a run what could not be pushed at its end."""
    if repo is not None:
        from spectrim.integrations.hub_push import check_push

        check_push(repo)


def push_result(out: Path, repo: str | None) -> None:
    """The push of `--push-to`, if it was asked for; the folder is complete whatever comes of it."""
    if repo is not None:
        from spectrim.integrations.hub_push import push_folder

        stderr.print(f"pushed to {push_folder(out, repo)['url']}")
