"""Training that is killed, stopped, or meets a bad disk: the same command goes on and gives the same bytes.

A child is a fork of this process (torch is imported already), killed by real signals.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import Answer, call, change_weights, hashes, small_model, small_text
from spectrim import job
from spectrim.engines import loop
from spectrim.engines.closed_form import LEADS_TO_IT
from spectrim.errors import InputError, Interrupted, ResourceError, UsageError
from spectrim.resume import Resume, is_running
from spectrim.store import disk, points, verify_manifest
from spectrim.store.state import read_state, write_state
from spectrim.store.work import WorkFolder, flatten, locked

pytestmark = pytest.mark.faults

STEPS, DISTIL_STEPS = 6, 4
KL = "recovery 0 kl"
KL_METRIC = f"{KL} metric"
EARLIER = 19
"""States that lead to the closed form: 2 of sums over the 2 batches, 1 of the coupling, 14 layers, 2 blocks."""
DIFFER = {"report.json", "report.html", "manifest.json"}
"""The report tells seconds, memory, command and where it was taken up again; the manifest has its checksum."""
TOLD = ("seconds", "peak_memory_bytes", "resumed", "folder", "command")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that learns scores and then distils, within two seconds; --out is missing."""
    where = tmp_path_factory.mktemp("input")
    fields = (f"steps={STEPS}", f"distil_steps={DISTIL_STEPS}", "batch_size=2", "project_every=2", "rounds=0")
    sizes = ("--calib-windows", "4", "--calib-length", "16", "--train-windows", "8")
    return [
        *("compress", str(small_model(where / "model")), "--keep", "0.8", "--method", "soco"),
        *("--calib", str(small_text(where / "text.txt")), "--eval", "none", *sizes, "--save-every", "0"),
        *(word for field in fields for word in ("--set", field)),
    ]


@pytest.fixture(autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert "resumed" not in answer.err
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return out


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def taken_up(folder: Path) -> list[tuple[str, int]]:
    """From the closed form on; what leads to it has tests of its own."""
    found = [(told["stage"], told["step"]) for told in report_of(folder)["resumed"]]
    return [(stage, step) for stage, step in found if not stage.startswith(LEADS_TO_IT)]


def assert_same_result(out: Path, whole: Path) -> None:
    """Byte for byte, and no trace of the work folder."""
    verify_manifest(out)
    ours, theirs = hashes(out), hashes(whole)
    assert ours.keys() == theirs.keys()
    assert {n for n in ours if ours[n] != theirs[n]} <= DIFFER
    reports = [{k: v for k, v in report_of(folder).items() if k not in TOLD} for folder in (out, whole)]
    assert reports[0] == reports[1]
    assert not out.with_name("out.resume").exists()


def in_child(body: Callable[[], object]) -> int:
    """`body` in a fork; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(name: str, count: int) -> Callable[[str], None]:
    """A `point` that kills its own process the `count`-th time it passes `name`."""
    passed = [0]

    def point(here: str) -> None:
        passed[0] += here == name
        if here == name and passed[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return point


def killed_at(name: str, count: int, *words: object, again: bool = False) -> None:
    """States are counted from the closed form on; those that lead to it are not written `again`."""
    count += EARLIER if name.startswith("state-") and not again else 0
    with mock.patch.object(points, "reached", die_at(name, count)):
        assert in_child(lambda: call(*words)) == -signal.SIGKILL, f"never came to {name} number {count}"


# ---- killed


@pytest.mark.fault(24, 34)
@pytest.mark.parametrize(
    ("name", "count", "scores", "distilled"),  # the closed form is the first state that is written
    [
        ("state-written", 1, None, None),
        ("state-saved", 1, 0, None),
        ("state-synced", 4, 2, None),
        ("state-renamed", 4, 3, None),
        ("state-saved", STEPS + 1, STEPS, None),
        ("state-synced", STEPS + 6, STEPS, 2),  # the metric of distillation, and its sums, come before its first state
        ("staged", 1, STEPS, DISTIL_STEPS),
        ("before-publish", 1, STEPS, DISTIL_STEPS),
    ],
)
def test_killed_at_a_point_and_typed_again(
    words: list[str], whole: Path, tmp_path: Path, name: str, count: int, scores: int | None, distilled: int | None
) -> None:
    out = tmp_path / "out"
    resumed = [] if scores is None else [("closed form", 1)]
    metric = None if distilled is None else 1
    resumed += [(stage, n) for stage, n in (("scores", scores), (KL_METRIC, metric), (KL, distilled)) if n]
    killed_at(name, count, *words, "--out", out)
    assert not out.exists()
    answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert taken_up(out) == resumed
    for stage, step in resumed:
        assert f"resumed at step {step} of {stage}" in answer.err
    assert_same_result(out, whole)


@pytest.mark.fault(24, 34)
def test_killed_again_and_again(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in range(3):
        killed_at("state-saved", 2, *words, "--out", out, again=number > 0)
    answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert taken_up(out) == [("closed form", 1), ("scores", 5)]  # 1, then two more twice
    assert_same_result(out, whole)


@pytest.mark.fault(24)
def test_killed_between_publishing_and_tidying_up(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at("after-publish", 1, *words, "--out", out)
    left = out.with_name("out.resume")
    assert left.exists()
    answer = call(*words, "--out", out)
    assert answer.code == 2, answer.err
    assert "add --overwrite" in answer.message
    assert call(*words, "--out", out, "--overwrite").code == 0
    assert_same_result(out, whole)


@pytest.mark.fault(24)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_killed_while_tidying_up_what_is_left_can_be_gone_on_from(
    words: list[str], whole: Path, tmp_path: Path, count: int
) -> None:
    """The newest states go first: a run that replaces the published one finds nothing that it must discard."""
    out = tmp_path / "out"
    killed_at("tidying", count, *words, "--out", out)
    assert call(*words, "--out", out, "--overwrite").code == 0
    assert report_of(out)["warnings"] == []
    assert_same_result(out, whole)


@pytest.mark.fault(25)
@pytest.mark.slow
def test_killed_at_random_moments(words: list[str], whole: Path, tmp_path: Path) -> None:
    """100 kills; a run that was killed is killed again where it went on."""
    rng = np.random.default_rng(0)
    began = time.monotonic()
    assert in_child(lambda: call(*words, "--out", tmp_path / "timed")) == 0
    lasts_s = time.monotonic() - began
    out, kills, results = tmp_path / "out", 0, 0
    while kills < 100:
        pid = os.fork()
        if pid == 0:
            try:
                call(*words, "--out", out)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0, 1.1 * lasts_s))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        if out.exists():
            verify_manifest(out)
            call(*words, "--out", out, "--overwrite")
            assert_same_result(out, whole)
            disk.remove(out)
            results += 1
    assert results > 0
    assert call(*words, "--out", out).code == 0
    assert_same_result(out, whole)


# ---- stopped


def answer_of_child(words: list[str], out: Path, *, at: int, number: int) -> Answer:
    """What a child says that gets a signal in the middle of step `at` of the run."""
    said, steps = out.with_name("said.json"), [0]
    advance = loop._Loop.advance

    def signalled(self: Any) -> None:
        steps[0] += 1
        if steps[0] == at:
            os.kill(os.getpid(), number)
        advance(self)

    def body() -> None:
        with mock.patch.object(loop._Loop, "advance", signalled):
            answer = call(*words, "--out", out, "--save-every", 3600, "--restart")
        said.write_text(json.dumps([answer.code, answer.out, answer.err]))

    assert in_child(body) == 0
    return Answer(*json.loads(said.read_text()))


@pytest.mark.fault(27, 34)
@pytest.mark.parametrize(
    ("number", "code", "at", "stage", "step"),
    [(signal.SIGINT, 130, 3, "scores", 3), (signal.SIGTERM, 143, STEPS + 2, KL, 2)],
)
def test_a_signal_waits_for_its_step_and_the_printed_command_goes_on(
    words: list[str], whole: Path, tmp_path: Path, number: int, code: int, at: int, stage: str, step: int
) -> None:
    out = tmp_path / "out"
    answer = answer_of_child(words, out, at=at, number=number)
    assert answer.code == code, answer.err
    assert f"the state after step {step} of {stage} is kept in {out}.resume" in answer.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.resume", "said.json"]
    _, _, again = answer.message.partition("To go on: spectrim ")
    assert "--restart" not in again
    assert call(*again.split()).code == 0
    assert taken_up(out)[-1] == (stage, step)
    assert_same_result(out, whole)


@pytest.mark.fault(27)
def test_a_signal_outside_of_training_stops_at_once_and_leaves_no_empty_folder(
    words: list[str], tmp_path: Path
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def body() -> None:
        with mock.patch("spectrim.engines.run.measure", interrupt):
            answer = call(*words, "--out", tmp_path / "out")
        (tmp_path / "said").write_text(f"{answer.code} {answer.message}")

    assert in_child(body) == 0
    assert (
        (tmp_path / "said")
        .read_text()
        .split("error: ")[1]
        .startswith("stopped by SIGINT; nothing was published. To start")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["said"]


@pytest.mark.fault(27)
def test_a_second_signal_ends_at_once(words: list[str], tmp_path: Path) -> None:
    def twice(self: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with mock.patch.object(loop._Loop, "advance", twice):
        assert in_child(lambda: call(*words, "--out", tmp_path / "out")) == -signal.SIGTERM


def test_whether_a_function_is_running_is_read_from_the_stack() -> None:
    import sys

    def outer(ask: Callable[[], bool]) -> bool:
        return (lambda: ask())()

    assert outer(lambda: is_running(sys._getframe(), outer))
    assert not is_running(sys._getframe(), outer)


# ---- another run's folder


@pytest.mark.fault(31)
def test_another_request_is_refused_field_by_field(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at("state-saved", 2, *words, "--out", out)
    before = hashes(tmp_path)
    other = [*words, "--set", "learning_rate=0.001", "--seed", 7, "--out", out]
    answer = call(*other)
    assert answer.code == 2
    assert "2 fields differ" in answer.message
    assert "request.seed: 0 there, 7 now" in answer.message
    assert "method.learning_rate: 0.005 there, 0.001 now" in answer.message
    assert "add --restart to discard it" in answer.message
    assert hashes(tmp_path).keys() == before.keys()
    assert call(*words, "--out", out).code == 0
    assert_same_result(out, whole)


@pytest.mark.fault(31)
def test_restart_discards_and_starts_anew(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at("state-saved", 2, *words, "--seed", 7, "--out", out)
    assert call(*words, "--out", out, "--restart").code == 0
    assert report_of(out)["resumed"] == []
    assert_same_result(out, whole)


@pytest.mark.fault(31)
def test_changed_weights_or_text_are_another_run(tmp_path: Path, words: list[str]) -> None:
    model, text = small_model(tmp_path / "model"), small_text(tmp_path / "text.txt")
    mine = [str(model) if w == words[1] else w for w in words]
    mine[mine.index("--calib") + 1] = str(text)
    killed_at("state-saved", 1, *mine, "--out", tmp_path / "out")
    text.write_text(text.read_text().replace("json", "yaml"))
    answer = call(*mine, "--out", tmp_path / "out")
    assert (answer.code, "2 fields differ: tokens.calibration" in answer.message) == (2, True), answer.err
    change_weights(model, "model.norm.weight", lambda tensor: tensor.mul_(1.01))
    answer = call(*mine, "--out", tmp_path / "out")
    assert (answer.code, "1 fields differ: source.model.safetensors.sha256" in answer.message) == (2, True), answer.err


def test_another_evaluation_text_goes_on(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_at("state-saved", 2, *words, "--out", out)
    text = words[words.index("--calib") + 1]
    assert call(*words, "--eval", text, "--eval-windows", 1, "--out", out).code == 0
    assert taken_up(out) == [("closed form", 1), ("scores", 1)]


@pytest.mark.fault(33)
def test_a_second_run_on_the_same_output_is_refused(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out):
        answer = call(*words, "--out", out)
    assert answer.code == 2
    assert f"process {os.getpid()} on" in answer.message
    assert "wait for it, stop it, or choose another --out" in answer.message


@pytest.mark.fault(33)
def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    def body() -> None:
        with locked(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(body) == -signal.SIGKILL
    with locked(tmp_path / "out") as folder:
        assert (folder.path / "lock").read_text().startswith(f'{{"process": {os.getpid()}, "host"')


@pytest.mark.fault(33)
def test_a_lock_on_a_folder_that_was_removed_protects_nothing_and_is_taken_again(tmp_path: Path) -> None:
    real = os.open
    removed = []

    def slow(path: Any, *arguments: Any, **options: Any) -> int:
        descriptor = real(path, *arguments, **options)
        if str(path).endswith("lock") and not removed:  # the other run ends between our open and our lock
            removed.append(disk.remove(tmp_path / "out.resume"))
        return descriptor

    with mock.patch.object(os, "open", slow), locked(tmp_path / "out"):
        assert removed == [True]
        with pytest.raises(UsageError, match="is working on"), locked(tmp_path / "out"):
            pass


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out.resume"
    folder.mkdir()
    if kind == "file":
        (folder / "thesis.tex").write_text("x")
    elif kind == "link":
        (folder / "lock").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "kl.safetensors").mkdir()
    with pytest.raises(UsageError, match="was not put there by spectrim"), locked(tmp_path / "out", restart=True):
        pass
    assert len(list(folder.iterdir())) == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.fault(29)
@pytest.mark.parametrize("raw", [b"", b"{}", b'{"format_version": 2, "fields": {}}', None])
def test_a_fingerprint_that_cannot_be_read_is_never_a_silent_restart(tmp_path: Path, raw: bytes | None) -> None:
    with locked(tmp_path / "out") as folder:
        folder.claim({"a": 1})
        write_state(folder.state_path("kl"), 3, {"x": torch.zeros(2)}, {})
        path = folder.path / "fingerprint.json"
        path.unlink()
        if raw is not None:
            path.write_bytes(raw)
        with pytest.raises(InputError, match="--restart"):
            folder.claim({"a": 1})
        assert folder.states()


def test_fields_are_compared_one_level_deep(tmp_path: Path) -> None:
    assert flatten({"a": {"b": 1, "c": {"d": (2, 3)}}, "e": None}) == {"a.b": 1, "a.c.d": (2, 3), "e": None}
    with locked(tmp_path / "out") as folder:
        folder.claim({"a": {"c": (2, 3)}})
        folder.claim({"a": {"c": [2, 3]}, "b": "later"})
        with pytest.raises(UsageError, match=r"1 fields differ:\n  b: 'later' there, 'no' now\n"):
            folder.claim({"b": "no"})


def test_a_run_that_trains_nothing_goes_on_too(words: list[str], tmp_path: Path) -> None:
    plain = ["compress", words[1], "--method", "svd", "--eval", "none", "--save-every", "0"]
    assert call(*plain, "--out", tmp_path / "whole").code == 0
    killed_at("state-saved", 9, *plain, "--out", tmp_path / "out", again=True)
    assert call(*plain, "--out", tmp_path / "out").code == 0
    assert [told["stage"] for told in report_of(tmp_path / "out")["resumed"]] == [f"spectra 0 {n}" for n in range(9)]
    assert_same_result(tmp_path / "out", tmp_path / "whole")
    killed_at("state-saved", 9, *plain, "--out", tmp_path / "other", again=True)
    assert call(*plain, "--out", tmp_path / "other", "--restart").code == 0
    assert report_of(tmp_path / "other")["resumed"] == []


def test_a_folder_without_a_state_is_anybodys(words: list[str], tmp_path: Path) -> None:
    killed_at("locked", 1, *words, "--out", tmp_path / "out")
    killed_at("record-saved", 2, *words, "--seed", 7, "--out", tmp_path / "out")
    plain = ["compress", words[1], "--method", "svd", "--eval", "none", "--out", tmp_path / "out"]
    assert call(*plain).code == 0


# ---- damaged states


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "scores": torch.randn(3, 5, generator=generator),
        "moment": torch.randn(4, generator=generator, dtype=torch.float64).bfloat16(),
        "mask": torch.tensor([True, False]),
        "step": torch.tensor(7.0),
        "none": torch.zeros(0, 3),
    }


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    facts = {"losses": [0.1, 1e-300], "nested": {"a": [None, True, "ü"]}}
    write_state(tmp_path / "kl.safetensors", 12, some_tensors(), facts)
    step, tensors, back = read_state(tmp_path / "kl.safetensors")
    assert (step, back) == (12, facts)
    assert tensors.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.fault(30)
def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    write_state(path, 12, some_tensors(), {"a": 1})
    raw = path.read_bytes()
    for cut in range(0, len(raw), 7):
        path.write_bytes(raw[:cut])
        with pytest.raises(InputError):
            read_state(path)
    unnoticed = []
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        try:
            step, tensors, facts = read_state(path)
        except InputError:
            continue
        unnoticed.append(at)  # allowed where it changes nothing, as in the padding after the header
        assert (step, facts) == (12, {"a": 1})
        assert all(torch.equal(tensors[name], tensor) for name, tensor in some_tensors().items())
    assert len(unnoticed) < 16


@pytest.mark.fault(30)
def test_other_tensors_under_an_old_header_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "kl.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is not a spectrim-state-1 file"):
        read_state(path)
    for step in ("-1", "1e3", "9" * 5000, "\u0661"):
        metadata = {"format": "spectrim-state-1", "step": step, "facts": "{}", "sha256": "0"}
        save_file({"x": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(InputError, match="damaged or edited"):
            read_state(path)


@pytest.mark.fault(30, 29)
@pytest.mark.parametrize(
    ("damage", "stage", "left"),
    [
        ("truncated", "scores", [("closed form", 1)]),
        ("flipped", KL, [("closed form", 1), ("scores", STEPS), (KL_METRIC, 1)]),
        ("edited", "closed form", []),
        ("removed", "closed form", []),
    ],
)
def test_a_damaged_state_is_told_and_its_stage_starts_anew(
    words: list[str], whole: Path, tmp_path: Path, damage: str, stage: str, left: list[tuple[str, int]]
) -> None:
    out = tmp_path / "out"
    killed_at("state-saved", STEPS + 4, *words, "--out", out)
    path = WorkFolder(tmp_path / "out.resume").state_path(stage)
    raw = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif damage == "flipped":
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 64]) + raw[-4:])
    elif damage == "edited":
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    else:
        path.unlink()
    answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert taken_up(out) == left  # what came after the damaged stage is not taken up either
    warnings = report_of(out)["warnings"]
    later = {"closed form": 3, "scores": 2, KL: 0}[stage]
    assert len([w for w in warnings if "on which it was built" in w]) == later
    if damage != "removed":
        assert f"{stage} starts anew, which costs time and changes no number" in warnings[0]
    assert len(warnings) == later + (damage != "removed")
    assert warnings[0] in (out / "README.md").read_text()
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


# ---- the disk


@pytest.mark.fault(36, 40)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call_name", ["save_file", "fsync_file", "replace"])
def test_a_failing_disk_costs_the_state_and_not_the_run(tmp_path: Path, number: int, call_name: str) -> None:
    where = {"save_file": "spectrim.store.state.save_file", "replace": "spectrim.store.state.os.replace"}
    with locked(tmp_path / "out") as folder:
        resume = Resume(folder, save_every_s=0)
        resume.save("kl", loop.Saved(1, {"x": torch.ones(3)}, {}))
        before = hashes(folder.path)
        failing = mock.patch(
            where.get(call_name, "spectrim.store.disk.fsync_file"), side_effect=OSError(number, os.strerror(number))
        )
        with failing:
            resume.save("kl", loop.Saved(2, {"x": torch.zeros(3)}, {}))
        assert hashes(folder.path) == before
        assert len(resume.warnings) == 1
        assert "step 2 of kl could not be saved for resuming" in resume.warnings[0]
        assert os.strerror(number) in resume.warnings[0]
        assert "step 1 of kl" in resume.where()
        resume.save("kl", loop.Saved(3, {"x": torch.zeros(3)}, {}))
        assert read_state(folder.state_path("kl"))[0] == 3


@pytest.mark.fault(36)
def test_a_disk_that_is_full_all_the_time_still_gives_the_result(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("spectrim.store.state.save_file", side_effect=full):
        answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    metric = 1 + 1  # its sums over one batch, and itself
    assert len(report_of(out)["warnings"]) == EARLIER + 1 + STEPS + metric + DISTIL_STEPS
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not (tmp_path / "out.resume").exists()


def test_what_later_states_rest_on_is_written_as_soon_as_the_disk_allows(
    words: list[str], whole: Path, tmp_path: Path
) -> None:
    from spectrim.store import state

    out, real, calls = tmp_path / "out", state.save_file, [0]

    def full_twice(*arguments: Any, **options: Any) -> None:
        calls[0] += 1
        if EARLIER < calls[0] <= EARLIER + 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **options)

    with mock.patch.object(state, "save_file", full_twice):
        killed_at("state-saved", 2, *words, "--out", out)
    assert call(*words, "--out", out).code == 0
    assert taken_up(out) == [("closed form", 1), ("scores", 2)]
    assert_same_result(out, whole)


@pytest.mark.fault(36)
def test_a_full_disk_at_the_result_keeps_the_training(words: list[str], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(job, "write_folder", side_effect=full):
        answer = call(*words, "--out", out)
    assert answer.code == 4, answer.err
    assert f"The state after step {DISTIL_STEPS} of {KL} is kept" in answer.message
    assert "the same command goes on from there" in answer.message
    assert call(*words, "--out", out).code == 0
    assert_same_result(out, whole)


def test_a_folder_that_cannot_be_made_is_a_matter_of_resources(tmp_path: Path) -> None:
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch.object(Path, "mkdir", side_effect=refused), pytest.raises(ResourceError), locked(tmp_path / "out"):
        pass


# ---- when to save


def test_states_are_saved_by_the_clock_and_take_little_of_the_time(tmp_path: Path) -> None:
    resume = Resume(WorkFolder(tmp_path), save_every_s=60)
    with mock.patch("spectrim.resume.time.monotonic") as clock, mock.patch("spectrim.resume.write_state") as write:
        clock.return_value = 1000.0
        assert resume.load("kl") is None
        assert [resume.due() for clock.return_value in (1059.0, 1060.0)] == [False, True]
        write.side_effect = lambda *_: setattr(clock, "return_value", clock.return_value + 5)
        resume.save("kl", loop.Saved(1, {}, {}))
        now = clock.return_value
        assert [resume.due() for clock.return_value in (now + 149, now + 150)] == [False, True]


def test_off_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def body() -> bool:
        before = signal.getsignal(signal.SIGINT)
        with Resume(WorkFolder(tmp_path)).signals():
            return signal.getsignal(signal.SIGINT) is before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(body).result()


# ---- numbers


@pytest.mark.fault(57)
def test_a_loss_that_is_not_finite_keeps_the_last_good_state(words: list[str], tmp_path: Path) -> None:
    from spectrim.engines import learned

    losses, real = [0], learned.step_loss

    def spoiled(*arguments: Any) -> torch.Tensor:
        losses[0] += 1
        return real(*arguments) * (float("nan") if losses[0] == 4 else 1.0)

    out = tmp_path / "out"
    with mock.patch.object(learned, "step_loss", spoiled):
        answer = call(*words, "--out", out)
    assert answer.code == 5, answer.err
    assert "--set learning_rate=" in answer.message
    assert f"The state after step 3 of scores is kept in {out}.resume" in answer.message
    assert "with other options start anew with --restart" in answer.message
    step, tensors, _ = read_state(tmp_path / "out.resume" / "scores.safetensors")
    assert step == 3
    assert all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors.values())
    lower = [*words, "--set", "learning_rate=0.0017", "--out", out]
    assert call(*lower).code == 2
    assert call(*lower, "--restart").code == 0
    assert not (tmp_path / "out.resume").exists()


def test_a_stop_that_could_not_be_saved_says_so(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as folder:
        resume = Resume(folder)
        assert resume.load("kl") is None
        resume._stop = signal.SIGTERM
        assert resume.due()
        full = mock.patch("spectrim.store.state.save_file", side_effect=OSError(errno.ENOSPC, "full"))
        with full, pytest.raises(Interrupted, match="nothing was saved yet") as caught:
            resume.save("kl", loop.Saved(1, {}, {}))
        assert caught.value.exit_code == 143
