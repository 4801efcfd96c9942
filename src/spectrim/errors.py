"""The errors that spectrim shows to people: one type for each exit code.

Every message says what happened, where, what was measured, what is allowed, and what to do.
A plain Python exception that reaches the command line is a bug of ours and exits with 6.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class SpectrimError(Exception):
    """Base of all errors meant for people. `exit_code` is what the command line returns."""

    exit_code = 6


class UsageError(SpectrimError):
    """A wrong option, method, budget or configuration; nothing was read or written."""

    exit_code = 2


class InputError(SpectrimError):
    """A model folder, file or text that cannot be used as it is."""

    exit_code = 3


class ResourceError(SpectrimError):
    """Too little disk or memory, a folder that cannot be written, a device that is not there."""

    exit_code = 4


class NumericalError(SpectrimError):
    """NaN or Inf where a number must be, a solver that does not converge, a diverged training run."""

    exit_code = 5
    matrix: Any = None
    """What no solver could decompose, a tensor on the CPU; None for every other error."""


class Interrupted(SpectrimError):
    """SIGINT or SIGTERM arrived; the current step was finished and nothing half-written is left."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


def without_tokens(text: str) -> str:
    """What another program said, with access tokens of the Hugging Face hub blacked out."""
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", re.sub(r"(?i)(bearer )\S+", r"\1***", text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'svd-llm'?"` when a known name is close to `word`, else the list of known names."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
