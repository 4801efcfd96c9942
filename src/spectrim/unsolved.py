"""A matrix that no solver could decompose is kept beside the target: with it a bug report can be acted on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from spectrim.errors import NumericalError
from spectrim.store.target import absolute


@contextmanager
def unsolved_saved(out: Path) -> Iterator[None]:
    """Where an error carries the matrix, it is written to `OUT.unsolved.safetensors` and the message says so."""
    try:
        yield
    except NumericalError as error:
        if error.matrix is not None:
            error.args = (f"{error}. {_save(error.matrix, absolute(out))}",)
        raise


def _save(matrix, out: Path) -> str:
    path = out.with_name(f"{out.name}.unsolved.safetensors")
    try:
        save_file({"matrix": matrix.contiguous()}, path)
    except (OSError, SafetensorError) as error:
        return f"The matrix could not be saved in {path} ({error})"
    return f"The matrix is kept in {path}; if it is finite, please report it as a bug of the solver with that file"
