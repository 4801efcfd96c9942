"""`spectrim export`: a compressed folder in another form."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli_options import Json, ModelArg
from spectrim.errors import UsageError
from spectrim.terminal import emit, stdout

FORMS = ("dense", "size", "portable", "onnx", "executorch")


def export(
    folder: ModelArg,
    out: Annotated[Path, typer.Option(help="folder to write")],
    to: Annotated[
        str | None,
        typer.Option(
            help="dense: multiply the factors back; size: one of all sizes, the default with --keep; portable: with "
            "the code of its layers, for trust_remote_code=True without spectrim; onnx: for ONNX Runtime; executorch: "
            "for ExecuTorch"
        ),
    ] = None,
    keep: Annotated[float | None, typer.Option(help="the size to take from a folder that holds all sizes")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT atomically")] = False,
    json_: Json = False,
) -> None:
    """Write a compressed folder in another form."""
    to = to or ("dense" if keep is None else "size")
    if to not in FORMS:
        raise UsageError(f"--to {to}: not supported; known: {', '.join(FORMS)}")
    if to == "size" and keep is None:
        raise UsageError("--to size needs --keep, the size to write")
    from spectrim.models.load import resolve

    facts = exporter(to)(resolve(folder), out, size=keep, overwrite=overwrite)

    def show() -> None:
        error = f", relative error of the logits {facts['error']:.1e}" if "error" in facts else ""
        stdout.print(f"written to {out}: {facts['numbers']:,} numbers{error}", soft_wrap=True)

    emit(facts, json_, show)


def exporter(to: str) -> Callable[..., dict[str, Any]]:
    """Imported at need: the command line starts without torch."""
    if to == "portable":
        from spectrim.integrations.portable import export_portable

        return export_portable
    if to == "onnx":
        from spectrim.integrations.onnx import export_onnx

        return export_onnx
    if to == "executorch":
        from spectrim.integrations.executorch import export_executorch

        return export_executorch
    from spectrim.integrations.export import export_dense, export_size

    return export_size if to == "size" else export_dense
