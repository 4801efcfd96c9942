"""Trackers get what the report says, when the run is done; deterministic runs put everything back."""

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from command_line import PLAIN, call, small_model
from spectrim import job, reproducible
from spectrim.errors import ResourceError, UsageError
from spectrim.reproducible import deterministic
from spectrim.track import check_trackers, curves_of, settings_of, track_run, values_of

REPORT: dict[str, Any] = {
    "request": {"model": "m", "keep": 0.5, "recover": ("kl:2",), "preset": None},
    "method": {"method": "svd", "storage": "factor"},
    "seconds": {"total": 3.0},
    "stored": {"keep": 0.49, "dtype": "float32"},
    "quality": {"dense": {"perplexity": 4.0, "kl": None, "tokens": 7}},
    "learning": {"losses": [2.0, 1.0], "recovery": [{"step": "block:1", "losses": [[0.5], [0.4]]}]},
}


def test_everything_in_the_report_is_logged() -> None:
    assert curves_of(REPORT) == {"learn": [2.0, 1.0], "block/0": [0.5], "block/1": [0.4]}
    logged = list(values_of(REPORT))
    assert ({"losses/learn": 1.0}, 1) in logged
    figures = logged[-1][0]
    assert figures["stored/keep"] == 0.49
    assert figures["quality/dense/perplexity"] == 4.0
    assert "quality/dense/kl" not in figures
    assert settings_of(REPORT)["method.storage"] == "factor"
    assert settings_of(REPORT)["recover"] == "('kl:2',)"


def test_a_tracker_that_is_unknown_or_missing_is_told_before_the_run() -> None:
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
    with (
        mock.patch.object(importlib.util, "find_spec", return_value=None),
        pytest.raises(UsageError, match=r"pip install tensorboard \(or 'spectrim\[track\]'\)"),
    ):
        check_trackers(["tensorboard"])
    assert check_trackers([]) == ()


class Written:
    """A tracker that keeps what it is given."""

    requires_logging_directory = True
    kept: list[Any] = []  # noqa: RUF012

    def __init__(self, name: str, logging_dir: str) -> None:
        self.kept.append((name, Path(logging_dir).name))

    def store_init_configuration(self, values: Any) -> None:
        self.kept.append(values)

    def log(self, values: Any, step: int) -> None:
        self.kept.append((values, step))

    def finish(self) -> None:
        self.kept.append("finished")


def test_a_tracker_is_given_the_run(tmp_path: Path) -> None:
    with mock.patch.dict("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Written}):
        track_run(("tensorboard",), REPORT, tmp_path / "out")
    assert Written.kept[0] == ("out", "out.track")
    assert Written.kept[-1] == "finished"
    assert [step for _, step in Written.kept[2:-1]] == [0, 1, 0, 0, 0]


def test_a_tracker_of_one_of_several_processes_does_not_look_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen: list[str | None] = []

    class Looks(Written):
        def finish(self) -> None:
            seen.append(os.environ.get("WORLD_SIZE"))

    with mock.patch.dict("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Looks}):
        track_run(("tensorboard",), REPORT, tmp_path / "out")
    assert seen == [None]
    assert os.environ["WORLD_SIZE"] == "2"


def test_a_tracker_that_fails_leaves_the_result(tmp_path: Path) -> None:
    class Fails(Written):
        def finish(self) -> None:
            raise OSError("no route to server hf_abcdefghijkl")

    with (
        mock.patch.dict("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"tensorboard": Fails}),
        pytest.raises(ResourceError, match=r"result in .* is complete") as caught,
    ):
        track_run(("tensorboard",), REPORT, tmp_path / "out")
    assert "abcdefgh" not in str(caught.value)


def test_deterministic_holds_inside_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reproducible.WORKSPACE, raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert reproducible.determinism() == {"algorithms": True, "cublas_workspace": ":4096:8"}
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.ones(3).kthvalue(1) if torch.cuda.is_available() else _refused()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def _refused() -> None:
    """On a CPU this one has no deterministic form."""
    torch.ones(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_a_gpu_in_use_without_its_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reproducible.WORKSPACE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="before this process first uses the GPU"), deterministic(True):
        raise AssertionError("not reached")


def test_the_report_says_what_held(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model", num_hidden_layers=1)
    words = ("compress", model, "--method", "svd-llm", *PLAIN, "--json")
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        on = call(*words, "--out", tmp_path / "on", "--deterministic")
        off = call(*words, "--out", tmp_path / "off")
    assert on.code == 0, on.err
    assert on.json["determinism"]["algorithms"] is True
    assert off.json["determinism"]["algorithms"] is False
    assert (tmp_path / "on/model.safetensors").read_bytes() == (tmp_path / "off/model.safetensors").read_bytes()
