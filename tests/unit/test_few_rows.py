"""Decoding faster: which layers are computed together, where it is refused, what `eval` says of a slower model."""

import pytest
import torch

from spectrim.errors import UsageError
from spectrim.evaluate.speed import speed_note
from spectrim.integrations import few_rows
from spectrim.integrations.few_rows import groups_of, speed_up
from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.models.walk import find_layers
from tiny_models import tiny


def small_llama():
    model = tiny("llama")
    names = [layer.name for layer in find_layers(model).layers if "k_proj" not in layer.name]
    install_modules(model, SpectrimConfig(modules={n: {"codec": "factor", "rank": 4, "bias": False} for n in names}))
    return model


def test_stored_layers_are_grouped_by_the_input_they_read():
    model = small_llama()
    names = {module: name for name, module in model.named_modules()}
    found = [[names[layer].rpartition(".")[2] for layer in group] for group in groups_of(model)]
    assert found == [["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def test_a_dense_model_has_no_groups():
    assert groups_of(tiny("llama")) == []


def test_no_kernels_without_cuda(monkeypatch):
    with pytest.raises(UsageError, match="Triton and a CUDA device"):
        speed_up(small_llama())
    monkeypatch.setattr(few_rows, "missing", lambda: "triton is not installed")
    with pytest.raises(UsageError, match="triton is not installed"):
        speed_up(small_llama())


def test_no_kernels_for_many_rows(monkeypatch):
    monkeypatch.setattr(few_rows, "missing", lambda: None)
    monkeypatch.setattr(few_rows, "device_of", lambda _: torch.device("cuda"))
    with pytest.raises(UsageError, match="1 to 16 rows"):
        speed_up(small_llama(), rows=(1, 17))


def test_eval_says_where_the_small_model_is_slower():
    assert speed_note(10.0, 10.0) is None
    assert "at 0.50 of the dense model's speed (5.0 and 10.0 tokens/s" in str(speed_note(5.0, 10.0))
