"""Portable folders: they load by their own code without spectrim, and natively with it."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spectrim
from command_line import call
from spectrim import any_size_job
from spectrim.integrations import portable_model
from spectrim.integrations.export import export_size
from spectrim.integrations.graph_export import write_config
from spectrim.integrations.portable import CODE
from spectrim.models.load import resolve
from spectrim.nn.linears import LINEARS, LowRankLinear, PivotLinear
from spectrim.request import Request
from spectrim.store import verify_manifest
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(2, 12, seed=2)
WITHOUT_SPECTRIM = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "spectrim":
            raise ImportError("spectrim is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

ids = load_file("ids.safetensors")["ids"]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = [m(input_ids=ids, use_cache=False).logits for m in (model, again)]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    save_file({"logits": logits[0], "again": logits[1], "new": new}, folder + ".out.safetensors")
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except RuntimeError as error:
        assert "mismatch" in str(error)
    else:
        raise SystemExit("loaded without its code")
assert not any(name.split(".")[0] == "spectrim" for name in sys.modules)
"""


def without_spectrim(where: Path, *folders: Path, python: str = sys.executable) -> None:
    """Load by the folders' own code, generate, save and load again, where `import spectrim` fails."""
    save_file({"ids": IDS}, where / "ids.safetensors")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(where / "cache"), "PYTHONPATH": ""}
    command = [python, "-c", WITHOUT_SPECTRIM, *map(str, folders)]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compressed(folder: Path, architecture: str = "llama-gqa-bias", **options: Any) -> Path:
    model = tiny(architecture)
    small = spectrim.compress(model, keep=0.5, method="svd", options=options, calibration=token_ids(2))
    return small.save_pretrained(folder)


def portable(folder: Path, out: Path) -> Path:
    answer = call("export", folder, "--to", "portable", "--out", out)
    assert answer.code == 0, answer.err
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> portable folder; the compressed one stands beside it."""
    where, made = tmp_path_factory.mktemp("portable"), {}
    for name, architecture, storage in (
        ("factor", "llama-gqa-bias", "factor"),
        ("pivot", "llama-gqa-bias", "pivot"),
        ("conv1d", "gpt2", "pivot"),
    ):
        compressed(where / f"{name}-small", architecture, storage=storage)
        made[name] = portable(where / f"{name}-small", where / name)
    return made


def small_logits(folder: Path) -> torch.Tensor:
    small = AutoModelForCausalLM.from_pretrained(folder.with_name(f"{folder.name}-small"), dtype=torch.float32).eval()
    return logits_of(small, IDS)


def test_without_spectrim_the_folders_own_code_gives_the_same(folders):
    without_spectrim(folders["pivot"].parent, *folders.values())
    for folder in folders.values():
        found = load_file(f"{folder}.out.safetensors")
        torch.testing.assert_close(found["logits"], small_logits(folder), atol=1e-5, rtol=1e-5)
        assert torch.equal(found["again"], found["logits"])
        assert found["new"].shape == (2, 16)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ["factor", "pivot", "conv1d"])
def test_with_spectrim_its_own_layers_are_used(folders, name, trust, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folders[name], trust_remote_code=trust, dtype=torch.float32).eval()
    assert any(isinstance(m, LowRankLinear | PivotLinear) for m in model.modules())
    assert not any(isinstance(m, portable_model.PortableFactor | portable_model.PortablePivot) for m in model.modules())
    assert torch.equal(logits_of(model, IDS), small_logits(folders[name]))


def test_the_commands_of_spectrim_read_it(folders):
    verify_manifest(folders["pivot"])
    assert torch.equal(
        logits_of(spectrim.load(folders["pivot"], device="cpu").float(), IDS), small_logits(folders["pivot"])
    )
    assert call("inspect", folders["pivot"], "--no-spectrum", "--json").json["layers"][0]["codec"] == "pivot"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("codec", sorted(portable_model.CODECS))
def test_its_layers_compute_what_ours_do(codec, bias):
    """The same tensors under the same names, bit for bit; an odd number of outputs leaves bits over in the mask."""
    torch.manual_seed(0)
    ours = LINEARS[codec](12, 21, 5, bias=bias)
    if isinstance(ours, PivotLinear):
        ours.mask.copy_(torch.tensor([0b00000101, 0b10000010, 0b00010000], dtype=torch.uint8))
        ours.refresh_order()
    theirs = portable_model.CODECS[codec](12, 21, 5, bias)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 4, 12)
    assert torch.equal(theirs(x), ours(x))
    assert theirs.state_dict().keys() == ours.state_dict().keys()


def test_the_code_needs_torch_and_transformers_only(folders):
    tree = ast.parse((folders["pivot"] / CODE).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"typing", "torch", "transformers"}


def test_other_codecs_are_refused_by_name(tmp_path):
    small = spectrim.compress(
        tiny("llama"), keep=0.4, method="rtn", options={"group_size": 16}, calibration=token_ids(2)
    )
    answer = call("export", small.save_pretrained(tmp_path / "small"), "--to", "portable", "--out", tmp_path / "out")
    assert answer.code == 2
    assert "layers stored as packed" in answer.message
    assert "--to dense" in answer.message
    assert not (tmp_path / "out").exists()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_other_exports_of_a_portable_folder_do_not_name_code_that_they_lack(folders, tmp_path):
    """transformers would look for the file, ask for `trust_remote_code`, and fail."""
    assert config_of(folders["pivot"])["auto_map"]["AutoModelForCausalLM"].startswith("modeling_spectrim.")
    answer = call("export", folders["pivot"], "--to", "dense", "--out", tmp_path / "dense")
    assert answer.code == 0, answer.err
    assert "auto_map" not in config_of(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", trust_remote_code=True, dtype=torch.float32)
    torch.testing.assert_close(logits_of(model.eval(), IDS), small_logits(folders["pivot"]), atol=1e-4, rtol=1e-4)
    again = portable(folders["pivot"], tmp_path / "again")
    assert config_of(again) == config_of(folders["pivot"])
    assert (again / CODE).is_file()


def test_one_size_of_a_folder_that_names_our_code_does_not(tmp_path):
    folder = tmp_path / "sizes"
    tiny("llama").save_pretrained(tmp_path / "model")
    asked = Request(
        model=str(tmp_path / "model"), keep=0.8, method="svd", calib="self", calib_windows=2, eval="none", device="cpu",
        any_size=True, anchors=(0.8, 0.5),
    )  # fmt: skip
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        any_size_job.run_any_size(asked, folder)
    config = config_of(folder)
    own = {"AutoModel": "other.Model"}
    code = {"AutoModelForCausalLM": "user/name--modeling_spectrim.SpectrimLlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {**own, **code}}))
    export_size(resolve(str(folder)), tmp_path / "out", size=0.6)
    assert config_of(tmp_path / "out")["auto_map"] == own


def test_rotary_positions_where_transformers_4_looks_for_them(monkeypatch):
    """tests/matrix/run.sh portable loads such folders with transformers 4.57.6 itself."""

    def read(release: str, parameters: Any) -> Any:
        monkeypatch.setattr(portable_model.transformers, "__version__", release)
        config = SimpleNamespace(rope_parameters=parameters)
        portable_model.as_transformers_4_reads_it(config)
        return config

    plain, scaled = (
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    )
    assert vars(read("5.0.0", plain)) == {"rope_parameters": plain}
    assert vars(read("4.57.6", plain)) == {"rope_parameters": plain, "rope_theta": 5e5, "rope_scaling": None}
    found = read("4.57.6", scaled)
    assert (found.rope_theta, found.rope_scaling) == (1e6, {"rope_type": "linear", "factor": 4.0})
    assert vars(read("4.57.6", None)) == {"rope_parameters": None}
    with pytest.raises(ValueError, match="differ between layers"):
        read("4.57.6", {"full_attention": plain, "sliding_attention": scaled})


def test_the_configuration_beside_a_graph_names_no_code(folders, tmp_path):
    own, want = folders["pivot"], config_of(folders["pivot"])
    write_config(own, tmp_path)
    del want["auto_map"]
    assert config_of(tmp_path) == want
    write_config(own.with_name("pivot-small"), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == (own.with_name("pivot-small") / "config.json").read_bytes()


def test_a_dense_folder_is_refused(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    answer = call("export", tmp_path / "dense", "--to", "portable", "--out", tmp_path / "out")
    assert (answer.code, "not a spectrim folder" in answer.message) == (2, True)
