"""Folders of every released format version load for ever, and give the logits that they gave when they were written."""

import json
from pathlib import Path

import pytest
import torch
from make_folders import LOGITS, SIZES, logits_of, token_ids
from safetensors.torch import load_file

import spectrim
from spectrim.integrations.transformers import FORMAT_VERSION
from spectrim.store import verify_manifest

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("format-*"))
FOLDERS = [folder for version in VERSIONS for folder in sorted(version.iterdir()) if folder.is_dir()]
LARGEST_BYTES = 300_000
ALLOWED = 1e-5
"""Relative to the largest logit: sums are ordered differently on other machines."""

pytestmark = [pytest.mark.golden, pytest.mark.fault(70)]
every_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}/{f.name}")


def same(found: torch.Tensor, recorded: torch.Tensor) -> bool:
    return float((found - recorded).abs().max()) <= ALLOWED * float(recorded.abs().max())


def recorded(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder.with_name(f"{folder.name}.{LOGITS}"))


def test_every_format_version_has_its_folders():
    assert [version.name for version in VERSIONS] == [f"format-{n}" for n in range(1, FORMAT_VERSION + 1)]
    assert {folder.name for folder in FOLDERS if folder.parent.name == "format-1"} == {"factor", "pivot", "all-sizes"}


def test_they_are_small():
    size = sum(path.stat().st_size for version in VERSIONS for path in version.rglob("*") if path.is_file())
    assert size < LARGEST_BYTES


@every_folder
def test_the_bytes_are_those_that_were_written(folder):
    verify_manifest(folder)


@every_folder
def test_plain_transformers_gives_the_recorded_logits(folder):
    assert same(logits_of(folder), recorded(folder)["logits"])


@every_folder
def test_spectrim_load_gives_them_too(folder):
    model = spectrim.load(folder, device="cpu")
    with torch.no_grad():
        found = model.float()(input_ids=token_ids(), use_cache=False).logits
    assert same(found, recorded(folder)["logits"])


@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_the_folder_that_holds_all(size):
    for folder in (f for f in FOLDERS if f.name == "all-sizes"):
        assert same(logits_of(folder, size_ratio=size), recorded(folder)[f"{size:g}"])


@every_folder
def test_layers_are_stored_in_low_rank(folder):
    """A folder in which every layer had stayed dense would prove nothing."""
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    codec = {"factor": "factor", "pivot": "pivot", "all-sizes": "nested"}[folder.name]
    assert len(modules) >= 4
    assert {entry["codec"] for entry in modules.values()} == {codec}
    assert any(entry["bias"] for entry in modules.values())
