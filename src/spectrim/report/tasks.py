"""Task figures as rows of text: for the terminal and for Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from spectrim.evaluate.intervals import Interval
from spectrim.evaluate.tasks import Accuracy, TaskResult
from spectrim.terminal import print_table, stdout

HEADER = ["task", "items", "chance", "figure", "model", "dense", "model - dense", "agreement"]


def rows(results: Sequence[TaskResult]) -> list[list[str]]:
    """A row for each figure of each task, BLiMP's fields below it; shares in %, 95 % intervals in brackets."""
    return [row for result in results for row in _rows_of(result)]


def show(results: Sequence[TaskResult], skipped: Sequence[dict[str, str]]) -> None:
    """The table and the notes on stdout."""
    print_table("tasks: %, with 95 % intervals", HEADER, rows(results))
    for note in notes(results, skipped):
        stdout.print(note, soft_wrap=True)


def facts(result: TaskResult) -> dict[str, Any]:
    """A result as JSON: intervals are {low, high}."""
    return asdict(result, dict_factory=_named)


def _named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value._asdict() if isinstance(value, Interval) else value for key, value in pairs}


def notes(results: Sequence[TaskResult], skipped: Sequence[dict[str, str]]) -> list[str]:
    """What the figures do not show: items left out, contexts cut, files that are no tasks."""
    found = [
        f"{r.task}: {r.items:,} of {r.items_in_file:,} items, drawn with seed {r.seed}"
        for r in results
        if r.items < r.items_in_file
    ]
    found += [f"{r.task}: {r.truncated:,} of {r.items:,} items cut on the left" for r in results if r.truncated]
    return found + [f"not a task: {s['why']}" for s in skipped]


def _rows_of(result: TaskResult) -> Iterator[list[str]]:
    chance = "" if result.chance is None else _share(result.chance)
    first = [result.task, f"{result.items:,}", chance]
    yield [*first, "acc", *_cells(result.acc)]
    if result.acc_norm is not None:
        yield ["", "", "", "acc_norm", *_cells(result.acc_norm)]
    if result.target_perplexity is not None:
        dense = result.dense_target_perplexity
        figures = [f"{result.target_perplexity:.2f}", "" if dense is None else f"{dense:.2f}"]
        yield ["", "", "", "target perplexity", *figures, "", ""]
    for name, part in (result.fields or {}).items():
        yield ["", "", "", f"acc, {name}", *_cells(part)]


def _cells(figure: Accuracy) -> list[str]:
    value = f"{_share(figure.value)} {_interval(figure.interval)}"
    if figure.dense is None:
        return [value, "", "", ""]
    d = figure.dense
    return [
        value,
        f"{_share(d.value)} {_interval(d.interval)}",
        f"{100 * d.difference:+.1f} {_interval(d.difference_interval, sign='+')}",
        f"{_share(d.agreement)} {_interval(d.agreement_interval)}",
    ]


def _share(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(ends: Interval, sign: str = "") -> str:
    return f"[{100 * ends.low:{sign}.1f}, {100 * ends.high:{sign}.1f}]"
