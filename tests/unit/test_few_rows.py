"""Decoding faster: which layers are computed together, where it is refused, what `eval` says of a slower model."""

import pytest
import torch

from spectrim.errors import UsageError
from spectrim.evaluate.speed import speed_note
from spectrim.integrations import few_rows
from spectrim.integrations.few_rows import groups_of, speed_up
from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.models.walk import find_layers
from spectrim.nn.kernels.few import FewRows
from spectrim.nn.linears import LowRankLinear
from tiny_models import tiny

F32, CPU = torch.float32, torch.device("cpu")


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


def test_prefill_is_chosen_for_all_layers_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(few_rows, "missing", lambda: None)
    monkeypatch.setattr(few_rows, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(few_rows, "has_pdl", lambda _: False)
    monkeypatch.setattr(few_rows, "choose", lambda groups, rows, pdl: [f"{len(groups)} groups"])
    monkeypatch.setattr(few_rows, "choose_many", lambda layers, rows: [f"{len(list(layers))} layers, {rows} rows"])
    model = small_llama()
    assert speed_up(model) == ["8 groups"]
    assert speed_up(model, prefill=64) == ["8 groups", "12 layers, 64 rows"]
    with pytest.raises(UsageError, match="prefill 63; at least 64"):
        speed_up(model, prefill=63)


def test_a_model_on_several_devices_is_refused(monkeypatch):
    monkeypatch.setattr(few_rows, "missing", lambda: None)
    monkeypatch.setattr(few_rows, "device_of", lambda _: torch.device("cuda"))
    model = small_llama()
    model.model.layers[1].to("meta")
    with pytest.raises(UsageError, match=r"layers are on cpu, meta; .* load it with device_map=0"):
        speed_up(model)


def test_eval_says_where_the_small_model_is_slower():
    assert speed_note(10.0, 10.0) is None
    assert "at 0.50 of the dense model's speed (5.0 and 10.0 tokens/s" in str(speed_note(5.0, 10.0))


# ---- sharing a result


def shared_group(monkeypatch) -> tuple[FewRows, list[int]]:
    """Three layers whose products are 1, 2 and 3 times the input, without a kernel; and when all were computed."""
    group, computed = FewRows(tuple(LowRankLinear(2, 2, 1, bias=False) for _ in range(3)), {}, F32, CPU), []
    group.tiles[1] = ((1, 1, 1, 1), (1, 1, 1, 1))  # type: ignore[assignment]  # never read
    monkeypatch.setattr(group, "all_of", lambda x: computed.append(1) or [k * x for k in (1, 2, 3)])
    return group, computed


@torch.no_grad()
def test_a_result_is_shared_until_the_input_changes(monkeypatch):
    group, computed = shared_group(monkeypatch)
    first, second, third = group.layers
    x = torch.ones(1, 2)
    assert group.takes(x)
    assert [group.product(layer, x).tolist() for layer in group.layers] == [[[k, k]] for k in (1, 2, 3)]
    assert len(computed) == 1
    assert group.product(first, x).tolist() == [[1, 1]]
    x.mul_(5)
    assert group.product(second, x).tolist() == [[10, 10]]
    assert group.product(third, x).tolist() == [[15, 15]]
    assert len(computed) == 3
    assert group.product(first, x[:, :]).tolist() == [[5, 5]]  # another tensor


def test_tensors_that_do_not_count_their_changes_are_left_to_torch(monkeypatch):
    group, _ = shared_group(monkeypatch)
    alone = FewRows(group.layers[:1], group.tiles, F32, CPU)
    with torch.inference_mode():
        x = torch.ones(1, 2)
        assert not group.takes(x)
        assert alone.takes(x)
    monkeypatch.setattr(alone, "all_of", lambda x: [7 * x])
    with torch.inference_mode():
        for _ in range(2):
            assert alone.product(alone.layers[0], x).tolist() == [[7 * float(x[0, 0])] * 2]
            x.mul_(5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_is_traced_whole(mode, monkeypatch):
    group, _ = shared_group(monkeypatch)

    def layers(x):
        h = x + 1
        return [group.product(layer, h) for layer in group.layers if group.takes(h)]

    with mode():
        found = torch.compile(layers, backend="eager", fullgraph=True)(torch.ones(1, 2))
    assert [y.tolist() for y in found] == [[[k, k]] for k in (2, 4, 6)]
