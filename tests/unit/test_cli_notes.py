"""A run that trains for long without a GPU says so before it begins."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from command_line import call
from spectrim import several_job
from spectrim.errors import UsageError
from spectrim.models.load import resolve


@pytest.fixture(autouse=True)
def began() -> Any:
    """No run is made: what is said comes before it."""
    with mock.patch.object(several_job, "run_together", return_value=None) as run:
        yield run


def said(tmp_path: Path, *words: object, device: str = "cpu") -> str:
    answer = call("compress", "builtin:tiny", "--out", tmp_path / "out", "--device", device, *words)
    assert answer.code == 0, answer.err
    return answer.message


@pytest.mark.parametrize(
    ("words", "windows"),
    [
        ((), 400 * 32),
        (("--preset", "best"), 600 * 32),
        (("--method", "acip"), None),
        (("--method", "svd-llm", "--recover", "kl:100", "--recover", "block:20"), 120 * 32),
        (("--set", "steps=50"), 50 * 32),
    ],
)
def test_what_trains_is_told(tmp_path: Path, began: Any, words: tuple[str, ...], windows: int | None) -> None:
    told = said(tmp_path, *words)
    assert told.startswith("note: this run trains on the CPU")
    assert "--preset fast" in told
    assert "spectrim plan" in told
    assert f"{resolve('builtin:tiny').checkpoint.numel:,} numbers" in told
    assert windows is None or f"{windows:,} windows of 512 tokens" in told
    assert began.called


@pytest.mark.parametrize(
    "words",
    [
        ("--preset", "fast"),
        ("--method", "svd-llm"),
        ("--method", "svd-llm", "--recover", "refit"),
        ("--set", "steps=10", "--set", "batch_size=8", "--calib-length", "128"),
        ("--json",),
    ],
)
def test_what_does_not_train_for_long_is_quiet(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert said(tmp_path, *words) == ""


def test_a_gpu_is_quiet(tmp_path: Path) -> None:
    with mock.patch("spectrim.models.load.pick_device", return_value=mock.Mock(type="cuda")):
        assert said(tmp_path, device="auto") == ""


def test_only_the_first_of_several_processes_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert said(tmp_path) == ""
    monkeypatch.setenv("RANK", "0")
    assert "trains on the CPU" in said(tmp_path)


def test_all_sizes_are_told_and_a_task_of_an_array_is_not(tmp_path: Path) -> None:
    """A task only measures; the steps of all sizes are those of --any-size-steps."""
    with mock.patch("spectrim.any_size_job.run_any_size", side_effect=UsageError("no further")):
        answer = call("compress", "builtin:tiny", "--out", tmp_path / "out", "--device", "cpu", "--any-size")
    assert answer.message.startswith(f"note: this run trains on the CPU, {1600 * 32:,} windows")
    assert answer.message.endswith("no further")
    with mock.patch("spectrim.cli.compress_shard", return_value=None):
        assert said(tmp_path, "--shard", "1/2") == ""
        assert "trains on the CPU" in said(tmp_path, "--shard", "merge/2")
