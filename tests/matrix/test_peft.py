"""LoRA by PEFT on a compressed model: train, save, load, merge into the factors, save the result as a folder.

Skipped where PEFT (extra `peft`) is not installed; `make matrix` installs it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim
from spectrim.nn.linears import LowRankLinear, PivotLinear
from tiny_models import logits_of, tiny, token_ids

peft: Any = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = token_ids(4, 12, seed=2)


@pytest.fixture(scope="module", params=["factor", "pivot"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = spectrim.compress(
        tiny("llama-gqa-bias"), keep=0.5, method="svd", options={"storage": request.param}, calibration=token_ids(2)
    )
    return small.save_pretrained(tmp_path_factory.mktemp("peft") / request.param)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_lora(folder: Path) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(load(folder), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def trained(folder: Path) -> Any:
    """Ten steps on the adapters; everything else is frozen."""
    model = with_lora(folder).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(10):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_all_linear_finds_every_factor_and_nothing_else(folder):
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in with_lora(folder).named_modules()
        if isinstance(module, peft.tuners.lora.layer.LoraLayer)
    }
    wanted = {
        f"{name}.{child}"
        for name, module in load(folder).named_modules()
        if isinstance(module, LowRankLinear | PivotLinear)
        for child in (("U", "V") if isinstance(module, LowRankLinear) else ("pivot", "rest"))
    }
    assert adapted == wanted


def test_train_save_load_merge(folder, tmp_path):
    model, before = trained(folder), load(folder)
    with torch.no_grad():
        assert model(input_ids=IDS, labels=IDS).loss < before(input_ids=IDS, labels=IDS).loss
    adapted = logits_of(model, IDS)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(logits_of(again, IDS), adapted)
    # Into the factors themselves: no new tensor, so that the result is an ordinary compressed folder.
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, IDS), adapted, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = load(tmp_path / "merged")
    assert torch.equal(logits_of(loaded, IDS), logits_of(merged, IDS))
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in before.named_parameters()
    }


def test_the_layers_of_the_dense_model_are_refused_as_targets(folder):
    """PEFT's message; docs/troubleshooting.md says what to write instead."""
    with pytest.raises(ValueError, match=r"Target module (LowRank|Pivot)Linear"):
        peft.get_peft_model(load(folder), peft.LoraConfig(r=4, target_modules=["q_proj"]))
