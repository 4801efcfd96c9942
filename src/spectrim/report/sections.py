"""What the page of one folder says, section by section: plain values for the template, None where nothing is known.

Every figure is from report.json; nothing is measured or guessed here.
"""

import math
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from spectrim.report.figures import Line, chart
from spectrim.report.reading import Facts

NOTHING = "-"


class Value(NamedTuple):
    """A number as people read it, and as the report has it."""

    shown: str
    exact: float | int


def plain(value: float | int | None, form: str = "") -> Value | str:
    """Formatted, or a dash where there is nothing."""
    return NOTHING if value is None else Value(f"{value:{form}}", value)


def amount(nbytes: float) -> str:
    """Bytes in the unit that people use for them."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= limit:
            return f"{nbytes / limit:.3g} {unit}"
    return f"{nbytes:.0f} B"


def span(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def perplexity(value: float | None) -> Value | str:
    """As the model card has it; numbers without meaning as digits in short."""
    return plain(value, ".2f" if value is not None and value < 1e6 else ".4g")


def quality(report: Facts) -> dict[str, Any] | None:
    """Before and after, on the evaluation text."""
    dense, small = report.at("quality", "dense"), report.at("quality", "compressed")
    if not small:
        return None
    before, after = dense.number("perplexity"), small.number("perplexity")
    return {
        "ratio": after / before if before and after is not None else None,
        "rows": [
            ("perplexity", perplexity(before), perplexity(after)),
            ("KL to dense, nats a token", plain(0), plain(small.number("kl"), ".4f")),
            ("same top token as dense", plain(1), plain(small.number("agreement"), ".4f")),
            ("tokens judged", plain(dense.count("tokens"), ","), plain(small.count("tokens"), ",")),
        ],
    }


def size_quality(report: Facts) -> dict[str, Any] | None:
    """The points that this run measured: one size, or all anchors of a folder with all sizes."""
    name = report.text("method", "method") or "this result"
    if report.raw("sizes") is not None:
        dense = report.at("dense")
        points = [(r.number("size"), r.number("quality", "perplexity"), r) for r in report.rows("sizes")]
    else:
        dense, keep = report.at("quality", "dense"), report.number("stored", "keep")
        points = [(keep, report.number("quality", "compressed", "perplexity"), report.at("quality", "compressed"))]
    known = [(x, y, row) for x, y, row in points if x is not None and y is not None]
    reference = dense.number("perplexity")
    if not known:
        return None
    unit = "bytes" if report.text("stored", "keep_unit") == "bytes" else "numbers"
    figure = chart(
        [Line(name, [(x, y) for x, y, _ in known], dots=len(known) == 1)],
        label=f"Perplexity over size: {', '.join(f'{y:.4g} at {x:.4g}' for x, y, _ in known)}"
        + ("" if reference is None else f"; the dense model has {reference:.4g}"),
        x=f"share of the linears' {unit} kept",
        y="perplexity",
        references=[] if reference is None else [("dense", reference)],
        log=True,
        reach=(0, 1),
    )
    rows = [("1 (dense)", perplexity(reference), plain(0), plain(1))]
    rows += [
        (
            f"{x:.4g}",
            perplexity(y),
            plain(_figure(row, "kl"), ".4f"),
            plain(_figure(row, "agreement"), ".4f"),
        )
        for x, y, row in known
    ]
    return {"figure": figure, "rows": rows, "points": len(known)}


def _figure(row: Facts, key: str) -> float | None:
    """A figure of a size, or of the one result."""
    return row.number("quality", key) if row.raw("size") is not None else row.number(key)


def budget(report: Facts) -> dict[str, Any]:
    """What was asked for, what is stored, and of what the model consists besides."""
    stored, source = report.at("stored"), report.at("source")
    bytes_count = stored.text("keep_unit") == "bytes"
    dense, small = stored.count("linear_numbers_dense"), stored.number("linear_numbers")
    rows = [_pair("numbers in the decoder's linear layers", dense, small)]
    if stored.number("linear_bytes_counted") is not None and dense is not None:
        rows.append(_pair("their bytes, at 16 bits a number", 2 * dense, stored.number("linear_bytes_counted")))
    rows.append(_pair("numbers in all", source.number("numbers"), stored.number("model_numbers")))
    rows.append(_pair("bytes in all", source.number("bytes"), stored.number("model_bytes")))
    untouched = [
        (row.text("name") or "?", plain(row.count("numbers"), ","), row.text("why") or "")
        for row in report.rows("untouched")
    ]
    return {
        "asked": plain(report.number("request", "keep"), ".4f"),
        "reached": plain(stored.number("keep"), ".4f"),
        "unit": "bytes at 16 bits" if bytes_count else "stored numbers",
        "rows": [row for row in rows if row["before"] is not None],
        "untouched": untouched,
    }


def frontier(report: Facts) -> list[dict[str, Any]]:
    """What other budgets would lose by the losses that forms were chosen by, and where this run lies."""
    rows = [(row.number("keep"), row.number("predicted")) for row in report.rows("frontier")]
    points = [(keep, loss) for keep, loss in rows if keep is not None and loss is not None]
    if len(points) < 2:
        return []
    asked = report.number("stored", "keep")
    said = f"predicted loss from {points[0][1]:.4g} at {points[0][0]:.3f} of the bytes to {points[-1][1]:.4g} at "
    said += f"{points[-1][0]:.3f}"
    shown = [(keep, loss) for keep, loss in points if loss > 0]
    lines = [Line("all layers", shown or points)]
    if asked is not None and shown and shown[0][0] <= asked <= shown[-1][0]:
        lines.append(Line("this run", [(asked, between(shown, asked))], dots=True))
    title = "What other budgets would lose"
    return [
        {
            "title": title,
            "figure": chart(lines, label=f"{title}: {said}", x="share of the bytes", y="predicted loss", log=True),
            "told": said,
            "header": ["share of the bytes", "predicted loss"],
            "rows": [(f"{x:.4f}", f"{y:.4g}") for x, y in points],
        }
    ]


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """The logarithm's straight line between the two points around `at`, which is within their reach."""
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= at <= x1:
            share = (at - x0) / (x1 - x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return points[0][1]


def forms(report: Facts) -> list[tuple[Value | str, ...]]:
    """What the layers became, one row a form (`report/forms.py`); empty where an older version wrote the report."""
    return [
        (
            row.text("form") or "?",
            *(plain(row.count(key), ",") for key in ("layers", "weights", "bytes")),
            plain(row.number("bits"), ".2f"),
        )
        for row in report.rows("forms")
    ]


def _pair(what: str, before: float | None, after: float | None) -> dict[str, Any]:
    share = after / before if before and after is not None else None
    return {
        "what": what,
        "before": None if before is None else plain(before, ","),
        "after": plain(after, ","),
        "share": share,
    }


def training(report: Facts) -> list[dict[str, Any]]:
    """A figure for every trajectory that the run kept."""
    learning = report.at("learning")
    figures = []
    figures += _curve("Loss of the learned step", learning.numbers("losses"), "loss")
    figures += _curve("Share kept while it learned", learning.numbers("keeps"), "keep")
    figures += scores(learning)
    for step in learning.rows("recovery"):
        for i, losses in enumerate(step.rows("losses")):
            part = f", part {i + 1}" if len(step.rows("losses")) > 1 else ""
            figures += _curve(f"Loss of recovery {step.text('step')}{part}", losses.numbers(), "loss")
    return figures


def scores(learning: Facts) -> list[dict[str, Any]]:
    """Where the scores of the kept components went."""
    path = [point.numbers() for point in learning.rows("score_path")]
    if len(path) < 2 or any(len(point) != 4 for point in path):
        return []
    lines = [Line(name, [(p[0], p[i]) for p in path]) for i, name in ((3, "95 %"), (2, "median"), (1, "5 %"))]
    first, last = path[0], path[-1]
    said = f"scores of kept components: median {first[2]:.4g} to {last[2]:.4g}, 5 % {last[1]:.4g}, 95 % {last[3]:.4g}"
    rows = [(f"{p[0]:.0f}", f"{p[1]:.4g}", f"{p[2]:.4g}", f"{p[3]:.4g}") for p in sampled(path)]
    return [
        {
            "title": "Scores of kept components",
            "figure": chart(lines, label=said[0].upper() + said[1:], x="step", y="score"),
            "told": said,
            "header": ["step", "5 %", "median", "95 %"],
            "rows": rows,
        }
    ]


def _curve(title: str, values: Sequence[float], what: str) -> list[dict[str, Any]]:
    if len(values) < 2 or min(values) == max(values):
        return []
    points = [(float(i + 1), value) for i, value in enumerate(values)]
    tail = values[-max(1, len(values) // 10) :]
    said = f"{what} {values[0]:.4g} at step 1, {sum(tail) / len(tail):.4g} on average over the last {len(tail)} of "
    said += f"{len(values)} steps"
    log = min(values) > 0 and max(values) > 20 * min(values)
    return [
        {
            "title": title,
            "figure": chart([Line("", points)], label=f"{title}: {said}", x="step", y=what, log=log),
            "told": said,
            "header": ["step", what],
            "rows": [(f"{x:.0f}", f"{y:.4g}") for x, y in sampled(points)],
        }
    ]


def sampled(points: Sequence[Any], most: int = 24) -> list[Any]:
    """Some of them, evenly, the last one among them: for a table beside a figure."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def samples(report: Facts) -> list[dict[str, Any]]:
    """What both models say, with the part that is the same set apart where it is text."""
    return [
        {
            "prompt": row.text("prompt") or "",
            "dense": row.text("dense") or "",
            "compressed": row.text("compressed") or "",
            "same": row.count("same_tokens"),
            "new": row.count("new_tokens"),
            "decoded": row.raw("decoded") is not False,
        }
        for row in report.rows("samples")
    ]


def times(report: Facts) -> dict[str, Any]:
    """Seconds by stage with their share of the whole, and the most memory."""
    seconds = report.at("seconds")
    stages = {name: seconds.number(name) or 0.0 for name in seconds.names() if name != "total"}
    total = seconds.number("total")
    whole = total or sum(stages.values()) or 1.0
    rows = [(name, Value(span(s), s), s / whole) for name, s in sorted(stages.items(), key=lambda item: -item[1])]
    if total is not None and total > sum(stages.values()):
        rest = total - sum(stages.values())
        rows.append(("everything else (text, writing, reload)", Value(span(rest), rest), rest / whole))
    memory = report.at("peak_memory_bytes")
    return {
        "rows": rows,
        "total": None if total is None else Value(span(total), total),
        "memory": [(where, Value(amount(n), n)) for where in memory.names() if (n := memory.count(where)) is not None],
    }


def texts(report: Facts) -> list[tuple[str, str]]:
    """Which text was used for what."""
    found = []
    for use in report.at("text").names():
        windows = report.at("text", use)
        if windows:
            count, length = windows.count("windows"), windows.count("length")
            source, note = windows.text("source") or "?", windows.text("note") or ""
            found.append((use, f"{source}: {count} windows of {length} tokens, no overlap; {note}"))
    return found


def verdict(report: Facts) -> dict[str, Any]:
    """What the quality gate says."""
    passed, factor = report.raw("quality_gate", "passed"), report.number("quality_gate", "factor")
    dense = report.number("quality_gate", "dense_perplexity")
    small = report.number("quality_gate", "compressed_perplexity")
    if passed is None or not dense or small is None or factor is None:
        return {"kind": "none", "text": "quality not judged"}
    times_as_much = f"perplexity is {small / dense:.4g} times the dense model's, allowed {factor:g}"
    if passed is True:
        return {"kind": "good", "text": f"quality gate passed: {times_as_much}"}
    return {"kind": "bad", "text": f"quality gate failed: {times_as_much}"}


def command(report: Facts) -> str | None:
    """The command that made the folder, for a shell; None where it was made from Python or by an older version."""
    words = report.texts("command")
    return shlex.join(["spectrim", *words]) if words else None


def pairs(facts: Facts) -> list[tuple[str, str]]:
    """Keys and values of a flat object, as text."""
    return [(key, _as_text(facts.raw(key))) for key in facts.names()]


def _as_text(value: Any) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return ", ".join(map(_as_text, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_as_text(item)}" for key, item in value.items()) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
