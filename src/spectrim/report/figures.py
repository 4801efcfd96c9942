"""Figures of the page as SVG text: no colours of their own, only classes, so that light and dark are the page's matter.

Narrow on purpose: at the width of a phone the letters are still those of a text, and a wide screen shows several beside
each other. Names stand at the ends of their lines; every figure has its numbers in a table beside it.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from spectrim.report.plot import ticks

WIDTH, HEIGHT = 420, 250
LEFT, TOP, BOTTOM = 52, 28, 40
LETTER = 7.4
"""About the width of a letter at the font's size."""
LABEL_GAP = 15
MOST_LABEL = 16
POINTS_MOST = 256
ONE_VALUE, TINY = 1e-9, 1e-290
LOG_FROM = 3.0
"""A logarithmic axis tells more only where the values span at least this factor."""
MINI_WIDTH, MINI_HEIGHT = 160, 64
FLOOR = 1e-6
"""Singular values below this share of the largest are drawn at it."""


class Line(NamedTuple):
    """One series; `dots`: points only, since a line would claim something about what lies between."""

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


class Axis(NamedTuple):
    """From values to pixels, with the values at which there are ticks."""

    low: float
    high: float
    start: float
    end: float
    marks: list[float]
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.start + (at - low) / (high - low) * (self.end - self.start)


def linear_axis(values: Sequence[float], start: float, end: float, count: int = 5) -> Axis:
    """Round ticks around all values; values that no plot could tell apart are one."""
    low, high = float(min(values)), float(max(values))
    if high - low <= ONE_VALUE * max(abs(low), abs(high)):
        low = high = high if abs(high) > TINY else 0.0
    marks = ticks(low, high, count)
    return Axis(marks[0], marks[-1], start, end, marks)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Ticks at powers of ten, at 1, 2, 5 of them where the values span few; all values must be above 0."""
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 5)
    marks = [step * 10.0**power for power in range(first, last + 1, every) for step in steps]
    low = max((mark for mark in marks if mark <= min(values)), default=marks[0])
    high = min((mark for mark in marks if mark >= max(values) and mark > low), default=10.0 ** (last + 1))
    return Axis(low, high, start, end, [mark for mark in marks if low <= mark <= high], log=True)


def chart(
    lines: Sequence[Line],
    *,
    label: str,
    x: str,
    y: str,
    references: Sequence[tuple[str, float]] = (),
    log: bool = False,
    reach: Sequence[float] = (),
) -> str:
    """Lines and points over two axes; `references` are dashed horizontal lines. `label` says in words what it shows.

    `log`: powers of ten upwards, where all values are above 0 and far apart. `reach` are values that the x axis reaches
    in any case. Raises ValueError where there is nothing to draw, or a number that is not finite.
    """
    if not lines or not all(line.points for line in lines):
        raise ValueError("a chart needs at least one series, each with at least one point")
    xs = [px for line in lines for px, _ in line.points]
    ys = [py for line in lines for _, py in line.points] + [value for _, value in references]
    if not all(map(math.isfinite, xs + ys)):
        raise ValueError("a chart takes finite numbers only")
    names = [line.name for line in lines if not line.dots] + [name for name, _ in references]
    right = WIDTH - 16 - LETTER * min(max(map(len, names), default=0), MOST_LABEL)
    across = linear_axis([*xs, *reach], LEFT, right)
    up = (log_axis if log and min(ys) > TINY and max(ys) > LOG_FROM * min(ys) else linear_axis)(
        ys, HEIGHT - BOTTOM, TOP
    )
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    parts += _frame(across, up, x, y)
    ends: list[tuple[float, str, str]] = []
    for name, value in references:
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{right:.1f}" {_at_y(up(value))}/>')
        ends.append((up(value), name, "muted"))
    for index, line in enumerate(lines):
        parts += _series(line, f"s{index % 6 + 1}", across, up)
        if not line.dots:
            ends.append((up(max(line.points)[1]), line.name, f"s{index % 6 + 1}"))
    return "\n".join([*parts, *_names(ends, right), "</svg>"])


def _series(line: Line, style: str, across: Axis, up: Axis) -> list[str]:
    points = thinned(sorted(line.points))
    parts = []
    if not line.dots and len(points) > 1:
        path = " ".join(f"{across(px):.1f},{up(py):.1f}" for px, py in points)
        parts.append(f'<polyline class="line {style}" points="{path}"/>')
    if line.dots or len(points) <= 24:
        for px, py in points:
            told = escape(f"{line.name}: {px:.6g}, {py:.6g}" if line.name else f"{px:.6g}, {py:.6g}")
            at = f'cx="{across(px):.1f}" cy="{up(py):.1f}"'
            parts.append(f'<circle class="dot {style}" {at} r="{4 if line.dots else 3}"><title>{told}</title></circle>')
            if line.dots:
                parts.append(_name_of_dot(clipped(line.name, MOST_LABEL), style, across(px), up(py)))
    return parts


def _name_of_dot(name: str, style: str, x: float, y: float) -> str:
    """Beside its point, on the side where there is room."""
    left = x + 8 + LETTER * len(name) > WIDTH
    at = f'x="{x - 8:.1f}" text-anchor="end"' if left else f'x="{x + 8:.1f}"'
    return f'<text class="end {style}" {at} y="{y - 6:.1f}">{escape(name)}</text>'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS_MOST points: the means of neighbours, so that noise thins out and no step is left unseen."""
    if len(points) <= POINTS_MOST:
        return list(points)
    size = math.ceil(len(points) / POINTS_MOST)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(px for px, _ in g) / len(g), sum(py for _, py in g) / len(g)) for g in groups]


def _frame(across: Axis, up: Axis, x: str, y: str) -> list[str]:
    parts = []
    for mark in up.marks:
        at = up(mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{across.end:.1f}" {_at_y(at)}/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(mark)}</text>')
    for mark in across.marks:
        at = across(mark)
        place = f'x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}"'
        parts.append(f'<text class="tick" {place} text-anchor="middle">{short(mark)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{across.end:.1f}" {_at_y(HEIGHT - BOTTOM)}/>')
    middle = (LEFT + across.end) / 2
    parts.append(f'<text class="name" x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text class="name" x="0" y="12">{escape(y)}</text>')
    return parts


def short(value: float) -> str:
    """A tick's number in few letters."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.4g}{letter}"
    return f"{value:.4g}"


def _at_y(at: float) -> str:
    return f'y1="{at:.1f}" y2="{at:.1f}"'


def _names(ends: list[tuple[float, str, str]], right: float) -> list[str]:
    """Names at the ends of their lines, moved apart where they would lie on each other."""
    ordered = sorted(end for end in ends if end[1])
    places: list[float] = []
    for at, _, _ in ordered:
        places.append(max(at, places[-1] + LABEL_GAP if places else TOP))
    room = HEIGHT - BOTTOM / 2
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], room)
        room = places[i] - LABEL_GAP
    return [
        f'<text class="end {style}" x="{right + 8:.1f}" y="{place + 4:.1f}">{escape(clipped(name, MOST_LABEL))}</text>'
        for place, (_, name, style) in zip(places, ordered, strict=True)
    ]


def clipped(text: str, most: int) -> str:
    """With an ellipsis where it is longer; the table beside the figure has all of it."""
    return text if len(text) <= most else text[: most - 1] + "…"


def spectrum_figure(
    places: Sequence[float],
    values: Sequence[float],
    *,
    components: int,
    kept: int | None,
    shares: Sequence[float] = (),
    label: str,
) -> str:
    """Singular values over their place, on a logarithmic scale, the kept part filled.

    `kept` components are the first ones, or by `shares` the kept share of those from each place up to the next; None:
    nobody knows.
    """
    top = max(values, default=0.0)
    levels = [math.log10(max(value / top, FLOOR)) if top > 0 else 0.0 for value in values]
    low = min([*levels, -1.0])

    def x(place: float) -> float:
        return MINI_WIDTH * place / max(components - 1, 1)

    def y(level: float) -> float:
        return 4 + level / low * (MINI_HEIGHT - 8)

    points = [(x(place), y(level)) for place, level in zip(places, levels, strict=True)]
    parts = [f'<svg class="mini" viewBox="0 0 {MINI_WIDTH} {MINI_HEIGHT}" role="img" aria-label="{escape(label)}">']
    if shares:
        ends = [*points[1:], (MINI_WIDTH, points[-1][1])]
        for (x0, y0), (x1, _), share in zip(points, ends, shares, strict=True):
            box = f'x="{x0:.1f}" y="{y0:.1f}" width="{max(x1 - x0, 0.5):.1f}" height="{MINI_HEIGHT - y0:.1f}"'
            if share > 0:
                parts.append(f'<rect class="kept" {box} fill-opacity="{min(share, 1):.2f}"/>')
    elif kept:
        parts.append(_kept_area(points, x(kept - 1) if kept < components else MINI_WIDTH))
    parts.append(f'<polyline class="curve" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>')
    if kept is not None and not shares and kept < components:
        at = f"{x(kept):.1f}"
        parts.append(f'<line class="cut" x1="{at}" x2="{at}" y1="0" y2="{MINI_HEIGHT}"/>')
    return "".join([*parts, f'<line class="axis" x1="0" x2="{MINI_WIDTH}" {_at_y(MINI_HEIGHT - 0.5)}/></svg>'])


def _kept_area(points: list[tuple[float, float]], end: float) -> str:
    """The area under the curve up to `end`, which lies between two of the points."""
    inside = [point for point in points if point[0] <= end]
    after = next((point for point in points if point[0] > end), None)
    if after is not None and inside:
        (x0, y0), (x1, y1) = inside[-1], after
        inside.append((end, y0 + (y1 - y0) * (end - x0) / (x1 - x0)))
    last = inside[-1][0] if inside else 0.0
    path = " ".join(f"{px:.1f},{py:.1f}" for px, py in inside)
    return f'<polygon class="kept" points="0,{MINI_HEIGHT} {path} {last:.1f},{MINI_HEIGHT}"/>'
