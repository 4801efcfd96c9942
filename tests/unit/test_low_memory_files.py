"""What `--low-memory` does about files and memory: pieces read by several threads, files written behind, the limit."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated_card
from spectrim import memory
from spectrim.engines.spill import FileShelf, States
from spectrim.errors import ResourceError
from spectrim.linalg.fallback import listening
from spectrim.memory import Batch, OutOfMemory, held_dtype, memory_capped
from spectrim.store import pieces
from spectrim.store.pieces import MOVED, Pieces
from spectrim.store.scratch import Scratch

CPU = torch.device("cpu")


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    made = Scratch(tmp_path, CPU, threads=True)
    yield made
    made.close()


@pytest.mark.parametrize("nbytes", [1, 31, 32, 33, 64, 1000])
def test_a_tensor_is_read_in_parts_as_it_was_written(
    nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 128)
    monkeypatch.setattr(pieces, "PART_BYTES", 32)
    wanted, own = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8), Pieces(CPU)
    before = MOVED.read, MOVED.written
    with open(tmp_path / "f", "wb") as file:
        file.write(b"head")
        own.write(file, wanted)
    with open(tmp_path / "f", "rb") as file:
        file.seek(4)
        found = own.read(file, (nbytes,), torch.uint8)
        assert found is not None
        assert torch.equal(found, wanted)
        file.seek(5)
        assert own.read(file, (nbytes,), torch.uint8) is None
    assert (MOVED.read - before[0], MOVED.written - before[1]) == (nbytes, nbytes)


class Held:
    """A writer that stands still until it is let go."""

    def __init__(self, scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        own = scratch.pieces.write

        def write(file: Any, tensor: Tensor) -> None:
            self.begun.set()
            assert self.go.wait(10)
            own(file, tensor)

        monkeypatch.setattr(scratch.pieces, "write", write)


def test_what_is_written_behind_is_there_when_it_is_read(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(scratch, monkeypatch)
    stored = scratch.put(torch.full((5,), 1.0))
    assert held.begun.wait(10)  # `put` is back while the file is still empty
    ahead = stored.ahead()
    assert ahead is not None
    assert not ahead.done()
    held.go.set()
    assert torch.equal(ahead.result(), torch.full((5,), 1.0))
    stored.write(torch.full((5,), 2.0))
    stored.write(torch.full((3,), 3.0))
    assert torch.equal(stored.read(), torch.full((3,), 3.0))


def test_a_file_that_is_let_go_while_it_is_written_goes_afterwards(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(scratch, monkeypatch)
    stored = scratch.put(torch.ones(5))
    assert held.begun.wait(10)
    del stored
    held.go.set()
    scratch.close()
    assert not list(scratch.folder.iterdir())
    assert scratch.nbytes == 0


def test_no_more_than_a_few_tensors_wait_to_be_written(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.store.scratch.ON_THE_WAY", 100)
    held = Held(scratch, monkeypatch)
    kept = [scratch.put(torch.ones(20))]
    threading.Timer(0.1, held.go.set).start()
    kept.append(scratch.put(torch.ones(20)))  # 160 bytes are too many: this waits for the first
    assert torch.equal(kept[0].read(), torch.ones(20))
    assert held.go.is_set()


def test_a_disk_that_fails_behind_is_told_when_the_tensor_is_asked_for(
    scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scratch.pieces, "write", full)
    stored = scratch.put(torch.ones(3))
    with pytest.raises(ResourceError, match="No space left on device"):
        stored.read()


def test_what_was_fetched_ahead_is_not_what_was_put_there_since(scratch: Scratch) -> None:
    shelf = FileShelf(CPU, scratch)
    first, second = torch.ones(4), torch.full((4,), 2.0)
    shelf.put("a", first)
    first.zero_()  # the caller's own again
    shelf.ahead("a")
    assert torch.equal(shelf.fetch("a"), torch.ones(4))
    shelf.ahead("a")
    shelf.put("a", second)
    assert torch.equal(shelf.fetch("a"), second)
    shelf.drop("a")
    shelf.ahead("a")
    assert "a" not in shelf.files


def test_states_go_to_files_behind(scratch: Scratch) -> None:
    tensors = [torch.randn(4, 3) for _ in range(6)]
    states = States(scratch, lambda _: False, tensors)
    states[2] = tensors[0]
    assert all(torch.equal(states[i], tensors[i if i != 2 else 0]) for i in range(6))


# ---------- the limit


def test_a_card_that_is_used_in_part_counts_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 140 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    gpu, two_billion = torch.device("cuda"), 2 * 10**9
    assert held_dtype(gpu, torch.bfloat16, two_billion) == torch.float32
    with memory_capped(23 * 10**9):
        assert memory.total_memory(gpu) == 23 * 10**9
        assert held_dtype(gpu, torch.bfloat16, two_billion) == torch.bfloat16
        assert not memory.has_room(gpu, 8 * 10**9)
    assert memory.has_room(gpu, 8 * 10**9)


def test_states_give_way_before_batches_shrink() -> None:
    left = ["states in files"]
    batch = Batch(2, give_way=lambda: left.pop() if left else None)
    tried: list[int] = []

    def work(size: int) -> str:
        tried.append(size)
        if len(tried) < 3:
            raise MemoryError
        return "done"

    with listening() as fallbacks:
        assert batch.run("propagate", work) == "done"
    assert tried == [2, 2, 1]
    assert [fallback.way for fallback in fallbacks] == ["states in files", "batches of 1"]

    def never(_size: int) -> None:
        raise MemoryError

    left.append("states in files")
    with pytest.raises(OutOfMemory, match="with one window at a time"):
        batch.run("propagate", never)
    assert not left


def test_every_stage_of_a_7b_run_fits_the_limit(tmp_path: Path) -> None:
    """All sizes over 32, two blocks; `python tests/simulated_card.py` runs all 32."""
    card = simulated_card.Card(simulated_card.LIMIT)
    stages, run = simulated_card.run_on(card, simulated_card.write_model(tmp_path / "m", 2), tmp_path)
    assert not card.failures
    assert run.batch.size == simulated_card.BATCH
    assert {stage.name for stage in stages} >= {"calibrate", "decompose", "place", "propagate", "newton", "evaluate"}
    assert max(stage.peak for stage in stages) > 0.4 * card.limit  # else the card measures nothing


def test_a_card_that_is_too_small_is_told(tmp_path: Path) -> None:
    card = simulated_card.Card(simulated_card.LIMIT // 16)
    kept: list[Tensor] = []
    with pytest.raises(torch.OutOfMemoryError), card:
        kept.extend(torch.ones(1000) for _ in range(simulated_card.LIMIT // 4000))
    assert card.peak > card.limit
    kept.clear()
    assert card.failures == 1
    assert card.live <= 4000
