"""What several processes cannot do together yet is refused by its name, and never done by each of them for itself."""

from collections.abc import Sequence

import torch

from spectrim.engines.measure import computing_dtype
from spectrim.errors import UsageError
from spectrim.method import SEARCHED, LayerMethod, LearnedMethod, Method, OrderedMethod, TrainedMethod
from spectrim.model_method import ModelMethod
from spectrim.options import Step
from spectrim.processes import present
from spectrim.stats import GRADIENT_STATS

ALONE = "run it as one process (spectrim compress ..., without torchrun)"


def refuse_unspread(
    method: Method,
    steps: Sequence[Step],
    factor_bits: int | None,
    windows: int,
    gradient_windows: int,
    world: int | None = None,
) -> None:
    """UsageError where several processes would do the same work each, or have too few windows for all.

    `world` is how many there are, of a run that is only planned; None: as many as have met.
    """
    world = present().world if world is None else world
    if world == 1:
        return
    name = method.info.name
    what = _unspread(method, steps, factor_bits)
    if what is not None:
        raise UsageError(f"{what} is not spread over several processes yet, and there are {world}; {ALONE}")
    least = min(windows, gradient_windows) if method.needs & GRADIENT_STATS else windows
    if method.needs and least < world:
        raise UsageError(
            f"method {name}: {least} calibration windows (those that give gradients, where there are fewer of them) "
            f"for {world} processes; each needs one at least: --calib-windows, --gradient-windows, or fewer processes"
        )
    if isinstance(method, TrainedMethod) and method.steps and method.batch_size < world:
        raise UsageError(
            f"method {name}: batch_size {method.batch_size} for {world} processes; each needs a window of every batch: "
            f"--set batch_size={world}, or fewer processes"
        )


def _unspread(method: Method, steps: Sequence[Step], factor_bits: int | None) -> str | None:
    """The first thing that is not spread, in words."""
    name = method.info.name
    if isinstance(method, ModelMethod):
        return f"method {name}, which treats the model as a whole,"
    if steps:
        return f"recovery step {steps[0].name}"
    if factor_bits is not None:
        return f"quantising factors (--factor-bits {factor_bits})"
    if isinstance(method, OrderedMethod) and method.allocation == "order":
        return f"method {name} with its own order of removal (--set allocation=global is)"
    if isinstance(method, LayerMethod) and method.allocation in SEARCHED:
        return f"the search of ranks (allocation={method.allocation})"
    if isinstance(method, LayerMethod) and method.shares:
        return f"storage={method.storage}"
    if method.windows_trained and not isinstance(method, LearnedMethod):
        return f"the training of method {name}"
    return None


def require_one_precision(device: torch.device) -> list[str]:
    """UsageError where ranks compute in different precisions (a GPU without bf16 among others); else what to say."""
    group, own = present(), computing_dtype(device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    found = group.objects((own, kind))
    odd = next((rank for rank, (dtype, _) in enumerate(found) if dtype != found[0][0]), None)
    if odd is not None:
        raise UsageError(
            f"{group.members[odd]} computes in {found[odd][0]} on {found[odd][1]}, {group.members[0]} in {found[0][0]} "
            f"on {found[0][1]}: one of them has no bfloat16 products, and sums of both would depend on who saw which "
            "window. Choose GPUs of one kind (CUDA_VISIBLE_DEVICES), or --device cpu"
        )
    if device.type == "cuda" and own == "float32":
        return [f"{kind} has no bfloat16: products are computed in float32, which takes longer and more memory"]
    return []
