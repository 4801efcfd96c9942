"""Two processes on one CPU: the result is that of one, and when one fails the other says which and leaves."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import several_worker
from spectrim.processes import Group, spread_by_cost
from tiny_models import logits_of, tiny

TESTS = Path(__file__).resolve().parents[1]
WORKER = TESTS / "several_worker.py"


class Ended(NamedTuple):
    code: int
    err: str


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_all(words: Sequence[str], world: int = 2, timeout_s: float = 100) -> list[Ended]:
    """`python WORDS` in so many processes, as a launcher would start them; how each ended, by rank."""
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *words], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        return [Ended(p.wait(timeout_s), "" if p.stderr is None else p.stderr.read()) for p in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    for ended in start_all([str(WORKER), str(out), "compare"]):
        assert ended.code == 0, ended.err
    return out


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
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
    assert relative(logits_of(one, several_worker.ids()), wanted) < 1e-6


def test_evaluation_shares_the_windows(by_two: Path):
    one = several_worker.quality(several_worker.compressed("svd-llm"))["quality"]
    for rank in range(2):
        assert relative(load_file(by_two / f"quality {rank}.safetensors")["quality"], one) < 1e-6


# ---- the arithmetic of sharing


@pytest.mark.parametrize(("count", "world"), [(0, 3), (1, 2), (7, 3), (9, 2), (5, 8), (64, 8)])
def test_shares_cover_all_once_and_differ_by_one(count: int, world: int):
    shares = [range(count)[Group(rank=rank, world=world).share_of(count)] for rank in range(world)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_work_goes_to_the_least_loaded_the_dearest_first():
    assert spread_by_cost([1, 5, 2, 2, 4], 2) == [1, 0, 1, 0, 1]  # 5 | 4, 2 | 5, 2 | 4, 2, 1
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
        ("fails", 5, "the inputs are not finite in the batch that starts at calibration window"),
        ("stuck", 5, "blocks.3: the inputs are not finite"),
    ],
)
def test_when_a_rank_fails_the_other_leaves_with_its_name(tmp_path: Path, case: str, code: int, says: str):
    first, second = start_all([str(WORKER), str(tmp_path), case])
    assert second.code == (-signal.SIGKILL if case == "killed" else code), second.err
    assert first.code == code, first.err
    assert "rank 1 (process" in first.err
    assert says in first.err
