"""Model folders from strangers: what must neither run, nor leave the folder, nor get into a result unseen."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from command_line import PLAIN, call, change_config, hashes, small_model
from spectrim import job
from spectrim.errors import InputError
from spectrim.models.load import pick_device, resolve
from spectrim.store import companions, open_checkpoint
from spectrim.store.companions import check_companions, copy_companions

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", autouse=True)
def _quick_reload() -> Iterator[None]:
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        yield


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "model")


def compress(model: Path | str, out: Path, *options: object):
    return call("compress", model, "--out", out, *PLAIN, "--method", "svd", "--json", *options)


# ---- tensors


@pytest.mark.fault(8)
def test_a_tensor_that_the_model_does_not_have_is_reported(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(
        {**tensors, "model.stowaway\u202e": torch.zeros(3)}, model / "model.safetensors", metadata={"format": "pt"}
    )
    answer = compress(model, tmp_path / "out")
    assert answer.code == 3
    assert "has characters that cannot be printed" in answer.message
    save_file({**tensors, "model.stowaway": torch.zeros(3)}, model / "model.safetensors", metadata={"format": "pt"})
    answer = compress(model, tmp_path / "out")
    assert answer.code == 0, answer.err
    says = "1 tensors in the files belong to no part of the model and are copied into the result as they are: "
    assert f"{says}'model.stowaway'" in answer.json["warnings"]


@pytest.mark.fault(6)
def test_there_are_no_big_endian_numbers_in_safetensors(model: Path) -> None:
    """The dtype is all that a header says of the bytes; one that claims another order is unknown."""
    path = model / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"F32"', b'">F4"'))
    with pytest.raises(InputError, match="unknown dtype '>F4'; supported: BF16, BOOL"):
        open_checkpoint(model)


@pytest.mark.fault(10)
@pytest.mark.parametrize("bit", [0, 22, 30], ids="bit {}".format)
def test_a_flipped_bit_without_a_checksum_is_seen_only_where_it_makes_no_number(bit: int, model: Path) -> None:
    """Documented as not detectable: the flip below turns 1.0 into another number, or (bit 30) into Inf."""
    weight = torch.ones(4).view(torch.int32)
    weight[0] ^= 1 << bit
    assert bool(torch.isfinite(weight.view(torch.float32)).all()) == (bit != 30)


@pytest.mark.fault(12, 13)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.npz", "model.pt", "model.pkl"])
def test_archives_and_pickles_are_not_unpacked(name: str, model: Path, tmp_path: Path) -> None:
    """A zip bomb beside good weights is not even opened; instead of weights it is refused by name."""
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(50_000_000))
    (model / name).write_bytes(bomb.getvalue())
    opened: list[str] = []
    with traced_opens(opened):
        assert compress(model, tmp_path / "out").code == 0
    assert not [path for path in opened if path.endswith(name)]
    (model / "model.safetensors").unlink()
    answer = compress(model, tmp_path / "again")
    assert answer.code == 3
    assert ("never opens them" in answer.message) == (not name.endswith(".npz"))


@pytest.mark.fault(12, 13)
def test_a_pickle_under_the_name_of_safetensors_is_not_tried_in_any_other_way(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with mock.patch.object(torch, "load", side_effect=AssertionError("torch.load was called")):
        answer = compress(model, tmp_path / "out")
    assert answer.code == 3
    assert "a pickle, which can run code and which spectrim never opens" in answer.message


def traced_opens(opened: list[str]):
    """Names of all files that this process opens in the block."""
    real = os.open

    def note(path, *rest, **more):
        opened.append(os.fspath(path) if not isinstance(path, int) else str(path))
        return real(path, *rest, **more)

    return mock.patch.object(os, "open", note)


# ---- companions


@pytest.mark.fault(17, 19)
@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "chat_template.jinja", "merges.txt"])
def test_a_companion_that_links_out_of_the_folder_is_never_copied(name: str, model: Path, tmp_path: Path) -> None:
    """Published with the result it would give away whatever it names."""
    secret = tmp_path / "id_rsa"
    secret.write_text("BEGIN PRIVATE KEY")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    answer = compress(model, tmp_path / "out")
    assert answer.code == 3
    assert f"{name}: is a link to {secret}, outside of the model folder" in answer.message
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(17, 19)
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["fifo", "folder"])
def test_a_companion_that_is_no_file_is_refused_without_waiting_for_it(make: Callable, model: Path) -> None:
    make(model / "LICENSE")
    with pytest.raises(InputError, match=r"LICENSE: is a (named pipe|folder), not a regular file"):
        check_companions(model, ["LICENSE"])


@pytest.mark.fault(17)
def test_companions_are_copied_as_bytes_and_never_rendered(model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}\r\n\0"
    (model / "chat_template.jinja").write_bytes(evil.encode())
    answer = compress(model, tmp_path / "out")
    assert answer.code == 0, answer.err
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == evil.encode()
    assert not canary.exists()


@pytest.mark.fault(17)
def test_a_companion_of_any_size_is_capped_and_one_that_grows_is_noticed(model: Path, tmp_path: Path) -> None:
    with mock.patch.object(companions, "COMPANION_BYTES_MAX", 1000):
        with pytest.raises(InputError, match=r"tokenizer\.json: [\d,]+ bytes, allowed 1,000 for a file that is copied"):
            copy_companions(model, tmp_path, ["tokenizer.json"])
        answer = compress(model, tmp_path / "out")
        assert answer.code == 3
    real = os.fstat

    def too_small(descriptor: int):
        found = real(descriptor)
        return SimpleNamespace(**{n: getattr(found, n) for n in dir(found) if n.startswith("st_")} | {"st_size": 10})

    with (
        mock.patch("spectrim.store.files.os.fstat", too_small),
        pytest.raises(InputError, match="changed while it was copied"),
    ):
        copy_companions(model, tmp_path, ["tokenizer.json"])


# ---- what is not a dense model


@pytest.mark.fault(72)
def test_a_folder_with_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    """transformers with peft would load the model that adapter_config.json names, wherever that is."""
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else"}')
    for arguments in (("plan", model), ("eval", model), ("inspect", model)):
        answer = call(*arguments)
        assert answer.code == 3
        assert "carries an adapter (adapter_config.json), which would take another model's place" in answer.message
    assert compress(model, tmp_path / "out").code == 3


@pytest.mark.fault(56, 72)
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_as_they_are(tied: bool, tmp_path: Path) -> None:
    model = small_model(tmp_path / "tied", tie_word_embeddings=tied)
    assert compress(model, tmp_path / "out").code == 0
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert ("lm_head.weight" in names) == (not tied)


@pytest.mark.fault(15)
def test_a_config_that_names_no_type_is_refused(model: Path) -> None:
    change_config(model, model_type=None)
    assert "model_type must be the name of an architecture" in call("inspect", model).message


# ---- a damaged cache


def cached(root: Path) -> tuple[Path, Path]:
    """A model as huggingface_hub keeps it: a snapshot of links into blobs. The snapshot, and the weights' blob."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / ("a1b2c3" * 7)[:40], root / "models--o--n" / "blobs"
    small_model(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / f"hash-{path.name}")
        path.symlink_to(f"../../blobs/hash-{path.name}")
    return snapshot, blobs / "hash-model.safetensors"


@pytest.mark.fault(65)
@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids="{} bytes".format)
def test_a_blob_of_the_cache_that_was_cut_is_not_trusted(keep: int, tmp_path: Path) -> None:
    snapshot, blob = cached(tmp_path)
    os.truncate(blob, keep if keep >= 0 else blob.stat().st_size - 1)
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(snapshot)):
        answer = compress("o/n", tmp_path / "out")
    assert answer.code == 3
    assert "truncated: expected" in answer.message


@pytest.mark.fault(66)
def test_all_files_come_from_one_commit_which_is_recorded(tmp_path: Path) -> None:
    snapshot, _ = cached(tmp_path)
    before = hashes(snapshot)
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(snapshot)) as download:
        answer = compress("o/n", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert download.call_count == 1, "asked twice, the second answer could be another commit"
    assert answer.json["source"]["revision"] == snapshot.name
    assert hashes(snapshot) == before


# ---- the hub


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("connection reset by peer"),
        TimeoutError("The read operation timed out"),
        OSError(
            "401 Client Error. Cannot access gated repo for url https://huggingface.co/o/n. Bearer hf_abcdefghijklmnop"
        ),
        OSError("403 Client Error: Forbidden, token hf_abcdefghijklmnop is expired"),
        OSError("404 Client Error. Repository Not Found"),
        OSError("429 Client Error: Too Many Requests"),
        OSError("503 Server Error: Service Temporarily Unavailable"),
        ValueError("LocalEntryNotFoundError: offline mode is enabled (HF_HUB_OFFLINE=1)"),
    ],
    ids=lambda error: str(error)[:12],
)
def test_whatever_the_hub_says_is_one_message_without_the_token(error: Exception, tmp_path: Path) -> None:
    with mock.patch("huggingface_hub.snapshot_download", side_effect=error):
        answer = compress("o/n", tmp_path / "out")
    assert answer.code == 3
    assert "o/n: no such folder here, and the hub gave" in answer.message
    assert "Check the id, the network and your token, or pass a local folder" in answer.message
    assert "hf_abc" not in answer.err + answer.out
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(64)
def test_the_token_gets_into_no_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    assert compress(model, tmp_path / "out").code == 0
    for path in (tmp_path / "out").iterdir():
        assert b"hf_abcdefghijklmnop" not in path.read_bytes()


# ---- devices


@pytest.mark.fault(62)
def test_without_a_gpu_everything_runs_on_the_cpu() -> None:
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        assert pick_device("auto").type == "cpu"
    assert resolve("builtin:tiny").revision is None
