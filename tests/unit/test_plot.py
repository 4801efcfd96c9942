"""The SVG line chart: valid XML, every point where the axes say, names that do not lie on each other."""

import itertools
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.report.plot import LABEL_GAP, TICKS, line_chart, ticks

SVG = "{http://www.w3.org/2000/svg}"
SERIES = {"a <b>": [(0.9, 30.0), (0.4, 60.0)], "c": [(0.5, 45.0)]}


def drawn(**changes):
    options = {"title": "t & u", "x": "size", "y": "ppl", "references": {"dense": 29.5}, **changes}
    return ET.fromstring(line_chart(SERIES, **options))


def test_points_stand_where_the_ticks_say():
    """Pixels are read back through the ticks' own labels."""
    root = drawn()
    texts = {t.text: t for t in root.iter(f"{SVG}text")}
    assert {"t & u", "size", "ppl", "dense", "a <b>", "c"} <= texts.keys()
    horizontal = {float(k): float(t.get("y")) - 4 for k, t in texts.items() if t.get("text-anchor") == "end"}
    vertical = {}
    for label, element in texts.items():
        if element.get("text-anchor") == "middle" and label not in ("size", "ppl"):
            vertical[float(label)] = float(element.get("x"))
    circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{SVG}circle")]
    expected = [
        (read_back(vertical, x), read_back(horizontal, y)) for points in SERIES.values() for x, y in sorted(points)
    ]
    assert len(circles) == 3
    for found, wanted in zip(circles, expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.2)


def read_back(axis, value):
    """The pixel of a value by its axis' two outermost ticks."""
    low, high = min(axis), max(axis)
    return axis[low] + (value - low) / (high - low) * (axis[high] - axis[low])


def test_the_reference_is_a_dashed_line():
    dashed = [line for line in drawn().iter(f"{SVG}line") if line.get("stroke-dasharray")]
    assert len(dashed) == 1
    assert dashed[0].get("y1") == dashed[0].get("y2")
    assert not [line for line in drawn(references=None).iter(f"{SVG}line") if line.get("stroke-dasharray")]


def test_dots_have_no_line():
    lines = [len(list(drawn(dots=dots).iter(f"{SVG}polyline"))) for dots in ((), ("c",), ("a <b>", "c"))]
    assert lines == [3, 2, 1]  # the axes are one more
    assert len(list(drawn(dots=("c",)).iter(f"{SVG}circle"))) == 3


def test_names_at_the_same_height_move_apart():
    root = ET.fromstring(line_chart({k: [(1, 5.0)] for k in "abc"}, title="", x="", y="", references={"d": 5.0}))
    heights = sorted(float(t.get("y")) for t in root.iter(f"{SVG}text") if t.text in {"a", "b", "c", "d"})
    assert len(heights) == 4
    assert all(b - a >= LABEL_GAP - 0.1 for a, b in itertools.pairwise(heights))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_are_few_round_and_cover_the_range(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= TICKS + 3
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step + 1e-9 * abs(low)
    assert found[-1] >= low + span - 1e-6 * step - 1e-9 * abs(low)


@pytest.mark.parametrize("series", [{}, {"a": []}, {"a": [(0.5, float("nan"))]}, {"a": [(0.5, float("inf"))]}], ids=str)
def test_what_cannot_be_drawn_is_refused(series):
    with pytest.raises(ValueError):
        line_chart(series, title="", x="", y="")
