"""Tensors in a model's files that the model has no place for: copied byte for byte, reported, never half."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import AutoModelForCausalLM

import spectrim
from command_line import PLAIN, call, small_model
from spectrim.errors import InputError
from spectrim.store import TensorInfo, open_checkpoint
from spectrim.store.extra import add_shard, copy_tensors
from spectrim.store.header import read_header

pytestmark = [pytest.mark.faults, pytest.mark.fault(8)]

EXTRA = {
    "vision.tower.weight": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn),
    "steps": torch.tensor(7),
    "nothing": torch.zeros(0, 4),
}
INSIDE = "model.layers.1.mlp.up_proj.weight_scale"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the shards of a folder hold."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load(path.read_bytes()).items()}


def with_extra(folder: Path, extra: dict[str, torch.Tensor] = EXTRA) -> Path:
    small_model(folder)
    save_file({**tensors_in(folder), **extra}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def assert_carries(folder: Path, extra: dict[str, torch.Tensor] = EXTRA) -> None:
    found, named = tensors_in(folder), open_checkpoint(folder).tensors
    assert found.keys() == named.keys()
    for name, tensor in extra.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.filterwarnings("ignore")  # transformers logs what it does not know
def test_they_are_copied_reported_and_in_nobodys_way(tmp_path: Path) -> None:
    folder, out, dense = with_extra(tmp_path / "model"), tmp_path / "out", tmp_path / "dense"
    answer = call("compress", folder, "--out", out, "--method", "svd", *PLAIN, "--json")
    assert answer.code == 0, answer.err
    assert (
        "3 tensors in the files belong to no part of the model and are copied into the result as they are: "
        "'nothing', 'steps', 'vision.tower.weight'"
    ) in answer.json["warnings"]
    assert_carries(out)
    assert answer.json["stored"]["model_numbers"] == open_checkpoint(out).numel
    assert call("verify", out).code == 0
    ids = torch.arange(8)[None]
    one = AutoModelForCausalLM.from_pretrained(out)(input_ids=ids).logits
    assert torch.equal(one, spectrim.load(out)(input_ids=ids).logits)
    assert call("export", out, "--to", "dense", "--out", dense).code == 0
    assert_carries(dense)


def test_a_folder_of_all_sizes_and_one_size_of_it_carry_them(tmp_path: Path) -> None:
    folder, out, one = with_extra(tmp_path / "model"), tmp_path / "out", tmp_path / "one"
    words = ("--any-size", "--anchors", "0.8", "--keep", "0.8", "--method", "svd-llm", "--calib", "self")
    answer = call("compress", folder, "--out", out, *words, *PLAIN, "--json")
    assert answer.code == 0, answer.err
    assert_carries(out)
    assert call("verify", out).code == 0
    assert call("export", out, "--keep", "0.9", "--out", one).code == 0
    assert_carries(one)


def test_what_lies_inside_a_replaced_layer_is_left_out_and_said(tmp_path: Path) -> None:
    folder = with_extra(tmp_path / "model", {**EXTRA, INSIDE: torch.ones(1)})
    answer = call("compress", folder, "--out", tmp_path / "out", "--method", "svd", *PLAIN, "--json")
    assert answer.code == 0, answer.err
    says = "1 tensors in the files belong to layers that are compressed and are not in the result: "
    assert f"{says}'{INSIDE}'" in answer.json["warnings"]
    assert INSIDE not in open_checkpoint(tmp_path / "out").tensors
    assert_carries(tmp_path / "out")


def test_a_model_in_memory_carries_them_unless_the_source_has_changed(tmp_path: Path) -> None:
    folder = with_extra(tmp_path / "model")
    small = spectrim.compress(str(folder), keep=0.8, method="svd", calib="self", calib_windows=2, eval="none")
    assert_carries(small.save_pretrained(tmp_path / "out"))
    save_file(tensors_in(folder), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="changed while the model was being read"):
        small.save_pretrained(tmp_path / "later")
    assert not (tmp_path / "later").exists()


def test_shards_are_numbered_anew(tmp_path: Path) -> None:
    source, target = with_extra(tmp_path / "model"), tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(small_model(tmp_path / "plain", vocab_size=8192)).save_pretrained(
        target, max_shard_size="500KB"
    )
    before, count = tensors_in(target), len(list(target.glob("*.safetensors")))
    assert count > 1
    infos = open_checkpoint(source).tensors
    add_shard(target, {name: infos[name] for name in EXTRA})
    names = [f"model-{k:05d}-of-{count + 1:05d}.safetensors" for k in range(1, count + 2)]
    assert sorted(path.name for path in target.glob("*.safetensors")) == names
    assert_carries(target)
    assert all(torch.equal(tensors_in(target)[name], tensor) for name, tensor in before.items())


def test_a_source_that_is_cut_while_it_is_copied_is_an_error(tmp_path: Path) -> None:
    source = with_extra(tmp_path / "model") / "model.safetensors"
    infos: dict[str, TensorInfo] = read_header(source)
    os.truncate(source, source.stat().st_size - 1)
    last = max(infos.values(), key=lambda info: info.start + info.nbytes)
    with pytest.raises(InputError, match="the file became shorter"):
        copy_tensors(tmp_path / "copy.safetensors", {last.name: last})
