"""Which share of its numbers each part of a model keeps, for methods that treat the model as a whole.

The profile of CompactifAI (arXiv 2401.14109): one part at a time (the attention or the feed-forward layers of a block)
is put in the small form, all others dense, and KL(dense || compressed) is measured; then the least sum under the
budget. It supposes that losses add up, as every such sweep does.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.learned import skeleton
from spectrim.engines.measure import Progress, frozen
from spectrim.engines.search import draw, logits
from spectrim.errors import UsageError
from spectrim.linalg.allocate import Options, allocate
from spectrim.linalg.divergence import mean_kl
from spectrim.models.walk import Layer, Walk

PROFILE_WINDOWS = 4

Small = Callable[[Layer, float], nn.Module]
"""The layer in the small form with at most that share of its weight's numbers."""


def parts_of(walk: Walk) -> dict[str, list[Layer]]:
    """Target layers by the module that holds them: model.layers.0.self_attn, model.layers.0.mlp, .."""
    parts: dict[str, list[Layer]] = {}
    for layer in walk.layers:
        parts.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return parts


def levels_around(keep: float) -> tuple[float, ...]:
    """Shares that a part is measured at, below dense: half of what is asked for, that, and half-way to all."""
    return (keep / 2, keep, (1 + keep) / 2)


def profile(
    dense: PreTrainedModel,
    walk: Walk,
    small: Small,
    levels: Sequence[float],
    ids: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """KL in nats a token, by part and level, on PROFILE_WINDOWS of `ids`; the dense model is not changed."""
    batch = draw(ids, PROFILE_WINDOWS, torch.Generator().manual_seed(seed))
    parts, found = parts_of(walk), {}
    student = skeleton(dense)
    with frozen(dense), torch.no_grad():
        teacher = logits(dense, batch)
        for done, (name, layers) in enumerate(parts.items()):
            found[name] = []
            for level in levels:
                for layer in layers:
                    student.set_submodule(layer.name, small(layer, level))
                found[name].append(float(mean_kl(logits(student, batch), teacher)))
            for layer in layers:
                student.set_submodule(layer.name, dense.get_submodule(layer.name))
            if progress is not None:
                progress("profile", done + 1, len(parts))
    return found


def shares_by(
    found: Mapping[str, Sequence[float]], levels: Sequence[float], walk: Walk, budget: int
) -> dict[str, float]:
    """The share of every layer: the least sum of what was measured, within `budget` numbers for all weights.

    `levels` ascend; the last option of a part is to stay dense.
    """
    menu, parts = [], parts_of(walk)
    for name, layers in parts.items():
        numbers = sum(layer.weight_numbers for layer in layers)
        cost = [int(level * numbers) for level in levels] + [numbers]
        menu.append(Options(torch.tensor([*found[name], 0.0], dtype=torch.float64), torch.tensor(cost)))
    chosen = allocate(menu, budget)
    options = [*levels, 1.0]
    return {layer.name: options[k] for (_, layers), k in zip(parts.items(), chosen, strict=True) for layer in layers}


def weight_numbers_left(walk: Walk, budget: int, method: str, least: Callable[[Layer], int]) -> int:
    """What a budget leaves for weights beside the biases; UsageError where the smallest forms do not fit."""
    left = budget - sum(layer.numbers - layer.weight_numbers for layer in walk.layers)
    needed = sum(min(layer.weight_numbers, least(layer)) for layer in walk.layers)
    if left < needed:
        raise UsageError(
            f"method {method}: the smallest layers take {needed:,} numbers beside the biases, and the budget leaves "
            f"{max(left, 0):,} of {walk.numbers:,}; keep more"
        )
    return left
