"""`spectrim report`: several folders on one page, as a table, or as JSON."""

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli_options import Json
from spectrim.errors import UsageError
from spectrim.terminal import emit, print_table, stderr, stdout


def report(
    folders: Annotated[list[Path], typer.Argument(help="folders that `spectrim compress` wrote")],
    out: Annotated[Path | None, typer.Option(help="file to write the page to, e.g. page.html")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the page atomically")] = False,
    json_: Json = False,
) -> None:
    """Compare compressed folders: size against quality, figures, ranks layer by layer."""
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"{out}: exists; choose another --out, or add --overwrite to replace it")
    from spectrim.report.compare import HEADER, compare_page, differences, only_model, points_of, read_folders, row_of
    from spectrim.report.sections import Value
    from spectrim.store.writer import replace_text

    found = read_folders(folders)
    points = [point for folder in found for point in points_of(folder)]
    said, only = differences(found), only_model(points)
    if out is not None:
        replace_text(out, compare_page(found))

    def show() -> None:
        cells = [[cell.shown if isinstance(cell, Value) else str(cell) for cell in row_of(p, only)] for p in points]
        print_table("folders" if only is None else f"folders from {only}", list(HEADER), cells)
        for line in said:
            stderr.print(f"warning: {line}")
        if out is not None:
            stdout.print(f"written to {out}", soft_wrap=True)

    emit({"points": points, "warnings": said, "page": None if out is None else str(out)}, json_, show)
