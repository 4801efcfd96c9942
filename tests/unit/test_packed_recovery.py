"""The recovery step kl on layers in few bits: codes stay, the loss falls, runs go on, what cannot be is refused."""

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from command_line import QUICK, call, small_model
from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim import job
from spectrim.engines import distil as distil_engine
from spectrim.engines.distil import distil
from spectrim.engines.outcome import Outcome
from spectrim.engines.pipeline import compress_model
from spectrim.engines.stream import low_rank_layers, packed_layers
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.linalg.knapsack import has_solver
from spectrim.linalg.quantise import round_to_nearest
from spectrim.methods.weights.rtn import RTN
from spectrim.models.walk import find_layers, weight_of
from spectrim.nn.packed import PackedLinear
from spectrim.nn.stores_uniform import UniformStore
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
STEPS = 12
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "rtn": (0.5, {"bits": 2, "group_size": 8, "search": False}),
    "gptq": (0.5, {"bits": 2, "group_size": 8, "symmetric": True}),
    "eora": (0.5, {"base": "gptq2", "group_size": 8, "search": False}),
    "trellis": (0.25, {"window": 8}),
    "squeezellm": (0.6, {"bits": 2, "outliers": 0.02, "sensitive": 0.01}),
    "spqr": (0.7, {"bits": 2, "group_size": 8, "statistic_bits": 3, "outliers": 0.02, "threshold": 3e-2}),
    "lq-lora": (0.4, {"rank_bits": 1.0, "iterations": 3}),
}
every_method = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skipif(name == "lq-lora" and not has_solver(), reason="SciPy is missing"))
     for name in METHODS],
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectrim.engines.recovery.RECOVERY_BATCH", 8)


def made(name: str, *recovery: str, **given: Any) -> tuple[Any, Outcome]:
    keep, options = METHODS[name]
    dense = tiny("llama-gqa-bias")
    return dense, compress_model(dense, make_method(name, options=options), keep, IDS, recovery=recovery, **given)


def divergence(model: Any, dense: Any) -> float:
    p, q = (logits_of(m, IDS).double().log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def is_short(tensor: Tensor) -> bool:
    """Exact in bfloat16; weights of the model that are kept apart, or left by 2:4 pruning, need not be."""
    return torch.equal(tensor.to(torch.bfloat16).float(), tensor)


@every_method
def test_codes_stay_numbers_move_and_the_model_comes_nearer(name):
    dense, start = made(name)
    again, trained = made(name, f"kl:{STEPS}")
    layers = packed_layers(start.model, start.walk)
    before, after = start.model.state_dict(), trained.model.state_dict()
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters()}
    assert all(after[key].dtype == before[key].dtype and is_number(after[key]) for key in changed)
    short = {key for key in changed if ".base." in key and is_short(before[key])}
    assert short >= {key for key in changed if ".base." in key and not key.endswith(".numbers")}  # scales, tables
    assert short
    assert all(is_short(after[key]) for key in short)
    assert divergence(trained.model, again) < 0.95 * divergence(start.model, dense)
    (losses,) = trained.recovered[0].losses
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    assert trained.plan == start.plan


@pytest.mark.parametrize(("name", "step"), [("gptq", 2), ("eora", 1), ("eora", 4)])
def test_a_killed_run_goes_on_bit_for_bit(name, step):
    whole = made(name, "kl:4")[1]
    kept = MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        made(name, "kl:4", checkpoint=kept, progress=kill_at("distil", step))
    assert {"recovery 0 kl", "recovery 0 kl codes"} <= kept.states.keys()
    resumed = made(name, "kl:4", checkpoint=kept)[1]
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    assert resumed.recovered == whole.recovered


def test_numbers_go_on_beside_the_codes_they_were_trained_with():
    """A resumed run may have made other codes, on another device; those of the checkpoint count."""
    whole = made("rtn", "kl:4")[1]
    kept = MemoryCheckpoint(every=1)
    with pytest.raises(Killed):
        made("rtn", "kl:4", checkpoint=kept, progress=kill_at("distil", 2))
    real = RTN.store_of

    def other(self: RTN, weight: Tensor, stats: Any, dtype: torch.dtype) -> Any:
        return real(self, weight.flip(0), stats, dtype)

    with mock.patch.object(RTN, "store_of", other):
        resumed = made("rtn", "kl:4", checkpoint=kept)[1]
    mine, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    del kept.states["recovery 0 kl codes"][1]["model.layers.0.mlp.up_proj.base.codes"]
    with pytest.raises(InputError, match=r"up_proj\.base\.codes is missing"):
        made("rtn", "kl:4", checkpoint=kept)


def test_low_rank_and_packed_layers_train_together():
    dense = tiny("llama-gqa-bias")
    student = compress_model(dense, make_method("svd", options={"storage": "factor"}), 0.5, IDS).model
    walk = find_layers(dense)
    for name in [layer.name for layer in walk.layers][::2]:
        module = dense.get_submodule(name)
        rounded = round_to_nearest(weight_of(module).detach(), 3, 8, symmetric=True)
        base = UniformStore.holding(rounded, bits=3, group_size=8, dtype=torch.float32)
        student.set_submodule(name, PackedLinear.holding(base, None, module.bias, dtype=torch.float32))
    low_rank, packed = low_rank_layers(student, walk), packed_layers(student, walk)
    assert len(low_rank) == len(packed) == 7
    before, kinds = student.state_dict(), {n: type(m) for n, m in (low_rank | packed).items()}
    start = divergence(student, dense)
    losses = distil(student, dense, walk, IDS, steps=STEPS, batch_size=8)
    assert len(losses) == STEPS
    assert divergence(student, dense) < 0.9 * start
    after = student.state_dict()
    for name, kind in kinds.items():
        assert type(student.get_submodule(name)) is kind
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(name))


def test_a_loss_that_is_not_finite_leaves_layers_as_they_were(monkeypatch):
    dense, start = made("rtn")
    before = {key: tensor.clone() for key, tensor in start.model.state_dict().items()}
    layers = packed_layers(start.model, start.walk)
    real = distil_engine.distillation_loss
    monkeypatch.setattr(distil_engine, "distillation_loss", lambda *given: real(*given) * math.nan)
    with pytest.raises(NumericalError, match="distillation: the loss is nan at step 0 of 3"):
        distil(start.model, dense, start.walk, IDS, steps=3, batch_size=8)
    assert packed_layers(start.model, start.walk) == layers
    assert all(torch.equal(tensor, before[key]) for key, tensor in start.model.state_dict().items())


# ---------- refused


@pytest.mark.parametrize("step", ["refit", "reconstruct", "block:2"])
def test_steps_for_factors_are_refused_with_the_one_that_serves(step):
    with pytest.raises(UsageError, match=rf"rtn: .*{step.split(':')[0]} is for low-rank .*packed\); .* only kl\[:ST"):
        made("rtn", "kl:2", step)


@pytest.mark.parametrize("name", ["slicegpt", "modegpt", "dsformer", "compactifai"])
def test_layers_without_factors_and_codes_are_refused(name):
    with pytest.raises(UsageError, match=rf"method {name}: the recovery step kl is for low-rank .*leave --recover out"):
        compress_model(tiny("llama"), make_method(name), 0.5, IDS, recovery=("kl:2",))


def test_layers_with_nothing_but_zeros_are_refused():
    dense = tiny("llama")
    walk = find_layers(dense)
    with torch.no_grad():
        for layer in walk.layers:
            weight_of(dense.get_submodule(layer.name)).zero_()
    method = make_method("rtn", options={"bits": 4, "group_size": 8})
    with pytest.raises(UsageError, match="all 14 layers in few bits hold only zeros beside their codes"):
        compress_model(dense, method, 0.6, IDS, recovery=("kl:2",))


# ---------- command line


def test_the_command_writes_trained_numbers_beside_the_same_codes(tmp_path: Path):
    model = small_model(tmp_path / "model")
    common = (
        *("compress", model, "--method", "rtn", "--set", "bits=4", "--set", "group_size=16", "--keep", "0.5"),
        *(*QUICK, "--eval", "none", "--json", "--dtype", "bfloat16"),
    )
    with mock.patch.object(job, "reload_difference", return_value=0.0):
        plain = call(*common, "--out", tmp_path / "plain")
        trained = call(*common, "--out", tmp_path / "trained", "--recover", "kl:2", "--train-windows", "4")
    assert (plain.code, trained.code) == (0, 0), plain.err + trained.err
    (step,) = json.loads((tmp_path / "trained" / "report.json").read_text())["learning"]["recovery"]
    assert step["step"] == "kl:2"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "trained"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.endswith(".base.scales")} != set()
    assert {after[key].dtype for key in changed} == {torch.bfloat16}
    assert call("verify", tmp_path / "trained").code == 0
    refused = call(*common, "--out", tmp_path / "refused", "--recover", "refit")
    assert refused.code == 2
    assert "of the recovery steps it takes only kl[:STEPS]" in refused.message
