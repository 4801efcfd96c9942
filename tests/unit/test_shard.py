"""`--shard I/N`: tasks that share nothing but a disk, and the run that goes on from what they have measured."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import spectrim
from command_line import Answer, call, change_weights, small_model, small_text
from spectrim import job, shard_job
from spectrim.engines import measure as measuring
from spectrim.engines.way import Way
from spectrim.errors import InputError, UsageError
from spectrim.resume import Resume
from spectrim.shard import Shard, parse_shard, shard_target
from spectrim.shard_parts import ShardParts
from spectrim.store.state import read_state, write_state
from spectrim.store.work import locked
from tiny_models import token_ids

assert spectrim  # registers the format that the results are in
SIZES = ("--calib-windows", "24", "--gradient-windows", "12", "--calib-length", "16")
"""A third of either kind of window is one batch on a CPU."""
LESS = ("--keep", "0.6")
BITS = ("--keep", "0.2", "--set")
RUNS = {
    "svd-llm": (*LESS, "--method", "svd-llm"),
    "two-sided": (*LESS, "--method", "two-sided", "--set", "coupling=sequence", "--set", "rounds=1"),
    "soco": (*LESS, "--method", "soco", "--set", "steps=0", "--set", "newton=1", "--set", "rounds=1"),
    "gptq": ("--keep", "0.4", "--set", "group_size=16", "--method", "gptq"),
    "trellis": (*BITS, "window=8", "--method", "trellis"),
    "bytes": ("--keep-bytes", "0.955", "--dtype", "bfloat16", "--set", "window=8"),
}
"""Options by what is tried. A budget in bytes takes trellis, and is settled in every task alike."""


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with (
        mock.patch.object(job, "reload_difference", return_value=0.0),
        mock.patch.object(measuring, "cpu_has_bf16", return_value=False),
    ):
        yield


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that takes a second; --out, --keep and --method are missing."""
    where = tmp_path_factory.mktemp("input")
    model, text = small_model(where / "model"), small_text(where / "text.txt")
    return ["compress", str(model), "--calib", str(text), "--eval", "none", *SIZES]


@pytest.fixture
def words(given: list[str], tmp_path: Path) -> list[str]:
    return [*given, *LESS, "--method", "two-sided", "--set", "rounds=1", "--out", str(tmp_path / "out")]


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(token_ids(8, 16)).logits.double()


def well(answer: Answer) -> Answer:
    assert answer.code == 0, answer.err
    return answer


def all_of(words: list[str], of: int) -> None:
    for number in range(of, 0, -1):  # in any order
        well(call(*words, "--shard", f"{number}/{of}"))


def sums_of(out: Path, number: int, of: int = 3) -> Path:
    return shard_target(out, Shard(number, of)).with_name(f"out.shard-{number}-of-{of}.resume") / "share.safetensors"


# ---- the result


@pytest.mark.parametrize("run", [pytest.param(run, marks=[pytest.mark.slow] if run == "soco" else []) for run in RUNS])
def test_three_tasks_make_what_one_process_makes(given: list[str], tmp_path: Path, run: str):
    words = [*given, *RUNS[run], "--out"]
    well(call(*words, tmp_path / "one"))
    all_of([*words, str(tmp_path / "out")], 3)
    assert not (tmp_path / "out").exists()
    with mock.patch.object(measuring, "add_up", wraps=measuring.add_up) as add_up:
        well(call(*words, tmp_path / "out", "--shard", "merge/3"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    steps = [{"stage": f"shard {i}/3", "step": 8 * i if run in ("svd-llm", "gptq") else 12 + 4 * i} for i in (1, 2, 3)]
    assert [told for told in report["resumed"] if told["stage"].startswith("shard")] == steps
    assert add_up.call_args_list[0].kwargs["stage"] == "statistics 0"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]
    one, found = logits(tmp_path / "one"), logits(tmp_path / "out")
    dense = logits(Path(given[1]))
    assert float((one - dense).abs().max() / dense.abs().max()) > 2e-3
    assert float((found - one).abs().max() / one.abs().max()) < 1e-6


def test_a_merge_sees_no_window_in_its_first_round(words: list[str], tmp_path: Path):
    """One that looked at windows again would be right, and of no use."""
    words = [word if word != "rounds=1" else "rounds=0" for word in words] + ["--set", "coupling=none"]
    words += ["--set", "propagate=0"]
    all_of(words, 3)
    with mock.patch.object(measuring, "check_sums") as after_every_batch:
        well(call(*words, "--shard", "merge/3"))
    assert after_every_batch.call_count == 0


# ---- what stops


def test_a_killed_task_goes_on_and_leaves_the_same_sums(words: list[str], tmp_path: Path):
    well(call(*words, "--shard", "2/3"))
    wanted = load_file(sums_of(tmp_path / "out", 2))
    shutil.rmtree(sums_of(tmp_path / "out", 2).parent)
    words = [*words, "--save-every", "0", "--shard", "2/3"]
    pid = os.fork()
    if pid == 0:
        with mock.patch.object(Resume, "save", saved_then_killed):
            call(*words)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in sums_of(tmp_path / "out", 2).parent.glob("*.safetensors")] == [
        "statistics-0.safetensors"
    ]
    merge = call(*words[:-1], "merge/3")
    assert merge.code == 2
    assert "3 of 3 shards cannot be added up" in merge.message
    assert "shard 2/3: " in merge.message
    assert "holds no complete sums: it was stopped, or is still at work" in merge.message
    passed: list[int] = []
    with mock.patch.object(measuring, "backward_from_sampled_labels", side_effect=lambda *_: passed.append(1)):
        well(call(*words))
    assert passed == [], "the windows with gradients were summed up before the kill"
    found = load_file(sums_of(tmp_path / "out", 2))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert found.keys() == wanted.keys()


def test_a_task_that_is_told_to_stop_saves_its_sums(words: list[str], tmp_path: Path):
    with mock.patch.object(measuring, "check_sums", side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
        answer = call(*words, "--shard", "1/3")
    assert answer.code == 128 + signal.SIGTERM
    assert "the state after step 4 of statistics 0 is kept" in answer.message
    assert "shard 1/3 measured" in well(call(*words, "--shard", "1/3")).out


def saved_then_killed(self: Resume, stage: str, saved: object, **told: bool) -> bool:
    """The first state is written, then the process is gone."""
    SAVE(self, stage, saved, **told)  # type: ignore[arg-type]  handed on as it came
    os.kill(os.getpid(), signal.SIGKILL)
    return True


SAVE = Resume.save


def test_a_merge_that_was_stopped_goes_on_and_an_ordinary_run_does_not_take_it_up(words: list[str], tmp_path: Path):
    words = [*words, "--save-every", "0"]
    all_of(words, 2)
    with mock.patch.object(job, "round_to", side_effect=InputError("as if killed")):
        assert call(*words, "--shard", "merge/2").code == 3
    answer = call(*words)
    assert answer.code == 2
    assert "shards: 2 there, 1 now" in answer.message
    again = well(call(*words, "--shard", "merge/2", "--json"))
    assert [told["stage"] for told in again.json["resumed"]] == ["closed form"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_task_that_is_done_does_nothing_and_is_gone_on_with_by_name(words: list[str], tmp_path: Path):
    well(call(*words, "--shard", "1/2"))
    with mock.patch.object(shard_job, "load_dense", side_effect=AssertionError("it was measured again")):
        assert "shard 1/2 was measured already" in well(call(*words, "--shard", "1/2")).out
        answer = well(call("resume", tmp_path / "out.shard-1-of-2"))
    assert "measured already" in answer.out
    assert call("resume", tmp_path / "out").code == 2
    listed = well(call("status", tmp_path)).out
    assert "step 18 of share" in listed


def test_two_tasks_of_one_number_exclude_each_other(words: list[str], tmp_path: Path):
    with locked(shard_target(tmp_path / "out", Shard(1, 2))):
        answer = call(*words, "--shard", "1/2")
        assert answer.code == 2
        assert "is working on" in answer.message
        well(call(*words, "--shard", "2/2"))


# ---- what is refused


def test_a_merge_names_every_shard_that_is_missing_or_of_another_run(words: list[str], tmp_path: Path):
    well(call(*words, "--shard", "1/3"))
    well(call(*words, "--shard", "2/3", "--seed", "7"))
    well(call(*words, "--shard", "1/2"))
    answer = call(*words, "--shard", "merge/3")
    assert answer.code == 2
    assert "2 of 3 shards cannot be added up" in answer.message
    assert "shard 2/3: " in answer.message
    assert "request.seed: 7 there, 0 now" in answer.message
    assert "out.shard-3-of-3.resume is not there" in answer.message
    assert "There are shards of 2" in answer.message
    assert not (tmp_path / "out.resume").exists()


def test_another_model_and_a_shard_under_another_number_are_refused(words: list[str], tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(words[1], model)
    words[1] = str(model)
    all_of(words, 2)
    shutil.copytree(sums_of(tmp_path / "out", 1, 2).parent, tmp_path / "kept")
    shutil.rmtree(sums_of(tmp_path / "out", 1, 2).parent)
    shutil.copytree(sums_of(tmp_path / "out", 2, 2).parent, sums_of(tmp_path / "out", 1, 2).parent)
    assert "shard: '2/2' there, '1/2' now" in call(*words, "--shard", "merge/2").message
    shutil.rmtree(sums_of(tmp_path / "out", 1, 2).parent)
    shutil.copytree(tmp_path / "kept", sums_of(tmp_path / "out", 1, 2).parent)
    change_weights(model, "model.norm.weight", lambda weight: weight.add_(1))
    answer = call(*words, "--shard", "merge/2")
    assert answer.code == 2
    assert "source.model.safetensors" in answer.message


def test_another_text_is_refused(words: list[str], tmp_path: Path):
    text = tmp_path / "text.txt"
    words[words.index("--calib") + 1] = str(small_text(text))
    all_of(words, 2)
    text.write_text(text.read_text()[500:])
    answer = call(*words, "--shard", "merge/2")
    assert answer.code == 2
    assert "tokens.calibration" in answer.message


def test_status_and_clean_of_the_output_find_its_shards(words: list[str], tmp_path: Path):
    well(call(*words, "--shard", "1/2"))
    told = well(call("status", tmp_path / "out")).out
    assert "out.shard-1-of-2.resume" in told
    assert "complete: waits for the run with --shard merge/N" in told
    assert "spectrim resume" not in told
    assert call("status", tmp_path / "ou").code == 2
    well(call("clean", tmp_path / "out", "--all", "--yes"))
    assert list(tmp_path.iterdir()) == []


def test_clean_keeps_complete_shards_unless_their_output_is_named(words: list[str], tmp_path: Path):
    """One command for a folder of outputs must not take what hours of an array went into."""
    well(call(*words, "--shard", "1/2"))
    for target in (shard_target(tmp_path / "out", Shard(2, 2)), tmp_path / "other"):  # not complete, and of no array
        with locked(target) as folder:
            write_state(folder.state_path("statistics 0"), 1, {}, {})
    told = well(call("clean", tmp_path, "--all", "--yes")).out
    kept = sums_of(tmp_path / "out", 1, 2).parent
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert f"keep    {kept}" in told
    assert (
        f"complete: waits for the run with --shard merge/N; to remove it: spectrim clean {tmp_path}/out --all" in told
    )
    with locked(tmp_path / "out"):  # a merge is at work: stopped, it would need them again
        assert "removed 0 folders" in well(call("clean", tmp_path / "out", "--all", "--yes")).out
    shutil.rmtree(tmp_path / "out.resume")
    assert "removed 1 folder, of 1 found" in well(call("clean", tmp_path / "out.shard-1-of-2", "--all", "--yes")).out


def test_damaged_sums_are_refused_and_measured_again(words: list[str], tmp_path: Path):
    all_of(words, 2)
    path = sums_of(tmp_path / "out", 2, 2)
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 4]) + whole[middle + 4 :])
    answer = call(*words, "--shard", "merge/2")
    assert answer.code == 3
    assert "damaged or edited" in answer.message
    assert "--shard 2/2, then this one again" in answer.message
    assert "shard 2/2 measured" in well(call(*words, "--shard", "2/2")).out
    path.with_name("whole.safetensors").write_bytes(whole)
    (step, found, facts), wanted = read_state(path), read_state(path.with_name("whole.safetensors"))
    assert (step, facts) == (wanted[0], wanted[2])
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted[1].items())
    well(call(*words, "--shard", "merge/2"))


def test_sums_that_do_not_fit_are_never_measured_again_unasked(words: list[str], tmp_path: Path):
    all_of(words, 1)
    path = sums_of(tmp_path / "out", 1, 1)
    step, tensors, facts = read_state(path)
    write_state(path, step, tensors, {**facts, "run": {**facts["run"], "seed": 5}})
    answer = call(*words, "--shard", "merge/1")
    assert answer.code == 3
    assert "it was measured by other runs, which must be done again" in answer.message


def test_sums_of_other_windows_are_not_added_up(words: list[str], tmp_path: Path):
    all_of(words, 2)
    path = sums_of(tmp_path / "out", 2, 2)
    step, tensors, facts = read_state(path)
    write_state(path, step, tensors, {**facts, "run": {**facts["run"], "border": 5}})
    answer = call(*words, "--shard", "merge/2")
    assert answer.code == 3
    assert "its sums are not of the same windows" in answer.message


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--any-size",), "--shard is for one size"),
        (("--low-memory",), "--low-memory measures layer by layer"),
        (("--shard-weights",), "--shard-weights shares weights out among processes"),
        (("--calib", "self"), "with --calib self every task would write all of it"),
        (("--method", "svd"), "method svd has no first pass over the windows that could be shared out"),
        (("--gradient-windows", "2"), "2 calibration windows (those that give gradients, where there are fewer"),
        (("--shard", "0/3"), "the tasks of an array of N are 1/N to N/N"),
        (("--shard", "4/3"), "number it from 1"),
        (("--shard", "3"), "expected I/N or merge/N"),
        (("--shard", "merge/0"), "the tasks of an array of N are 1/N to N/N"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(words: list[str], tmp_path: Path, more: tuple[str, ...], says):
    words = [word for word in words if word not in ("--set", "rounds=1")]
    answer = call(*words, "--shard", "1/3", *more)
    assert answer.code == 2, answer.err
    assert says in answer.message
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_measures_behind_its_own_layers_is_refused(given: list[str], tmp_path: Path):
    words = [*given, *LESS, "--out", str(tmp_path / "out"), "--method", "gptq", "--set", "sequential=true"]
    answer = call(*words, "--shard", "1/2")
    assert answer.code == 2, answer.err
    assert "measures layers behind those that it has compressed" in answer.message


def test_processes_and_models_that_are_measured_block_by_block_are_refused(words: list[str], monkeypatch):
    with mock.patch.object(shard_job, "way_of", side_effect=lambda _d, _w, method, _o: Way(False, method)):
        assert "measured block by block, which --shard does not share out" in call(*words, "--shard", "1/2").message
    monkeypatch.setattr("spectrim.several_job.launched", lambda: 2)
    answer = call(*words, "--shard", "merge/2")
    assert answer.code == 2
    assert "--shard is not spread over several processes" in answer.message


def test_shards_are_parsed_and_named():
    assert parse_shard("2/8") == Shard(2, 8)
    assert str(parse_shard("merge/8")) == "merge/8"
    assert shard_target(Path("a/out"), Shard(2, 8)) == Path.cwd() / "a/out.shard-2-of-8"
    assert shard_target(Path("a/out"), Shard(None, 8)) == Path.cwd() / "a/out"
    for text in ("", "1", "a/2", "1/", "-1/2", "1/2/3", "٢/8", "merge/", "1 /2"):
        with pytest.raises(UsageError, match="--shard"):
            parse_shard(text)


def test_only_the_first_statistics_come_from_shards(tmp_path: Path):
    assert ShardParts(tmp_path / "out", 2).load("spectra 0 0", {}) is None
