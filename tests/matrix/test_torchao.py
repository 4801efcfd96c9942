"""torchao on a compressed model: it finds the factors, and what it makes of them is not written as our format.

Skipped where torchao (extra `torchao`) is not installed; `make matrix` installs it.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import spectrim
from tiny_models import logits_of, tiny, token_ids

torchao: Any = pytest.importorskip("torchao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = token_ids(4, 12, seed=2)


@pytest.mark.parametrize("storage", ["factor", "pivot"])
def test_int8_weight_only_quantises_every_factor(storage, tmp_path):
    small = spectrim.compress(
        tiny("llama-gqa-bias"), keep=0.5, method="svd", options={"storage": storage}, calibration=token_ids(2)
    )
    folder = small.save_pretrained(tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = logits_of(model, IDS)
    layers = set(model.config.quantization_config.modules)
    torchao.quantize_(
        model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: type(m) is nn.Linear and name != "lm_head"
    )
    plain = [n for n, m in model.named_modules() if type(m) is nn.Linear and type(m.weight) is nn.Parameter]
    changed = {n.rpartition(".")[0] for n, m in model.named_modules() if type(m) is nn.Linear and n not in plain}
    assert changed == layers
    after = logits_of(model, IDS)
    error = float((after - before).norm() / before.norm())
    print(f"{storage}: relative error of the logits {error:.2e}")
    assert 0 < error < 0.05
