"""A line chart as SVG text: axes with round ticks, one line a series with its name at its end, dashed reference lines.

No plotting library is needed to read it or to write it; browsers and GitHub show it.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 44, 56
COLOURS = ("#1f5fa8", "#c2571a", "#3a8a4d", "#7a4fa3", "#8a6d1f", "#555555", "#c2378f", "#158f9c", "#9a2d2d", "#5d7a1a")
FAINT = "#c4c4c4"
TICKS = 6
LABEL_GAP = 15


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x: str,
    y: str,
    references: Mapping[str, float] | None = None,
    dots: Collection[str] = (),
    faint: Collection[str] = (),
) -> str:
    """The chart. Every series needs a point; `references` are horizontal lines by name.

    Series named in `dots` are drawn as points only: a line would claim something about what lies between.
    Those in `faint` are drawn grey.
    """
    references = {} if references is None else references
    if not series or not all(series.values()):
        raise ValueError("a line chart needs at least one series, each with at least one point")
    xs = [px for points in series.values() for px, _ in points]
    ys = [py for points in series.values() for _, py in points] + list(references.values())
    if not all(map(math.isfinite, xs + ys)):
        raise ValueError("a line chart takes finite numbers only")
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    frame = _Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [*_axes(frame, x_ticks, y_ticks, title, x, y), *_references(frame, references)]
    ends: list[tuple[float, str, str]] = []
    for i, (name, points) in enumerate(series.items()):
        colour = FAINT if name in faint else COLOURS[i % len(COLOURS)]
        placed = [(frame.x(px), frame.y(py)) for px, py in sorted(points)]
        if name not in dots:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in placed)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        radius = 4 if name in dots else 3
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{radius}" fill="{colour}"/>' for px, py in placed]
        ends.append((placed[-1][1], name, colour))
    ends += [(frame.y(value), name, "#777777") for name, value in references.items()]
    parts += _labels(ends)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head += ' font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def ticks(low: float, high: float, count: int = TICKS) -> list[float]:
    """About `count` round numbers, evenly spaced, from at or below `low` to at or above `high`."""
    span = high - low if high > low else abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


class _Frame:
    """From the values of the axes to pixels."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float) -> None:
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _axes(frame: _Frame, x_ticks: list[float], y_ticks: list[float], title: str, x: str, y: str) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text x="{LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>']
    for tick in y_ticks:
        at = frame.y(tick)
        parts.append(f'<line x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    for tick in x_ticks:
        at = frame.x(tick)
        parts.append(f'<line x1="{at:.1f}" y1="{bottom}" x2="{at:.1f}" y2="{bottom + 5}" stroke="#333333"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:.6g}</text>')
    parts.append(f'<polyline points="{LEFT},{TOP} {LEFT},{bottom} {right},{bottom}" fill="none" stroke="#333333"/>')
    middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text x="{middle_x:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x)}</text>')
    turn = f'transform="rotate(-90 18 {middle_y:.1f})"'
    parts.append(f'<text x="18" y="{middle_y:.1f}" text-anchor="middle" {turn}>{escape(y)}</text>')
    return parts


def _references(frame: _Frame, references: Mapping[str, float]) -> list[str]:
    return [
        f'<line x1="{LEFT}" y1="{frame.y(value):.1f}" x2="{WIDTH - RIGHT}" y2="{frame.y(value):.1f}" '
        'stroke="#777777" stroke-dasharray="6 4"/>'
        for value in references.values()
    ]


def _labels(ends: list[tuple[float, str, str]]) -> list[str]:
    """Names beside the ends of their lines, moved apart where they would lie on each other, upwards at the bottom."""
    ordered, places, last = sorted(ends), [], -math.inf
    for at, _, _ in ordered:
        last = max(at, last + LABEL_GAP)
        places.append(last)
    room = HEIGHT - BOTTOM / 2
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], room)
        room = places[i] - LABEL_GAP
    parts = []
    for place, (_, name, colour) in zip(places, ordered, strict=True):
        fill = "#8a8a8a" if colour == FAINT else colour  # text needs more contrast than a dot
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{place + 4:.1f}" fill="{fill}">{escape(name)}</text>')
    return parts
