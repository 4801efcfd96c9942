"""Model files that change, shrink or fail while transformers loads them."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load, save_file

from command_line import PLAIN, call, small_model
from spectrim.models.load import load_dense, load_model, resolve
from spectrim.models.plain_reads import LazyTensor
from spectrim.store import tensors as tensors_module
from spectrim.store.reader import open_checkpoint
from spectrim.store.tensors import DTYPES, read_tensor

pytestmark = [pytest.mark.faults, pytest.mark.fault(40)]

CUTS_WHEN_OPEN = """
import contextlib, os, sys
from transformers import modeling_utils
from spectrim.errors import InputError
from spectrim.models import load

folder, plainly = sys.argv[1:]
if plainly == "mapped":
    load.plain_reads = lambda checkpoint: contextlib.nullcontext()
fill = modeling_utils.convert_and_load_state_dict_in_model

def cut(*args, **kwargs):  # all files are open, no tensor has been read
    os.truncate(os.path.join(folder, "model.safetensors"), 40_000)
    print("cut", flush=True)
    return fill(*args, **kwargs)

modeling_utils.convert_and_load_state_dict_in_model = cut
try:
    load.load_dense(load.resolve(folder), load.pick_device("cpu"))
except InputError as error:
    print(error)
"""


def load_and_cut(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Loads a model in a process of its own whose file is cut after it was opened."""
    command = [sys.executable, "-c", CUTS_WHEN_OPEN, str(folder), how]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_shard_that_is_cut_while_it_is_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model", hidden_size=64)
    done = load_and_cut(folder, "plain")
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    cut, _, message = done.stdout.partition("\n")
    assert cut == "cut"
    assert f"{folder / 'model.safetensors'}: tensor " in message
    assert "the file became shorter while it was read; let nothing write to it and run again" in message


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what a cut mapping does is the system's affair")
def test_mapped_it_would_end_the_process(tmp_path: Path) -> None:
    """What plain reads are for; fails when transformers no longer maps, and they can go."""
    done = load_and_cut(small_model(tmp_path / "model", hidden_size=64), "mapped")
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, "cut\n")


def test_a_disk_that_fails_while_a_model_is_read(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    broken = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(tensors_module, "read_fully", side_effect=broken):
        answer = call("compress", folder, "--out", tmp_path / "out", "--method", "svd", *PLAIN)
    assert answer.code == 3
    assert f"{folder / 'model.safetensors'}: cannot be read: Input/output error (errno 5)" in answer.message
    assert not (tmp_path / "out").exists()


def test_every_tensor_is_read_once_and_none_is_mapped() -> None:
    read: list[str] = []
    real = LazyTensor.__getitem__

    def counted(self: LazyTensor, index: object) -> torch.Tensor:
        read.append(self.info.name)
        return real(self, index)

    source = resolve("builtin:tiny")
    with mock.patch.object(LazyTensor, "__getitem__", counted):
        model = load_model(source, torch.device("cpu"))
    assert sorted(read) == sorted(source.checkpoint.tensors)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert not any(str(shard) in maps.read_text() for shard in source.checkpoint.shards)
    state = model.state_dict()
    stored = {name: tensor for shard in source.checkpoint.shards for name, tensor in load(shard.read_bytes()).items()}
    assert all(torch.equal(state[name], stored[name]) for name in stored)


def test_the_values_are_those_of_the_file_in_every_dtype(tmp_path: Path) -> None:
    folder = small_model(tmp_path / "model")
    numbers = torch.arange(-12, 12).view(2, 3, 4)
    given = {name: (numbers > 0 if name == "BOOL" else numbers.to(dtype)) for name, dtype in DTYPES.items()}
    save_file(given | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}, folder / "model.safetensors")
    infos = open_checkpoint(folder).tensors
    for name, tensor in given.items():
        assert infos[name].dtype == name
        found = read_tensor(infos[name])
        assert found.dtype == tensor.dtype
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
        assert torch.equal(read_tensor(infos[name], rows=1).view(torch.uint8), tensor[:1].view(torch.uint8))
    assert read_tensor(infos["scalar"]) == 2.5
    assert read_tensor(infos["empty"]).shape == (0, 3)


def test_shards_are_loaded_as_one_file_is(tmp_path: Path) -> None:
    """The bytes that come out do not depend on how the files are read."""
    folder = small_model(tmp_path / "model")
    model = load_dense(resolve(str(folder)), torch.device("cpu"))
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = load_dense(resolve(str(tmp_path / "shards")), torch.device("cpu")).state_dict()
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
