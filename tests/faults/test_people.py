"""What people do by mistake, and what a long run must not do: mistakes told together, poor text, memory that leaks."""

import gc
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from command_line import PLAIN, call, small_model, small_text
from spectrim import job
from spectrim.data import files as text_files_module
from spectrim.data.files import read_file
from spectrim.data.repeats import RUN_TOKENS, overlap, text_warnings, variety
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.errors import InputError, UsageError
from spectrim.models.walk import find_layers
from spectrim.registry import make_method
from spectrim.request import Request
from spectrim.stats import Stat
from tiny_models import tiny, token_ids

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


# ---- options


@pytest.mark.fault(68)
def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    wrong = (
        "--keep",
        "20",
        "--method",
        "sov",
        "--calib-windows",
        "0",
        "--quality-gate",
        "0.5",
        "--allow-nonfinite",
        "no",
    )
    answer = call("compress", "builtin:tiny", "--out", tmp_path / "out", *wrong)
    assert answer.code == 2
    for says in (
        "5 things are wrong",
        "keep must be in (0, 1], got 20: the share of stored numbers that remains; did you mean 0.2?",
        "unknown method 'sov'; did you mean 'svd'?",
        "calib_windows must be at least 1, got 0",
        "quality_gate must be 0 (off)",
        "allow_nonfinite: 'no' is not supported",
    ):
        assert says in answer.message


@pytest.mark.fault(68)
def test_one_mistake_is_told_without_a_list() -> None:
    with pytest.raises(UsageError, match=r"^keep must be in \(0, 1\], got 2"):
        Request(model="x", keep=2).check()


# ---- text


@pytest.mark.fault(69)
def test_text_that_repeats_itself_is_warned_about(tmp_path: Path) -> None:
    model = small_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The same line again and again.\n" * 2000)
    answer = call(
        "compress", model, "--out", tmp_path / "out", *PLAIN, "--method", "svd-llm", "--calib", text, "--json"
    )
    assert answer.code == 0, answer.err
    assert any("the calibration text repeats itself: " in line for line in answer.json["warnings"])
    assert answer.json["text"]["calibration"]["sha256"]


@pytest.mark.fault(69)
def test_a_calibration_text_that_holds_the_evaluation_text_is_warned_about(tmp_path: Path) -> None:
    model, evaluation = small_model(tmp_path / "model"), small_text(tmp_path / "evaluation.txt")
    calibration = tmp_path / "calibration.txt"
    calibration.write_text(evaluation.read_text())
    options = ("--calib", calibration, "--eval", evaluation, "--calib-windows", "64", "--calib-length", "64")
    answer = call("compress", model, "--out", tmp_path / "out", "--method", "svd", *options, "--json")
    assert answer.code == 0, answer.err
    assert any("of the evaluation text's runs of 16 tokens occur in the text" in w for w in answer.json["warnings"])


@pytest.mark.fault(69)
def test_shares_of_runs_by_hand() -> None:
    ids = torch.arange(40)[None]
    assert variety(ids) == 1.0
    assert variety(torch.zeros(2, 40, dtype=torch.int64)) == 1 / (2 * (40 - RUN_TOKENS + 1))
    assert overlap(ids, ids + 1000) == 0.0
    assert overlap(ids, ids) == 1.0
    half = torch.cat([torch.arange(20), torch.arange(500, 520)])[None]
    assert overlap(half, ids) == (20 - RUN_TOKENS + 1) / (40 - RUN_TOKENS + 1)
    short = torch.arange(RUN_TOKENS - 1)[None]
    assert (variety(short), overlap(short, ids)) == (1.0, 0.0)
    assert text_warnings(ids, ids + 1000) == []
    assert len(text_warnings(torch.zeros(8, 40, dtype=torch.int64), ids, training=ids)) == 2


@pytest.mark.fault(69)
def test_a_file_that_is_one_endless_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl.xz"
    with lzma.open(path, "wt") as file, mock.patch.object(text_files_module, "LINE_CHARS_MAX", 1000):
        file.write(json.dumps({"text": "x" * 5000}))
        file.close()
        with pytest.raises(InputError, match="line 1: more than 1,000 characters in one line; one document a line"):
            read_file(path, max_chars=None)


@pytest.mark.fault(47)
def test_no_tokens_at_all_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="no calibration token reached this layer"):
        measure(model, find_layers(model), torch.empty(0, 16, dtype=torch.int64), frozenset({Stat.GRAM}))


# ---- memory over a long run


def bytes_of_tensors() -> int:
    """Bytes of all storages that living tensors of this process hold."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # Parameters of lazy or fake kinds, left behind by other tests, have no storage.
        if (
            type(thing) in (torch.Tensor, torch.nn.Parameter)
            and thing.device.type == "cpu"
            and thing.layout == torch.strided
        ):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.fault(63)
def test_memory_is_flat_over_the_batches_of_a_pass() -> None:
    model = tiny("llama", num_hidden_layers=8)
    seen: list[int] = []
    needs = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    measure(model, find_layers(model), token_ids(40), needs, progress=lambda *_: seen.append(bytes_of_tensors()))
    assert len(seen) == 10
    assert max(seen[1:]) <= 1.01 * min(seen[1:])


@pytest.mark.fault(63)
@pytest.mark.parametrize("name", ["svd-llm", "soco"])
def test_a_run_leaves_nothing_behind(name: str) -> None:
    model, ids = tiny("llama", num_hidden_layers=4), token_ids(8)
    method = make_method(name, options={"steps": 1} if name == "soco" else {})
    left = []
    for _ in range(3):
        compress_model(model, method, 0.6, ids)
        left.append(bytes_of_tensors())
    assert left[2] <= 1.01 * left[1]


@pytest.mark.fault(63)
def test_memory_by_block_does_not_grow_with_the_number_of_blocks() -> None:
    """What is alive at the end of propagation, less model, result and hidden states, counted by block."""
    peak = {}
    for blocks in (4, 8):
        model, ids = tiny("llama", num_hidden_layers=blocks), token_ids(8)
        base = bytes_of_tensors()
        seen: list[int] = [0]

        def note(stage: str, done: int, total: int, *, seen: list[int] = seen) -> None:
            if stage == "propagate" and done == total:
                seen.append(bytes_of_tensors())

        compress_model(model, make_method("two-sided"), 0.6, ids, progress=note)
        peak[blocks] = (max(seen) - base) / blocks
    assert peak[8] <= 1.01 * peak[4]
