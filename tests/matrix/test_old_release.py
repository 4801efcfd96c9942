"""transformers 4: a folder is refused with the reason, and the reason is true. Skipped under 5."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import spectrim  # noqa: F401  registers the format
from spectrim.errors import InputError
from spectrim.integrations import transformers as ours

pytestmark = [
    pytest.mark.skipif(not transformers.__version__.startswith("4."), reason="is about transformers 4"),
    pytest.mark.filterwarnings("ignore"),
]
GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"
IDS = (torch.arange(36) * 7 % 64).view(3, 12)


def test_a_folder_is_refused():
    with pytest.raises(InputError, match=r"rope_theta.*wrong logits"):
        AutoModelForCausalLM.from_pretrained(GOLDEN / "pivot")


@pytest.mark.parametrize(("theta", "equal"), [(10_000.0, True), (1e6, False)])
def test_it_would_take_the_default_base_of_rotary_positions(theta, equal, monkeypatch, tmp_path):
    """The golden folder has the default and agrees; with another base the logits do not change, and they should."""
    monkeypatch.setattr(ours, "check_release", lambda release: None)
    folder = Path(shutil.copytree(GOLDEN / "pivot", tmp_path / "copied"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = theta
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=IDS, use_cache=False).logits
    recorded = load_file(GOLDEN.parent / "format-1" / "pivot.logits.safetensors")["logits"]
    assert torch.equal(found, recorded)
    assert (float(model.config.rope_theta) == theta) is equal
