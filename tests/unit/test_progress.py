"""Progress: what is said when, on a terminal and in a pipe, and that the terminal is given back."""

import io
from collections.abc import Iterator
from unittest import mock

import pytest
from rich.console import Console

from spectrim import progress, terminal
from spectrim.errors import ResourceError
from spectrim.progress import Clock, Lines, Live, end_progress, line_of, progress_on, resident_bytes
from spectrim.stage import Stage, at


@pytest.fixture(autouse=True)
def now() -> Iterator[list[float]]:
    """A clock that stands still until it is set."""
    time = [0.0]
    with (
        mock.patch.object(progress.time, "monotonic", side_effect=lambda: time[0]),
        mock.patch.object(progress, "memory", return_value="1.00 GiB"),
    ):
        yield time


def console(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120, soft_wrap=True, color_system=None)


def said(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_a_pipe_gets_a_line_for_each_stage_and_quarter(now: list[float]) -> None:
    target = console(is_terminal=False)
    show = progress_on(target)
    assert isinstance(show, Lines)
    show("load", 0, 1)
    for step in range(1, 9):
        now[0] = float(step)
        show(at("decompose", f"layer {step}"), step, 8)
    assert said(target).splitlines() == [
        "[   0.0 s] load, 1.00 GiB",
        "[   1.0 s] decompose 1/8, layer 1, 1.00 GiB",
        "[   2.0 s] decompose 2/8, layer 2, about 6 s left, 1.00 GiB",
        "[   4.0 s] decompose 4/8, layer 4, about 4 s left, 1.00 GiB",
        "[   6.0 s] decompose 6/8, layer 6, about 2 s left, 1.00 GiB",
        "[   8.0 s] decompose 8/8, layer 8, 1.00 GiB",
    ]


def test_the_time_left_starts_anew_in_a_second_round(now: list[float]) -> None:
    clock = Clock()
    clock.read("calibrate", 1, 10)
    now[0] = 9.0
    assert clock.read("calibrate", 10, 10).left_s is None
    now[0] = 20.0
    assert clock.read("calibrate", 2, 10).left_s is None
    now[0] = 24.0
    assert clock.read("calibrate", 4, 10).left_s == pytest.approx(12.0)


def test_a_terminal_keeps_a_line_of_what_is_over_and_gets_its_cursor_back(now: list[float]) -> None:
    target = console(is_terminal=True)
    show = progress_on(target)
    assert isinstance(show, Live)
    show("calibrate", 1, 4)
    now[0] = 3.0
    show("calibrate", 4, 4)
    show(at("decompose", "model.layers.0.mlp.up_proj"), 1, 7)
    assert "[   3.0 s] calibrate 4/4, 1.00 GiB\n" in said(target)
    end_progress()
    text = said(target)
    assert "[   3.0 s] decompose 1/7, 1.00 GiB\n" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # shown after it was hidden
    before = len(text)
    end_progress()
    assert len(said(target)) == before


def use(target: Console, *, fails: bool) -> None:
    """A command that shows progress, and then ends well or not."""
    with mock.patch.object(terminal, "stderr", target), terminal.exit_codes():
        show = terminal.progress_printer(quiet=False)
        assert show is not None
        show("calibrate", 1, 4)
        if fails:
            raise ResourceError("no room")


def test_the_bar_is_gone_when_a_command_ends() -> None:
    target = console(is_terminal=True)
    use(target, fails=False)
    assert "\x1b[?25h" in said(target)


def test_an_error_comes_after_the_bar() -> None:
    target = console(is_terminal=True)
    with pytest.raises(SystemExit):
        use(target, fails=True)
    assert said(target).index("\x1b[?25h") < said(target).index("no room")


def test_json_says_nothing() -> None:
    assert terminal.progress_printer(quiet=True) is None


def test_a_stage_is_the_text_that_it_is() -> None:
    stage = at("decompose", "layer 3")
    assert stage == "decompose"
    assert {stage: 1}["decompose"] == 1
    assert isinstance(stage, Stage)
    moment = Clock().read(stage, 0, 1)
    assert line_of(moment) == "[   0.0 s] decompose, layer 3, 1.00 GiB"


def test_resident_memory_is_about_what_was_taken() -> None:
    before = resident_bytes()
    block = bytearray(b"x" * 60_000_000)
    assert 40_000_000 < resident_bytes() - before < 200_000_000
    assert len(block) == 60_000_000
