"""Two processes on one CPU: the result is that of one, and when one fails the other says which and leaves."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import several_worker
from command_line import small_model, small_text
from several_worker import free_port
from spectrim import cli_ranks, processes, same_for_all
from spectrim.engines import measure as measuring
from spectrim.engines import unspread
from spectrim.engines.dead_inputs import dead_inputs
from spectrim.errors import ResourceError, UsageError
from spectrim.eval_job import EvalRequest, run_eval
from spectrim.models.load import resolve
from spectrim.options import Step
from spectrim.peers import Member
from spectrim.processes import Group, launched, own_device, spread_by_cost
from spectrim.registry import make_method
from spectrim.request import Request
from spectrim.stats import Stats
from tiny_models import logits_of, tiny


class Ended(NamedTuple):
    code: int
    err: str


def rank_of(out: Path, case: str, environment: dict[str, str], said: int) -> None:
    """One of the processes, which need not import torch again."""
    os.environ.update(environment)
    os.dup2(said, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  as long as the process
    sys.argv = [several_worker.__file__, str(out), case]
    os._exit(several_worker.main())


def start_all(out: Path, case: str, world: int = 2, timeout_s: float = 500) -> list[Ended]:
    """A case of several_worker.py in so many forks, as a launcher would start them; how each ended, by rank."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ended = []
    with ExitStack() as files:
        said = [files.enter_context(TemporaryFile("w+")) for _ in range(world)]
        started = [
            get_context("fork").Process(
                target=rank_of,
                args=(out, case, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, file.fileno()),
            )
            for rank, file in enumerate(said)
        ]
        for process in started:
            process.start()
        try:
            for process, file in zip(started, said, strict=True):
                process.join(timeout_s)
                assert process.exitcode is not None, "it does not end"
                file.seek(0)
                ended.append(Ended(process.exitcode, file.read()))
        finally:
            for process in started:
                process.kill()
                process.join()
                process.close()
    return ended


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    for ended in start_all(out, "compare"):
        assert ended.code == 0, ended.err
    return out


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if found.shape == wanted.shape and not wanted.numel():  # a weight that is kept as other tensors
        return 0.0
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-300))


def test_statistics_are_those_of_one_process_and_each_layer_has_one_owner(by_two: Path):
    one = several_worker.statistics()
    first, second = (load_file(by_two / f"statistics {rank}.safetensors") for rank in range(2))
    assert not set(first) & set(second)
    assert set(first) | set(second) == set(one)
    assert len({name.rpartition(".")[0] for name in first}) in range(5, 10)  # of 14 layers
    for name, tensor in {**first, **second}.items():
        assert relative(tensor, one[name]) < 1e-6, name


@pytest.mark.parametrize("method", several_worker.METHODS)
def test_two_processes_make_the_same_model_as_one(by_two: Path, method: str):
    ranks = [load_file(by_two / f"{method} {rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0]), "ranks hold different models"
    one = several_worker.compressed(method)
    assert ranks[0].keys() == one.state_dict().keys()
    wanted = logits_of(one, several_worker.ids())
    assert relative(wanted, logits_of(tiny(several_worker.architecture(method)), several_worker.ids())) > 1e-3
    one.load_state_dict(ranks[0])
    # Scores are trained in float32, where a batch in two parts rounds otherwise, and Adam's first steps look at signs.
    assert relative(logits_of(one, several_worker.ids()), wanted) < (1e-5 if method == "soco balanced" else 1e-6)


def test_a_large_model_whose_frozen_weights_are_in_parts_is_that_of_one_process(by_two: Path):
    """Measured block by block, spectra at their owners, scores learned on shared-out components, states kept."""
    ranks = [load_file(by_two / f"soco sharded {rank}.safetensors") for rank in range(2)]
    again = [load_file(by_two / f"gone on {rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(own[n], ranks[0][n]) for own in (ranks[1], *again) for n in ranks[0])
    agrees_with_one_process("soco sharded", ranks[0])


def agrees_with_one_process(method: str, found: dict[str, torch.Tensor]) -> None:
    one = several_worker.compressed_as_large(method)
    wanted = logits_of(one, several_worker.ids())
    one.load_state_dict(found)
    assert relative(logits_of(one, several_worker.ids()), wanted) < 1e-5


@pytest.mark.slow
def test_large_models_are_those_of_one_process(tmp_path: Path):
    for ended in start_all(tmp_path, "large"):
        assert ended.code == 0, ended.err
    for method in several_worker.LARGE:
        ranks = [load_file(tmp_path / f"{method} {rank}.safetensors") for rank in range(2)]
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0]), "ranks hold different models"
        agrees_with_one_process(method, ranks[0])


def test_evaluation_shares_the_windows(by_two: Path):
    one = several_worker.quality(several_worker.compressed("svd-llm"))["quality"]
    for rank in range(2):
        assert relative(load_file(by_two / f"quality {rank}.safetensors")["quality"], one) < 1e-6


@pytest.mark.slow
def test_torchrun_writes_the_folder_that_one_process_writes(tmp_path: Path):
    model, text = small_model(tmp_path / "model"), small_text(tmp_path / "text.txt")
    words = [
        *("compress", str(model), "--method", "svd-llm", "--keep", "0.6", "--calib", str(text), "--eval", str(text)),
        *("--calib-windows", "8", "--calib-length", "32", "--eval-windows", "4", "--device", "cpu", "--json", "--out"),
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    reports = {}
    for out, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, "-m", "spectrim", *words, str(tmp_path / out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        reports[out] = json.loads(done.stdout)  # one process speaks
    assert reports["two"]["processes"] == {"count": 2, "hosts": 1}
    assert "processes" not in reports["one"]
    for name in ("dense", "compressed"):
        one, two = (reports[out]["quality"][name]["perplexity"] for out in ("one", "two"))
        assert abs(two / one - 1) < 1e-6
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(relative(two[name], one[name]) < 1e-6 for name in one)

    assert len(reports["two"]["samples"]) == len(reports["one"]["samples"])

    facts = {}
    words = ["eval", str(tmp_path / "two"), "--against", str(model), "--text", str(text), "--length", "32"]
    for out, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, "-m", "spectrim", *words, "--device", "cpu", "--windows", "5", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        facts[out] = json.loads(done.stdout)
        assert facts[out]["model"]["decode_tokens_per_s"] > 0  # of the first alone
    assert facts["two"]["sha256"] == facts["one"]["sha256"]
    assert abs(facts["two"]["model"]["perplexity"] / facts["one"]["model"]["perplexity"] - 1) < 1e-3  # bf16, by batches

    refused = subprocess.run(
        [sys.executable, *launcher, "-m", "spectrim", "inspect", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert "spectrim inspect is done by one process" in refused.stderr


# ---- the arithmetic of sharing


@pytest.mark.parametrize(("count", "world"), [(0, 3), (1, 2), (7, 3), (9, 2), (5, 8), (64, 8)])
def test_shares_cover_all_once_and_differ_by_one(count: int, world: int):
    shares = [range(count)[Group(rank=rank, world=world).share_of(count)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_work_goes_to_the_least_loaded_the_dearest_first():
    assert spread_by_cost([1, 5, 2, 2, 4], 2) == [1, 0, 1, 0, 1]
    assert spread_by_cost([3, 3, 3], 1) == [0, 0, 0]
    costs = [float(i % 7 + 1) for i in range(50)]
    for world in (2, 3, 8):
        load = [sum(c for c, r in zip(costs, spread_by_cost(costs, world), strict=True) if r == rank)
                for rank in range(world)]  # fmt: skip
        assert max(load) - min(load) <= max(costs)


# ---- failures


@pytest.mark.parametrize(
    ("case", "code", "says"),
    [
        ("killed", 4, "its process has ended without a word"),
        pytest.param("deaf", 143, "it was stopped by SIGTERM", marks=pytest.mark.slow),
        pytest.param(
            *("fails", 5, "the inputs are not finite in the batch that starts at calibration window"),
            marks=pytest.mark.slow,
        ),
        pytest.param("stuck", 5, "blocks.3: the inputs are not finite", marks=pytest.mark.slow),
    ],
)
def test_when_a_rank_fails_the_other_leaves_with_its_name(tmp_path: Path, case: str, code: int, says: str):
    first, second = start_all(tmp_path, case)
    assert second.code == (-signal.SIGKILL if case == "killed" else code), second.err
    assert first.code == code, first.err
    assert "rank 1 (process" in first.err
    assert says in first.err


# ---- what is refused, seen by the first of two


class Pretended(Group):
    """The first of two ranks; the other says `theirs`, by the type of what is asked."""

    theirs: dict[type, object]

    def objects(self, value):
        return [value, self.theirs.get(type(value), value)]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    members = tuple(Member(rank, f"host-{rank}", 10 + rank, None) for rank in range(2))
    group = Pretended(rank=0, world=2, members=members)
    group.theirs = {}
    monkeypatch.setattr(processes, "_ALONE", group)
    return group


def test_ranks_that_compute_in_different_precisions_are_refused(pretended: Pretended):
    assert unspread.require_one_precision(torch.device("cpu")) == []
    pretended.theirs = {tuple: ("bfloat16", "NVIDIA H200")}
    with pytest.raises(
        UsageError, match=r"rank 1 \(process 11 on host-1\) computes in bfloat16 on NVIDIA H200, rank 0"
    ):
        unspread.require_one_precision(torch.device("cpu"))


def test_ranks_that_read_another_model_or_were_asked_otherwise_are_refused(pretended: Pretended, tmp_path: Path):
    source = resolve(str(small_model(tmp_path / "model")))
    request = Request(model=str(tmp_path / "model"), keep=0.5, device="cpu")
    assert same_for_all.require_same(request, source) == []
    seen: list[str] = []

    def other_files(value):
        seen.append(str(value))
        return [value, value if len(seen) != 4 else "0123456789abcdef"]

    pretended.objects = other_files  # type: ignore[method-assign]  requests, versions, sizes; then hashes
    with pytest.raises(UsageError, match=r"rank 1 \(process 11 on host-1\) reads another model than rank 0"):
        same_for_all.require_same(request, source)
    pretended.objects = lambda value: [value, "another"]  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"rank 1 .* has another request than rank 0"):
        same_for_all.require_same(request, source)


@pytest.mark.parametrize(
    ("method", "options", "steps", "bits", "windows", "says"),
    [
        ("gptq", {}, [], None, 8, "method gptq, which treats the model as a whole, is not spread over several"),
        ("svd-llm", {}, [Step("refit", None)], None, 8, "recovery step refit is not spread"),
        ("svd", {}, [], 4, 8, "quantising factors"),
        ("svd", {"allocation": "evopress"}, [], None, 8, "the search of ranks"),
        ("zero-sum", {}, [], None, 8, "with its own order of removal"),
        ("acip", {}, [], None, 8, "the training of method acip"),
        ("svd-llm", {}, [], None, 1, "1 calibration windows"),
        ("soco", {"batch_size": 1}, [], None, 8, "batch_size 1 for 2 processes"),
    ],
)
def test_what_is_not_spread_is_refused_by_name(pretended: Pretended, method, options, steps, bits, windows, says):
    with pytest.raises(UsageError, match=says):
        unspread.refuse_unspread(make_method(method, None, options), steps, bits, windows, windows)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"text": "self", "against": "dense"}, "eval --text self: "),
        ({"tasks": ("tasks.jsonl",), "metrics": ("repetition",)}, "eval --tasks, --metrics: "),
    ],
)
def test_of_an_evaluation_only_that_on_text_is_spread(pretended: Pretended, asked, says):
    with pytest.raises(UsageError, match=says):
        run_eval(EvalRequest(model="nowhere", **asked))


@pytest.mark.parametrize("command", ["report", "push", "recipe", "doctor", "plan", "resume", "export"])
def test_commands_for_one_process_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, capsys, command: str):
    monkeypatch.setattr(sys, "argv", ["spectrim", command, "folder"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as end, cli_ranks.started():
        pytest.fail("the command was run")
    assert end.value.code == 2
    assert ended == [2]
    assert f"spectrim {command} is done by one process, and the launcher has started 2" in capsys.readouterr().err


def test_dead_inputs_of_all_ranks_are_counted(pretended: Pretended):
    own = {"a": Stats(tokens=4, mean_abs=torch.tensor([0.0, 1.0])), "b": Stats(tokens=4, mean_abs=torch.ones(2))}
    pretended.theirs = {dict: {"c": (2, 3)}}
    assert dead_inputs(own)[0].startswith("2 layers have inputs that are 0")
    assert "(first a: 1 of 2)" in dead_inputs(own)[0]


def test_the_environment_of_one_comes_back(monkeypatch: pytest.MonkeyPatch):
    for name in (*processes.VARIABLES, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "2")
    before = dict(os.environ)
    with processes.as_one():
        assert not {*processes.VARIABLES, "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    assert dict(os.environ) == before


def test_the_same_by_one_process_is_not_refused():
    unspread.refuse_unspread(make_method("gptq", None, {}), [Step("kl", 3)], 4, 1, 1)


def test_a_rank_has_a_gpu_of_its_own_or_is_refused(pretended: Pretended, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    pretended.local_rank = 1
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="cuda:0 is one GPU, and this run has 2 processes"):
        own_device(torch.device("cuda", 0))
    pretended.local_rank = 2
    with pytest.raises(ResourceError, match="which has 2 GPUs; start at most so many: torchrun --nproc-per-node 2"):
        own_device(torch.device("cuda"))


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2 but RANK"):
        launched()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'two', which is no count"):
        launched()
