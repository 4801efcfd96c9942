"""A budget in bytes for the whole model: the keep that it leaves, tensors that stay within it, what is refused."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import spectrim
from command_line import call, small_model, small_text
from spectrim.byte_budget import settled
from spectrim.errors import UsageError
from spectrim.job import run
from spectrim.models.load import resolve
from spectrim.options import parse_bytes
from spectrim.request import Request
from spectrim.store import open_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return small_model(tmp_path_factory.mktemp("bytes") / "model")


def request(folder: Path, **changes: Any) -> Request:
    fields = {"keep": 1.0, "method": "trellis", "dtype": "bfloat16", "options": {"window": 8}, "eval": "none"}
    return Request(model=str(folder), **{**fields, **changes})


def sizes(folder: Path) -> tuple[int, int]:
    """Bytes in 16 bits of all tensors, and of all but the decoder's linear layers."""
    asked = settled(request(folder, keep_bytes=0.999), request(folder).check(), resolve(str(folder)))
    dense = 2 * resolve(str(folder)).checkpoint.numel
    # keep = (asked - stay) / (dense - stay), solved for stay
    total = int(0.999 * dense + 1e-6)
    return dense, round((total - asked.keep * dense) / (1 - asked.keep))


@pytest.mark.parametrize(
    ("text", "value"),
    [("4GB", 4 * 10**9), ("3.5GiB", 7 * 2**29), (" 12 kb ", 12_000), ("120_000_000", 120_000_000), ("2mib", 2**21)],
)
def test_sizes_are_read_as_people_write_them(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-3GB", "4 G B", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="expected a number of bytes such as 4GB"):
        parse_bytes(text)


@pytest.mark.parametrize("share", [0.7])
def test_the_written_tensors_are_within_the_budget_and_use_it(folder, tmp_path, share):
    dense, stay = sizes(folder)
    asked = int(stay + share * (dense - stay))
    text = small_text(tmp_path / "text.txt")
    made = run(request(folder, model_bytes=asked, calib=str(text), calib_windows=4, calib_length=16), tmp_path / "out")
    written = open_checkpoint(tmp_path / "out").nbytes
    assert 0.99 * asked < written <= asked
    assert made.report["request"]["keep"] == pytest.approx(share, abs=1e-3)


def test_a_share_of_the_bytes_is_the_same_budget(folder):
    dense, _ = sizes(folder)
    method, source = request(folder).check(), resolve(str(folder))
    by_share = settled(request(folder, keep_bytes=0.98), method, source)
    by_bytes = settled(request(folder, model_bytes=int(0.98 * dense)), method, source)
    assert by_share.keep == by_bytes.keep
    assert settled(request(folder, keep=0.3), method, source).keep == 0.3


def test_too_little_is_told_with_what_stays_and_the_smallest(folder, tmp_path):
    answer = call("compress", folder, "--out", tmp_path / "out", "--bytes", "2kB", "--dtype", "bfloat16")
    assert answer.code == 2
    assert "embeddings and all else that stays take" in answer.message
    smallest = int(answer.message.split("smallest reachable is ")[1].split(" bytes")[0].replace(",", ""))
    settled(request(folder, model_bytes=smallest), request(folder).check(), resolve(str(folder)))
    with pytest.raises(UsageError):
        settled(request(folder, model_bytes=smallest - 1), request(folder).check(), resolve(str(folder)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bytes", "1MB", "--keep", "0.5"], "exclude each other"),
        (["--bytes", "1MB", "--keep-bytes", "0.5"], "two budgets for one thing"),
        (["--bytes", "0"], "bytes must be at least 1"),
        (["--keep-bytes", "1.5"], r"keep_bytes must be in (0, 1]"),
        (["--keep-bytes", "0.5", "--any-size"], "leave any_size out"),
        (["--keep-bytes", "0.5", "--method", "svd"], "held to a share of numbers"),
        (["--keep-bytes", "0.5", "--dtype", "float32"], "pass --dtype bfloat16"),
    ],
)
def test_what_cannot_be_meant_is_refused(folder, tmp_path, words, said):
    answer = call("compress", folder, "--out", tmp_path / "out", *words)
    assert answer.code == 2
    assert said in answer.message
    assert not (tmp_path / "out").exists()


def test_in_python_one_budget_is_asked_for(folder):
    with pytest.raises(UsageError, match="pass one budget"):
        spectrim.compress(str(folder))
    with pytest.raises(UsageError, match="pass one budget"):
        spectrim.compress(str(folder), keep=0.5, keep_bytes=0.5)


@pytest.mark.parametrize(
    ("words", "method"), [([], "soco"), (["--keep", "0.5"], "soco"), (["--keep-bytes", "0.98"], "trellis")]
)
def test_the_method_follows_the_kind_of_budget(folder, tmp_path, words, method):
    with mock.patch("spectrim.several_job.run", side_effect=UsageError("stop here")) as asked:
        assert call("compress", folder, "--out", tmp_path / "out", *words).code == 2
    assert asked.call_args.args[0].method == method


def test_in_python_the_budget_is_kept_too(folder):
    dense, _ = sizes(folder)
    made = spectrim.compress(
        str(folder),
        keep_bytes=0.98,
        dtype="bfloat16",
        options={"window": 8},
        eval="none",
        calib_windows=2,
        calib_length=16,
    )
    assert made.report["request"]["keep"] < 1
    held = {tensor.data_ptr(): tensor.nbytes for tensor in made.model.state_dict().values()}  # tied ones once
    assert sum(held.values()) <= 0.98 * dense
