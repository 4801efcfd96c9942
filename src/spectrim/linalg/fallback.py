"""What did not go the usual way but went: told to whoever listens, so that a run can count and report it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Fallback(NamedTuple):
    """One piece of work that was done in another way than the usual one."""

    operation: str  # "eigh", "svd", "calibrate", ...
    size: str  # of what was worked on: "64 x 64", "4 windows"
    way: str  # the one that worked
    why: str  # what the ways before it said


_listener: ContextVar[list[Fallback] | None] = ContextVar("fallbacks", default=None)


@contextmanager
def listening() -> Iterator[list[Fallback]]:
    """All fallbacks inside the block, as they happen; inside another `listening`, the inner one hears them."""
    heard: list[Fallback] = []
    token = _listener.set(heard)
    try:
        yield heard
    finally:
        _listener.reset(token)


def tell(fallback: Fallback) -> None:
    """To whoever listens; else nobody is told."""
    heard = _listener.get()
    if heard is not None:
        heard.append(fallback)


def heard() -> list[Fallback]:
    """A copy of what was told so far; empty where nobody listens."""
    return list(_listener.get() or ())


def recall(earlier: Iterable[Fallback]) -> list[Fallback]:
    """Counts what an earlier process was told, which came first; what was told here again counts once.

    Returns what was not.
    """
    listener = _listener.get()
    if listener is None:
        return []
    again = Counter(listener)
    missing = []
    for fallback in earlier:
        if again[fallback]:
            again[fallback] -= 1
        else:
            missing.append(fallback)
    listener[:0] = missing
    return missing


def take_back(recalled: Iterable[Fallback]) -> None:
    """What was recalled has turned out to be of another run."""
    listener = _listener.get()
    if listener is not None:
        for fallback in recalled:
            listener.remove(fallback)


def summary(fallbacks: list[Fallback]) -> list[str]:
    """One line for each operation and way: how often, and why the first time."""
    kinds: dict[tuple[str, str], list[Fallback]] = {}
    for fallback in fallbacks:
        kinds.setdefault((fallback.operation, fallback.way), []).append(fallback)
    return [
        f"{operation}: {len(found)} times done with {way} ({found[0].size}; {found[0].why})"
        for (operation, way), found in kinds.items()
    ]
