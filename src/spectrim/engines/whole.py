"""A method that makes the whole model: what it is given, and what is checked of its result."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.measure import Progress
from spectrim.engines.ranks import Plan
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.bits import Unit, budget_in
from spectrim.method import Method
from spectrim.model_method import Job, ModelMethod
from spectrim.models.walk import Walk
from spectrim.nn.codecs import StoredLinear
from spectrim.replacement import Replacement, Target, dense_replacement
from spectrim.stats import Stats


def whole_budget(walk: Walk, keep: float, unit: Unit = "numbers") -> int:
    """Numbers, or bytes, that all target layers may store together, biases included."""
    return budget_in(unit, walk.numbers, keep)


def refuse_skipped(method: Method, walk: Walk, found: Walk) -> None:
    """Layers that hold NaN or Inf can be left out only where layers are treated one by one."""
    if isinstance(method, ModelMethod) and len(walk.layers) < len(found.layers):
        kept = {layer.name for layer in walk.layers}
        bad = [layer.name for layer in found.layers if layer.name not in kept]
        raise UsageError(
            f"method {method.info.name} makes the model as a whole and cannot leave out {len(bad)} layers that hold "
            f"NaN or Inf (first: {bad[0]}); take a method that treats layers one by one (soco, svd-llm, ...)"
        )


def make_whole(
    method: ModelMethod,
    dense: PreTrainedModel,
    walk: Walk,
    keep: float,
    stats: Mapping[str, Stats],
    calibration: Tensor,
    training: Tensor,
    *,
    gradient_windows: int,
    seed: int,
    warnings: list[str],
    frontier: list[dict[str, float]],
    timed: Callable[[str], AbstractContextManager[None]],
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[PreTrainedModel, Plan, dict[str, Replacement]]:
    """The method's model, what each layer became, and its storage; NumericalError when it is not within the budget."""
    budget = whole_budget(walk, keep, method.budget_unit)
    job = Job(
        dense=dense, walk=walk, keep=keep, budget=budget, stats=stats, calibration=calibration, training=training,
        gradient_windows=gradient_windows, seed=seed, warnings=warnings, frontier=frontier, timed=timed,
        progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
    model = method.compress(job).eval()
    assert model is not dense, f"{method.info.name} must leave the dense model as it is"
    placed = {layer.name: stored_layer(model.get_submodule(layer.name)) for layer in walk.layers}
    stored = sum(replacement.size(method.budget_unit) for replacement in placed.values())
    if stored > budget:
        raise NumericalError(
            f"{method.info.name} stores {stored:,} {method.budget_unit} in {len(placed)} layers, keep {keep:g} allows "
            f"{budget:,}; this is a bug of spectrim, please report it"
        )
    own = {id(tensor) for tensor in (*dense.parameters(), *dense.buffers())}  # may hold what check_weights let through
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in own and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericalError(f"{name}: {method.info.name} made NaN or Inf of it; use more calibration text")
    targets = {name: Target(rank=replacement.rank, codec=replacement.codec) for name, replacement in placed.items()}
    return (
        model,
        Plan(targets=targets, numbers_before=walk.numbers, numbers_after=sum(r.numbers for r in placed.values())),
        placed,
    )


def stored_layer(module: nn.Module) -> Replacement:
    """What a layer stores, whatever its codec."""
    if not isinstance(module, StoredLinear):
        assert isinstance(module.weight, Tensor)
        bias = module.bias
        return dense_replacement(module.weight.detach(), bias.detach() if isinstance(bias, Tensor) else None)
    tensors = {key: tensor.detach() for key, tensor in module.state_dict().items() if tensor.numel()}
    return Replacement(codec=module.codec, rank=module.rank, tensors=MappingProxyType(tensors))
