"""Hostile files for every reader. The long run is benchmarks/fuzz_readers.py; this is the same with few cases."""

import time
from pathlib import Path
from random import Random

import pytest
from hostile import CONFIGS, HEADERS, INDEXES, Readers, as_json, corpus_files, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as safetensors_deserialize

from spectrim.errors import InputError
from spectrim.store import open_checkpoint, read_header, read_json

pytestmark = [pytest.mark.faults, pytest.mark.fault(1, 2, 3, 4, 5, 6, 7, 9, 11, 18)]

KINDS = ("header", "index", "config", "json", "manifest", "state", "fingerprint", "ladder", "task", "text")


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    return Readers(tmp_path_factory.mktemp("fuzz"))


def test_the_corpus_is_large_enough() -> None:
    assert len(list(corpus_files())) >= 60
    assert len(HEADERS) - 1 >= 26, "bad headers made by hand"


@pytest.mark.parametrize("name", HEADERS)
def test_hand_made_headers(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HEADERS[name])
    began = time.process_time()
    if name in ("good", "path as a name"):
        read_header(path)
        safetensors_deserialize(HEADERS[name])
    else:
        with pytest.raises(InputError, match=r"model\.safetensors"):
            read_header(path)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", INDEXES)
def test_hand_made_indexes(name: str, readers: Readers) -> None:
    (readers.model / "model.safetensors.index.json").write_bytes(as_json(INDEXES[name]))
    if name == "good":
        open_checkpoint(readers.model)
        return
    with pytest.raises(InputError):
        open_checkpoint(readers.model)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(random=st.randoms(use_true_random=False))
def test_only_our_errors_come_out(kind: str, random: Random, readers: Readers) -> None:
    assert set(readers.kinds()) == set(KINDS)
    run_case(readers.kinds()[kind], random)


@pytest.mark.parametrize("seed", range(4))
def test_what_is_accepted_the_library_accepts_too(seed: int, readers: Readers) -> None:
    random, accepted = Random(seed), 0
    path = readers.folder / "h.safetensors"
    for _ in range(250):
        if run_case(readers.header, random) == "accepted":
            accepted += 1
            try:
                theirs = dict(safetensors_deserialize(path.read_bytes()))
            except SafetensorError as error:
                raise AssertionError(f"accepted what safetensors refuses: {error}") from error
            assert {n: i.shape for n, i in read_header(path).items()} == {
                n: tuple(v["shape"]) for n, v in theirs.items()
            }
    assert accepted, "the cases are all too wild to test anything but the first check"


def test_good_files_are_accepted(readers: Readers, tmp_path: Path) -> None:
    for tree in (CONFIGS["good"], CONFIGS["all sizes"]):
        (tmp_path / "c.json").write_bytes(as_json(tree))
        assert read_json(tmp_path / "c.json") == tree


@pytest.mark.slow
@pytest.mark.parametrize("target", ["header", "json"])
def test_atheris_finds_nothing_in_a_minute(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed (pip install atheris)")
    import subprocess
    import sys

    script = Path(__file__).resolve().parents[2] / "benchmarks" / "fuzz_atheris.py"
    command = [sys.executable, str(script), target, "-max_total_time=60", f"-artifact_prefix={tmp_path}/"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
