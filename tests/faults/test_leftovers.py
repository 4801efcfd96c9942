"""Locks, and the commands for what runs leave behind: verify, status, resume, clean."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from command_line import call, change_config, change_weights, hashes, shortest_run, small_model
from spectrim import job
from spectrim.errors import UsageError
from spectrim.store import lock, points, verify_manifest
from spectrim.store.leftovers import find_leftovers, remove_leftover
from spectrim.store.scratch import Scratch
from spectrim.store.state import write_state
from spectrim.store.work import locked
from spectrim.store.writer import staged, write_text

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return shortest_run(tmp_path_factory.mktemp("input"))


@pytest.fixture(scope="module")
def result(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("result") / "out"
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        assert call(*words, "--out", out).code == 0
    return out


def in_child(body: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body()
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(name: str, words: list[str], out: Path, count: int = 1) -> None:
    left = [count]

    def reached(here: str) -> None:
        left[0] -= here == name
        if here == name and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        with mock.patch.object(points, "reached", reached):
            call(*words, "--out", out)

    assert in_child(body) == -signal.SIGKILL


# ---- locks


def write_holder(out: Path, **changes: Any) -> None:
    folder = out.with_name("out.resume")
    folder.mkdir(exist_ok=True)
    (folder / "lock").write_text(json.dumps({**lock.identity(), **changes}))


@pytest.mark.fault(33)
def test_a_process_of_another_host_is_believed_until_it_is_said_to_be_gone(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_holder(out, host="elsewhere", process=1)
    answer = call(*words, "--out", out)
    assert answer.code == 2
    assert "process 1 on elsewhere was working on" in answer.message
    assert "if that process is gone, add --take-lock" in answer.message
    assert "process 1 on elsewhere" in call("status", tmp_path).out
    assert call(*words, "--out", out, "--take-lock").code == 0


@pytest.mark.fault(33)
def test_a_dead_process_of_this_host_is_no_obstacle(words: list[str], tmp_path: Path) -> None:
    for gone in ({"process": 2**22 - 1}, {"boot": "another"}, {"started": 1, "process": os.getppid()}):
        write_holder(tmp_path / "out", **gone)
        with locked(tmp_path / "out"):
            pass


@pytest.mark.fault(33, 41)
def test_locks_that_lie_do_not_let_a_second_process_in(words: list[str], tmp_path: Path) -> None:
    """On some mounts flock succeeds for everybody: what is written down then decides."""
    parent = os.getppid()
    write_holder(tmp_path / "out", process=parent, started=lock.started(parent))
    with pytest.raises(UsageError, match="locks do not work on this filesystem"), locked(tmp_path / "out"):
        pass
    refuse = OSError(37, "No locks available")
    with mock.patch.object(fcntl, "flock", side_effect=refuse), locked(tmp_path / "free"):
        pass


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\0\1\2", b'{"process": "x", "host": 3}', b"[" * 900, b"process 12 on old"]
)
def test_a_record_that_cannot_be_read_says_nothing(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "out.resume").mkdir()
    (tmp_path / "out.resume" / "lock").write_bytes(raw)
    with locked(tmp_path / "out"):
        assert lock.read_holder(tmp_path / "out.resume" / "lock") == lock.identity()
    assert (tmp_path / "out.resume" / "lock").read_bytes() == b""


@pytest.mark.fault(33, 21)
def test_two_processes_on_one_output(words: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with locked(tmp_path / "out"):
                os.write(write, b"x")
                time.sleep(30)
        finally:
            os._exit(0)
    os.read(read, 1)
    try:
        answer = call(*words, "--out", tmp_path / "out")
        assert answer.code == 2
        assert f"process {pid} on" in answer.message
        assert f"in use: process {pid} on" in call("status", tmp_path / "out").out
        assert call("clean", tmp_path, "--all", "--yes").out.startswith("keep")
        assert (tmp_path / "out.resume").exists()
        assert call("resume", tmp_path / "out").code == 2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# ---- torn, garbage, newer


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "--restart"),
        (b'{"format_version": 1, "fields": {"request', "--restart"),
        (os.urandom(200), "--restart"),
        (b'{"format_version": 99, "fields": {}}', "format_version '99', this spectrim reads 1"),
    ],
    ids=["empty", "torn", "garbage", "newer"],
)
def test_a_fingerprint_that_cannot_be_read_is_refused(words: list[str], tmp_path: Path, raw: bytes, says: str) -> None:
    out = tmp_path / "out"
    killed("state-saved", words, out, count=4)
    (tmp_path / "out.resume" / "fingerprint.json").write_bytes(raw)
    answer = call(*words, "--out", out)
    assert answer.code == 3, answer.err
    assert says in answer.message
    assert "--restart" in answer.message
    assert call(*words, "--out", out, "--restart").code == 0


@pytest.mark.fault(29)
def test_a_state_of_a_newer_version_is_told_and_made_again(words: list[str], result: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed("state-saved", words, out, count=4)
    path = tmp_path / "out.resume" / "statistics-0.safetensors"
    path.write_bytes(path.read_bytes().replace(b"spectrim-state-1", b"spectrim-state-2"))
    answer = call(*words, "--out", out)
    assert answer.code == 0, answer.err
    assert "is not a spectrim-state-1 file (its header says 'spectrim-state-2')" in answer.err
    assert hashes(out)["model.safetensors"] == hashes(result)["model.safetensors"]


# ---- verify


@pytest.mark.fault(10)
def test_a_sound_folder(result: Path) -> None:
    answer = call("verify", result)
    assert (answer.code, answer.out.strip()) == (0, f"{result}: sound")
    assert call("verify", result, "--json").json == {"folder": str(result), "problems": []}


@pytest.mark.fault(10, 30)
def test_every_problem_is_listed(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(*words, "--out", out).code == 0
    (out / "README.md").write_text("other")
    (out / "tokenizer.json").unlink()
    (out / "extra.txt").write_text("x")
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-5] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    answer = call("verify", out)
    assert answer.code == 3
    assert answer.out == ""
    for problem in ("changed: 'README.md'", "missing: 'tokenizer.json'", "extra: 'extra.txt'"):
        assert problem in answer.err
    assert "changed: 'model.safetensors': same size, other sha256" in answer.err
    assert "4 problems" in answer.err
    assert len(call("verify", out, "--json").json["problems"]) == 4


@pytest.mark.fault(15)
def test_tensors_against_config(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(*words, "--out", out).code == 0
    config = json.loads((out / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    first = next(iter(modules))
    modules[first]["rank"] -= 1
    change_config(out, **config)
    answer = call("verify", out)
    assert answer.code == 3
    assert "changed: 'config.json'" in answer.err
    assert first in answer.err.partition("config.json'")[2]


def test_a_norm_of_another_size(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call(*words, "--out", out).code == 0
    change_weights(out, "model.norm.weight", lambda tensor: tensor.resize_(7))
    answer = call("verify", out)
    assert answer.code == 3
    assert "model.norm.weight" in answer.err
    assert "[7] in model.safetensors, config.json asks for [32]" in answer.err


def test_a_folder_that_spectrim_did_not_write(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    answer = call("verify", model)
    assert answer.code == 3
    assert "has no manifest.json" in answer.err
    assert call("verify", tmp_path / "nothing").code == 3


# ---- status, resume, clean


@pytest.mark.fault(43)
def test_status_says_whose_how_far_how_large_and_how_to_go_on(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed("before-publish", words, out)
    (partial,) = tmp_path.glob("out.partial-*")
    held = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    assert held > 2**16
    for place in (tmp_path, out):
        shown = call("status", place).out
        assert f"{out}.resume: 0." in shown
        assert "how far: step 1 of closed form" in shown
        assert f"to go on: spectrim resume {out}" in shown
        assert f"that is:  spectrim compress {words[1]}" in shown
        assert f"{partial}: {held / 2**20:.1f} MiB" in shown
        assert "left over by a run that was killed while it wrote" in shown
    facts = call("status", tmp_path, "--json").json["found"]
    assert [fact["kind"] for fact in facts] == ["partial", "resume"]
    assert facts[1]["command"] == [*words, "--out", str(out)]
    assert facts[1]["states"] == [{"stage": "closed form", "step": 1}]
    assert call("status", tmp_path / "nothing").code == 2


@pytest.mark.fault(27, 24)
def test_resume_goes_on_with_the_recorded_command(
    words: list[str], result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    killed("state-saved", words, Path("out"), count=4)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    answer = call("resume", "../out")
    assert answer.code == 0, answer.err
    assert "resumed at" in answer.err
    assert answer.err.startswith("spectrim compress")
    assert hashes(tmp_path / "out")["model.safetensors"] == hashes(result)["model.safetensors"]
    answer = call("resume", tmp_path / "out")
    assert answer.code == 2
    assert "there is no run to go on with" in answer.message


@pytest.mark.fault(18, 29)
@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"words": ["compress", "m", "--out", "/tmp/other", "--overwrite"]}, 3),
        ({"words": ["clean", "--all", "--yes", "--out", "out"]}, 3),
        ({"words": ["compress"]}, 3),
        ({"words": []}, 3),
        ({"words": ["compress", 3]}, 3),
        ({"words": "compress"}, 3),
        ({"format_version": 2}, 3),
        ({"folder": 7}, 3),
        ({"words": ["compress"] * 2000}, 3),
    ],
)
def test_a_record_from_a_stranger_runs_nothing(tmp_path: Path, record: dict[str, Any], code: int) -> None:
    out = tmp_path / "out"
    with locked(out) as folder:
        folder.record(["compress", "m", "--out", str(out)])
        path = folder.path / "command.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **record}))
    answer = call("resume", out)
    assert answer.code == code, answer.err
    assert "type the command yourself" in answer.message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.resume"]


def test_a_run_from_python_leaves_no_command(tmp_path: Path) -> None:
    with locked(tmp_path / "out") as folder:
        folder.record(["compress", "--out", "out"])
        folder.record(())
    answer = call("resume", tmp_path / "out")
    assert (answer.code, "has no command.json" in answer.message) == (2, True)


@pytest.mark.fault(43)
def test_clean_removes_what_nobody_holds(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        killed("before-publish", words, out)
    with staged(tmp_path / "other") as folder:
        write_text(folder / "config.json", "{}")
        answer = call("clean", tmp_path)
        assert (answer.code, answer.out.count("remove  ")) == (2, 2), answer.err
        assert "2 folders to remove and nobody to ask; add --yes" in answer.message
        with mock.patch("sys.stdin.isatty", return_value=True), mock.patch("typer.confirm", return_value=False):
            assert "removed 0 folders, of 4 found" in call("clean", tmp_path).out
        assert len(list(tmp_path.glob("*.partial-*"))) == 3
        answer = call("clean", tmp_path, "--yes")
        assert answer.code == 0, answer.err
        assert [p for p in tmp_path.glob("*.partial-*")] == [folder]
    assert (tmp_path / "out.resume").exists(), "states are only removed when asked for"
    assert call("clean", tmp_path, "--all", "--yes", "--json").json["removed"][0]["kind"] == "resume"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]
    assert call("clean", tmp_path, "--json").code == 2


@pytest.mark.fault(43)
@pytest.mark.parametrize("what", ["folder", "link", "file"])
def test_clean_takes_nothing_that_spectrim_does_not_write(tmp_path: Path, what: str) -> None:
    for name in ("thesis.partial-deadbeef", "thesis.resume", "thesis.old-deadbeef"):
        (tmp_path / name).mkdir()
        entry = tmp_path / name / "chapter.tex"
        if what == "folder":
            entry.mkdir()
        elif what == "link":
            entry.symlink_to(tmp_path)
        else:
            entry.write_text("x")
    (tmp_path / "link.partial-deadbeef").symlink_to(tmp_path / "thesis.resume")
    (tmp_path / "file.partial-deadbeef").write_text("x")
    before = sorted(p.name for p in tmp_path.rglob("*") if not p.is_symlink())
    answer = call("clean", tmp_path, "--all", "--yes")
    assert answer.code == 0, answer.err
    assert "removed 0 folders, of 3 found" in answer.out
    assert sorted(p.name for p in tmp_path.rglob("*") if not p.is_symlink()) == before


@pytest.mark.fault(28, 43)
def test_the_only_copy_of_an_old_result_is_kept(tmp_path: Path) -> None:
    aside = tmp_path / "out.old-deadbeef"
    aside.mkdir()
    (aside / "config.json").write_text("{}")
    assert "removed 0 folders, of 1 found" in call("clean", tmp_path, "--all", "--yes").out
    (tmp_path / "out").mkdir()
    assert "removed 1 folder, of 1 found" in call("clean", tmp_path, "--all", "--yes").out


def killed_with_scratch_files(words: list[str], out: Path) -> None:
    """A run of `--low-memory` that is killed while it works out its first block."""
    put = Scratch.put

    def last(self: Scratch, tensor: torch.Tensor) -> Any:
        stored = put(self, tensor)
        if self._made == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return stored

    def body() -> None:
        with mock.patch.object(Scratch, "put", last):
            call(*words, "--low-memory", "--out", out)

    assert in_child(body) == -signal.SIGKILL


@pytest.mark.fault(25, 43)
def test_clean_takes_the_scratch_files_of_dead_runs_and_leaves_what_goes_on(words: list[str], tmp_path: Path) -> None:
    killed_with_scratch_files(words, tmp_path / "out")
    work = tmp_path / "out.resume"
    scratch = sorted(work.glob("scratch-*.new"))
    nbytes = sum(path.stat().st_size for path in scratch)
    assert nbytes > 1000, scratch
    assert "of it are scratch files of a dead run; `spectrim clean` removes them alone" in call("status", tmp_path).out
    assert call("status", tmp_path, "--json").json["found"][-1]["scratch_bytes"] == nbytes
    answer = call("clean", tmp_path)
    assert (answer.code, "1 folder and the scratch files of 1 run to remove and nobody" in answer.message) == (2, True)
    assert sorted(work.glob("scratch-*.new")) == scratch
    answer = call("clean", tmp_path, "--yes")
    assert answer.code == 0, answer.err
    assert f"remove  the scratch files in {work}: " in answer.out
    assert "removed 1 folder and the scratch files of 1 run, of 2 found" in answer.out
    assert sorted(path.name for path in work.iterdir()) == ["command.json", "fingerprint.json", "lock"]
    assert "removed 0 folders, of 1 found" in call("clean", tmp_path, "--yes").out
    assert call("resume", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.fault(33, 43)
@pytest.mark.parametrize("holder", ["living", "elsewhere", "written down"])
def test_scratch_files_stay_while_a_process_may_need_them(tmp_path: Path, holder: str) -> None:
    """With its lock; of another host, of which nobody here knows; where the filesystem has no locks."""
    scratch = tmp_path / "out.resume" / "scratch-000000.new"
    with locked(tmp_path / "out"):
        scratch.write_bytes(b"x")
        if holder == "living":
            assert call("clean", tmp_path, "--yes").out.startswith("keep")
            assert call("clean", tmp_path, "--all", "--yes").out.startswith("keep")
    if holder == "elsewhere":
        write_holder(tmp_path / "out", host="elsewhere", process=1)
    if holder == "written down":
        parent = os.getppid()
        write_holder(tmp_path / "out", process=parent, started=lock.started(parent))
    if holder != "living":
        assert call("clean", tmp_path, "--yes").out.startswith("keep")
    assert scratch.exists()


@pytest.mark.fault(43)
def test_scratch_files_are_of_no_interest_once_their_run_has_ended(tmp_path: Path) -> None:
    """Between looking and removing another run may have gone on, published and removed its folder, or be at work."""
    with locked(tmp_path / "out") as folder:
        (folder.path / "scratch-000000.new").write_bytes(b"x")
    (found,) = find_leftovers(tmp_path)
    with locked(tmp_path / "out") as folder:
        with pytest.raises(UsageError, match="is working on"):
            remove_leftover(found, "scratch files")
        folder.remove()
    remove_leftover(found, "scratch files")
    assert list(tmp_path.iterdir()) == []


# ---- signals


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("number", "code", "stage"),
    [(signal.SIGHUP, 129, "calibrate"), (signal.SIGTERM, 143, "propagate"), (signal.SIGINT, 130, "newton")],
)
def test_a_signal_in_the_closed_form_saves_and_goes_on(
    words: list[str], tmp_path: Path, number: int, code: int, stage: str
) -> None:
    from spectrim import terminal

    fast = [*words, "--method", "soco", "--preset", "fast", "--set", "rounds=0", "--save-every", "3600"]
    assert call(*fast, "--out", tmp_path / "whole").code == 0
    out, said = tmp_path / "out", tmp_path / "said"

    def printer(_quiet: bool) -> Callable[[str, int, int], None]:
        def show(label: str, done: int, total: int) -> None:
            if label == stage and done < max(total, 2) and not sent:
                sent.append(1)
                os.kill(os.getpid(), number)

        sent: list[int] = []
        return show

    def body() -> None:
        with (
            mock.patch.object(terminal, "progress_printer", printer),
            mock.patch("spectrim.cli.progress_printer", printer),
        ):
            answer = call(*fast, "--out", out)
        said.write_text(json.dumps([answer.code, answer.message]))

    in_child(body)
    found, message = json.loads(said.read_text())
    assert found == code, message
    assert f"stopped by {signal.Signals(number).name}; the state after step" in message
    assert f"is kept in {out}.resume. To go on: spectrim compress" in message
    assert call(*message.partition("To go on: spectrim ")[2].split()).code == 0
    verify_manifest(out)
    assert hashes(out)["model.safetensors"] == hashes(tmp_path / "whole")["model.safetensors"]


@pytest.mark.fault(27)
def test_a_signal_while_a_state_is_written_lets_it_be_finished(words: list[str], tmp_path: Path) -> None:
    said = tmp_path / "said"
    left = [3]

    def reached(name: str) -> None:
        left[0] -= name == "state-written"
        if name == "state-written" and not left[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    def body() -> None:
        with mock.patch.object(points, "reached", reached):
            answer = call(*words, "--out", tmp_path / "out")
        said.write_text(f"{answer.code} {answer.message}")

    in_child(body)
    assert said.read_text().startswith("143 "), said.read_text()
    assert "is kept in" in said.read_text()
    assert not list((tmp_path / "out.resume").glob("*.new"))


@pytest.mark.fault(27, 28)
def test_a_signal_after_publishing_says_that_the_result_is_there(words: list[str], tmp_path: Path) -> None:
    said = tmp_path / "said"

    def reached(name: str) -> None:
        if name == "after-publish":
            os.kill(os.getpid(), signal.SIGTERM)

    def body() -> None:
        with mock.patch.object(points, "reached", reached):
            answer = call(*words, "--out", tmp_path / "out")
        said.write_text(f"{answer.code} {answer.message}")

    in_child(body)
    assert said.read_text().startswith("143 ")
    assert f"stopped by SIGTERM; {tmp_path / 'out'} is complete" in said.read_text()
    verify_manifest(tmp_path / "out")


@pytest.mark.fault(27)
def test_a_signal_that_was_ignored_stays_ignored() -> None:
    from spectrim.resume import Resume
    from spectrim.store.work import WorkFolder
    from spectrim.terminal import stoppable

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with stoppable(), Resume(WorkFolder(Path("."))).signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault(27)
def test_a_terminal_that_is_gone_does_not_hide_the_exit_code() -> None:
    from spectrim import terminal

    gone = OSError(5, "Input/output error")
    with (
        mock.patch.object(terminal.stderr, "print", side_effect=gone),
        pytest.raises(SystemExit) as caught,
        terminal.exit_codes(),
    ):
        raise UsageError("x")
    assert caught.value.code == 2


@pytest.mark.fault(36, 25)
def test_temporary_files_of_a_kill_are_swept(tmp_path: Path) -> None:
    """safetensors writes through `.tmpXXXXXX` of its own; a kill in the middle leaves it."""
    with locked(tmp_path / "out") as folder:
        write_state(folder.state_path("kl"), 1, {"x": torch.zeros(2)}, {})
    for name in (".tmpAb3dE9", "kl.safetensors.new", "fingerprint.json.new"):
        (folder.path / name).write_bytes(b"half")
    with locked(tmp_path / "out") as folder:
        assert sorted(p.name for p in folder.path.iterdir()) == ["kl.safetensors", "lock"]
