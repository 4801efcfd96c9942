"""Storage that layers share: who shares what under a budget, what is stored, loaded, trained, and refused."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import spectrim
from memory_checkpoint import Killed, MemoryCheckpoint, kill_at
from spectrim.engines.any_size import compress_any_size
from spectrim.engines.pipeline import compress_model
from spectrim.engines.sharing import find_groups, plan_groups
from spectrim.errors import UsageError
from spectrim.integrations.transformers import make_dense
from spectrim.models.walk import find_layers
from spectrim.nn.shared import SharedLinear, SharedPivotLinear
from spectrim.registry import make_method
from tiny_models import logits_of, tiny, token_ids

IDS = token_ids(8, 16)
SHARED = ("shared", "shared-pivot", "best")


def compressed(method: str = "svd-llm", keep: float = 0.6, model: str = "llama-gqa-bias", **options: Any) -> Any:
    given = {key: options.pop(key) for key in ("recovery", "training") if key in options}
    return compress_model(tiny(model), make_method(method, options=options), keep, IDS, **given)


def test_groups_are_the_layers_that_read_one_input():
    model = tiny("llama-gqa-bias")
    found = [[la.name.rpartition(".")[2] for la in group] for group in find_groups(model, find_layers(model))]
    assert found == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2


def stored(outcome: Any) -> int:
    layers = [outcome.model.get_submodule(layer.name) for layer in outcome.walk.layers]
    return sum(tensor.numel() for layer in layers for tensor in layer.state_dict().values())


@pytest.mark.parametrize("storage", SHARED)
@pytest.mark.parametrize(
    ("method", "options"),
    [("svd-llm", {}), ("svd-llm", {"allocation": "global"}), ("two-sided", {}), ("soco", {"newton": 1, "steps": 0})],
)
def test_what_is_stored_is_what_was_planned_and_within_the_budget(storage, method, options):
    outcome = compressed(method, storage=storage, **options)
    assert stored(outcome) == outcome.plan.numbers_after == sum(r.numbers for r in outcome.placed.values())
    assert outcome.plan.keep <= 0.6
    assert outcome.plan.keep > 0.58
    codecs = {target.codec for target in outcome.plan.targets.values()}
    assert codecs <= {"dense", outcome.method.alone, "shared" if storage == "shared" else "shared-pivot"}
    for layer in outcome.walk.layers:
        module, target = outcome.model.get_submodule(layer.name), outcome.plan.targets[layer.name]
        if isinstance(module, SharedLinear):
            assert (module.codec, module.rank, module.basis) == (target.codec, target.rank, target.basis)


def gram_loss(dense: Any, small: Any, walk: Any) -> float:
    """sum over layers of E|| (W - W') x ||^2 for the inputs of the dense model, token by token."""
    seen: dict[str, Tensor] = {}
    handles = [
        dense.get_submodule(la.name).register_forward_pre_hook(
            lambda _, inputs, name=la.name: seen.__setitem__(name, inputs[0])
        )
        for la in walk.layers
    ]
    with torch.no_grad():
        dense(input_ids=IDS)
    for handle in handles:
        handle.remove()
    total = 0.0
    for la in walk.layers:
        lost = dense.get_submodule(la.name).weight.detach() - make_weight(small.get_submodule(la.name))
        x = seen[la.name].double()
        total += float((x @ lost.double().mT).square().sum()) / x[..., 0].numel()
    return total


def make_weight(module: Any) -> Tensor:
    return (module.dense_weight() if hasattr(module, "dense_weight") else module.weight).detach()


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_best_storage_loses_no_more_than_either_form(allocation):
    losses = {}
    for storage in ("pivot", "shared-pivot", "best"):
        outcome = compressed(keep=0.5, storage=storage, allocation=allocation)
        losses[storage] = gram_loss(tiny("llama-gqa-bias"), outcome.model, outcome.walk)
    # Options that no price makes the best are not offered by a group: a few numbers more or less of 10,000.
    assert losses["best"] <= 1.005 * min(losses["pivot"], losses["shared-pivot"])


def menu_of(keep: float, energies: Any, errors: Any, **options: Any) -> Any:
    model = tiny("llama")
    walk = find_layers(model)
    method = make_method("svd-llm", options=options)
    groups = find_groups(model, walk)
    flat = {la.name: energies(min(la.outputs, la.inputs)) for la in walk.layers}
    tails = {g[0].name: errors(min(g[0].inputs, sum(la.outputs for la in g))) for g in groups}
    return plan_groups(method, walk, groups, flat, tails, keep)


def falling(count: int) -> Tensor:
    return torch.logspace(2, 0, count, dtype=torch.float64)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_groups_share_where_their_common_components_hold_more(allocation):
    def tail(count: int) -> Tensor:
        return torch.cat([falling(count).flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])

    alike = menu_of(0.5, falling, tail, storage="best", allocation=allocation)
    apart = menu_of(0.5, falling, lambda n: 30 * tail(n), storage="best", allocation=allocation)
    assert "shared-pivot" in {target.codec for target in alike.targets.values()}
    assert {target.codec for target in apart.targets.values()} <= {"pivot", "dense"}


@pytest.mark.parametrize("keep", [0.2, 0.35, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("storage", SHARED)
def test_every_budget_is_met(keep, storage):
    for allocation in ("uniform", "global"):
        outcome = compressed(keep=keep, storage=storage, allocation=allocation)
        assert stored(outcome) <= keep * outcome.walk.numbers
    if keep == 1.0:  # of the last of them
        assert torch.allclose(logits_of(outcome.model, IDS), logits_of(tiny("llama-gqa-bias"), IDS), atol=1e-4)


def test_a_budget_below_rank_one_says_what_can_be_reached():
    with pytest.raises(UsageError, match=r"rank 1 everywhere takes .* smallest reachable keep is 0"):
        compressed(keep=0.01, storage="shared")


def test_rank_multiples_hold_for_groups():
    for storage in SHARED:
        outcome = compressed(storage=storage, rank_multiple=4)
        assert all(t.rank % 4 == 0 or t.codec == "dense" for t in outcome.plan.targets.values())


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_a_saved_folder_loads_is_counted_and_becomes_dense_again(storage: str, tmp_path: Path):
    model = tiny("llama-gqa-bias")
    small = spectrim.compress(model, keep=0.6, method="svd-llm", calibration=IDS, options={"storage": storage})
    folder = small.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits_of(loaded, IDS), logits_of(small.model, IDS), atol=1e-5)
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    owner = "model.layers.0.self_attn.q_proj"
    assert modules[owner]["codec"] == storage
    assert modules[owner]["basis"] is None
    assert modules[owner.replace("q_proj", "v_proj")]["basis"] == owner
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["layers"]}
    assert rows[owner]["form"] == storage
    assert rows[owner]["numbers"] > rows[owner.replace("q_proj", "v_proj")]["numbers"]
    make_dense(loaded)
    assert torch.allclose(logits_of(loaded, IDS), logits_of(small.model, IDS), atol=1e-4)


def test_a_mask_that_does_not_fit_the_rank_is_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    options = {"storage": "shared-pivot"}
    small = spectrim.compress(tiny("llama"), keep=0.6, method="svd-llm", calibration=IDS, options=options)
    folder = small.save_pretrained(tmp_path / "small")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.V.mask"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match="mask marks 0 inputs, the basis has"):
        AutoModelForCausalLM.from_pretrained(folder)


# Interrupted


@pytest.mark.parametrize(
    ("method", "storage", "stage", "step"),
    [
        ("two-sided", "best", "calibrate", 4),
        ("two-sided", "shared-pivot", "propagate", 1),
        ("soco", "shared", "newton", 1),
        ("svd-llm", "shared-pivot", "distil", 2),
    ],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method, storage, stage, step):
    options = {"soco": {"steps": 0, "newton": 1, "coupling": "none"}}.get(method, {})
    steps = ("kl:4",) if stage == "distil" else ()

    def run(**told: Any) -> Any:
        made = make_method(method, options={"storage": storage, **options})
        return compress_model(tiny("llama"), made, 0.5, IDS, recovery=steps, gradient_windows=4, **told)

    whole, checkpoint = run(), MemoryCheckpoint(every=1, closed=True)
    with pytest.raises(Killed):
        run(checkpoint=checkpoint, progress=kill_at(stage, step))
    again = run(checkpoint=checkpoint)
    assert again.plan == whole.plan
    mine, theirs = again.model.state_dict(), whole.model.state_dict()
    assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []


# Training


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_distillation_trains_the_basis_once_and_lowers_the_divergence(storage):
    before = compressed(keep=0.5, storage=storage)
    after = compressed(keep=0.5, storage=storage, recovery=("kl:8",))
    names = [la.name for la in after.walk.layers if isinstance(after.model.get_submodule(la.name), SharedLinear)]
    assert len(names) == 10
    assert [after.model.get_submodule(n).entry() for n in names] == [
        before.model.get_submodule(n).entry() for n in names
    ]
    for name in names:
        layer = after.model.get_submodule(name)
        assert layer.owner is after.model.get_submodule(layer.basis or name)
        assert not torch.equal(layer.U.weight, before.model.get_submodule(name).U.weight)
    dense = logits_of(tiny("llama-gqa-bias"), IDS).detach().log_softmax(-1)

    def divergence(model: Any) -> float:
        with torch.no_grad():
            return float((dense.exp() * (dense - logits_of(model, IDS).log_softmax(-1))).sum(-1).mean())

    assert divergence(after.model) < 0.9 * divergence(before.model)
    assert after.distil_losses[-1] < after.distil_losses[0]


def test_without_a_step_training_gives_the_layers_back():
    from spectrim.engines.distil_shared import from_spectral_groups, shared_layers, to_spectral_groups
    from spectrim.linalg.metric import root_of

    small = compressed(storage="shared-pivot")
    layers = shared_layers(small.model, small.walk)
    torch.manual_seed(0)
    metric = {
        name: tuple(
            root_of(x.mT @ x) for x in (torch.randn(99, n).double() for n in (layer.out_features, layer.in_features))
        )
        for name, layer in layers.items()
    }
    spectral = to_spectral_groups(layers, metric)
    x = torch.randn(4, 32)
    for name, layer in layers.items():
        assert torch.allclose(spectral[name](x), layer(x), atol=1e-4)
    assert sum("V" in dict(module.named_parameters()) for module in spectral.values()) == 4
    for name, layer in from_spectral_groups(spectral, layers).items():
        assert torch.allclose(layer(x), layers[name](x), atol=1e-4)


# What is not there is refused


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("svd", {"storage": "shared"}, "storage must be one of factor, pivot, got 'shared'"),
        ("mpifa", {"storage": "best"}, "storage must be one of factor, pivot"),
        ("svd-llm", {"storage": "best", "allocation": "evopress"}, "storage=best takes allocation=uniform or global"),
        ("soco", {"storage": "best", "steps": 10}, "storage=best with steps=10: learned scores"),
        ("soco", {"storage": "best", "steps": 0, "basis": "svd"}, "storage=best with basis=svd"),
    ],
)
def test_methods_say_which_storages_they_take(method, options, says):
    with pytest.raises(UsageError, match=says):
        make_method(method, options=options)


def test_steps_that_want_both_factors_are_refused():
    for wrong in ({"recovery": ("refit",)}, {"recovery": ("block:2",)}, {"update": "sequential"}):
        with pytest.raises(UsageError, match="storage=shared shares them; take kl"):
            compressed(storage="shared", **wrong)
    with pytest.raises(UsageError, match="leave --factor-bits out"):
        compress_model(tiny("llama"), make_method("svd-llm", options={"storage": "best"}), 0.6, IDS, factor_bits=4)
    with pytest.raises(UsageError, match="--any-size takes storage factor or pivot"):
        compress_any_size(tiny("llama"), make_method("svd-llm", options={"storage": "best"}), IDS)


# One product for a group


def group(storage: str) -> tuple[SharedLinear, SharedLinear]:
    kind = SharedPivotLinear if storage == "shared-pivot" else SharedLinear
    owner = kind(12, 8, 4, bias=False)
    borrower = kind(12, 6, 4, bias=True, basis="owner")
    with torch.no_grad():
        for layer in (owner, borrower):
            layer.load_state_dict(
                {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in layer.state_dict().items()}
                | (
                    {"V.mask": torch.tensor([0b01010101, 0], dtype=torch.uint8)}
                    if "V.mask" in layer.state_dict()
                    else {}
                )
            )
    borrower.borrow(owner)
    return owner.eval(), borrower.eval()


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_layers_compute_the_weight_they_stand_for(storage):
    for layer in group(storage):
        x = torch.randn(2, 5, 12)
        expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
        assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_the_basis_is_multiplied_once_for_a_group_and_again_when_anything_changed(storage, monkeypatch):
    owner, borrower = group(storage)
    counted: list[int] = []
    forward = type(owner.V).forward
    monkeypatch.setattr(
        type(owner.V), "forward", lambda own, x: (own is owner.V and counted.append(1)) or forward(own, x)
    )
    x = torch.randn(3, 12)

    def both() -> list[Tensor]:
        found = [layer(x) for layer in (owner, borrower)]
        for layer, y in zip((owner, borrower), found, strict=True):
            assert torch.allclose(y, torch.nn.functional.linear(x, layer.dense_weight(), layer.bias), atol=1e-5)
        return found

    with torch.no_grad():
        both()
        both()
        assert len(counted) == 1  # the same tensor, nothing changed
        x.mul_(2)
        both()
        assert len(counted) == 2
        next(owner.V.parameters()).mul_(3)
        both()
        assert len(counted) == 3
        seen: list[int] = []
        handle = owner.V.register_forward_hook(lambda *_: seen.append(1))
        both()
        assert len(seen) == 2
        handle.remove()
    counted.clear()
    both()
    assert len(counted) == 2  # gradients may be asked for
    with torch.inference_mode():
        y = torch.randn(3, 12)
        owner(y), borrower(y)
        assert len(counted) == 4


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_what_is_kept_with_an_input_is_not_taken_where_it_may_be_another(storage):
    owner, borrower = group(storage)

    def check(x: Tensor) -> None:
        expected = torch.nn.functional.linear(x, borrower.dense_weight(), borrower.bias)
        assert torch.allclose(borrower(x), expected, atol=1e-5)

    with torch.no_grad():
        x = torch.randn(3, 12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            owner(x)
        check(x)  # in another precision
        x.data = torch.randn(3, 12)
        check(x)
        found = torch.func.vmap(lambda bias: torch.func.functional_call(borrower, {"U.bias": bias}, (x,)))
        assert found(torch.zeros(2, 6)).shape == (2, 3, 6)
        if storage == "shared":
            found = torch.func.vmap(lambda basis: torch.func.functional_call(owner, {"V.weight": basis}, (x,)))
            assert found(torch.zeros(2, 4, 12)).shape == (2, 3, 8)  # tensors without memory of their own
    with torch.inference_mode():
        owner, borrower = group(storage)
    with torch.no_grad():
        check(torch.randn(3, 12))  # a basis that does not count its changes


def test_an_input_is_saved_and_copied_without_what_is_kept_with_it():
    owner, borrower = group("shared")
    x = torch.randn(3, 12)
    with torch.no_grad():
        owner(x)
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=True), copy.deepcopy(x)):
        assert torch.equal(other, x)
        assert not any(isinstance(kept, tuple) for kept in vars(other).values())
        with torch.no_grad():
            assert torch.equal(borrower(other), borrower(x))


@pytest.mark.parametrize("storage", ["shared", "shared-pivot"])
def test_compiled_the_basis_is_multiplied_once_and_anew_at_each_call(storage):
    owner, borrower = group(storage)
    products: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    x = torch.randn(3, 12)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(lambda x: (owner(x), borrower(x)), backend=count, fullgraph=True)
        for _ in range(3):
            for found, layer in zip(compiled(x), (owner, borrower), strict=True):
                expected = torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)
                assert torch.allclose(found, expected, atol=1e-5)
            x.mul_(2)  # the same tensor object, as a static input of a CUDA graph is
    torch._dynamo.reset()
    assert products == [3]
