"""What a run would do, without touching a weight: shapes, ranks where they follow, numbers, bytes, memory, time.

Time is estimated from the operations of the run and the matrix rate of this machine, measured for half a second.
"""

import time
from typing import Any

import torch
from transformers import PreTrainedModel

from spectrim.engines.masked import budget_of
from spectrim.engines.ranks import new_bias, plan_ranks
from spectrim.engines.search import SENSITIVITY_LEVELS, SENSITIVITY_WINDOWS, STAGES
from spectrim.linalg.bits import PER_NUMBER
from spectrim.linalg.curvature import coupling_operations
from spectrim.method import LayerMethod, MaskedMethod, Method, TrainedMethod
from spectrim.model_method import ModelMethod
from spectrim.models.load import Source, meta_model
from spectrim.models.walk import Layer, Walk, find_layers
from spectrim.options import RECOVERY_BATCH
from spectrim.replacement import Target, stored_numbers
from spectrim.stats import GRADIENT_STATS, Stat

EFFICIENCY = 0.4
"""Share of the measured matrix rate that whole training passes of small models reach here (measured, CPU and GPU)."""


def estimate(
    source: Source,
    method: Method,
    keep: float,
    *,
    windows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """The plan as a dict; `rank` is None where it depends on what calibration will measure."""
    model = meta_model(source.config)
    walk = find_layers(model)
    budget = budget_of(method, walk, keep)
    if isinstance(method, ModelMethod):
        method.check_model(source.config, walk, keep)
        uniform, layers = False, _unplanned(walk, _codecs(method))
        after = method.stored(walk, budget) // PER_NUMBER[method.budget_unit]  # bytes as numbers of 16 bits
    else:
        assert isinstance(method, LayerMethod)
        uniform = method.allocation == "uniform" and not (isinstance(method, MaskedMethod) and method.steps)
        layers = _planned(method, walk, keep) if uniform else _unplanned(walk, method.storage)
        after = sum(row["numbers"] for row in layers) if uniform else budget + walk.numbers - sum_weights(walk)
    rest = untargeted_numbers(model, walk)
    masks = sum((row["shape"][0] + 7) // 8 for row in layers if uniform and row["codec"] == "pivot")  # one byte each
    bytes_after = (rest + after - masks) * dtype.itemsize + masks
    total = sum(p.numel() for p in model.parameters())
    memory = peak_bytes(walk, method, total, length)
    operations = count_operations(walk, method, total, windows, length)
    rate = matrix_rate(device)
    return {
        "model": source.name,
        "method": method.to_config(),
        "keep": keep,
        "layers": layers,
        "ranks_known": uniform,
        "untouched": [{"name": n, "numbers": k, "why": why} for n, k, why in walk.untouched],
        "linear_numbers": {"before": walk.numbers, "after": after},
        "model_numbers": {"before": source.checkpoint.numel, "after": rest + after},
        "model_bytes": {"before": source.checkpoint.nbytes, "after": bytes_after},
        "disk_bytes": int(bytes_after * 1.1),
        "peak_memory_bytes": memory,
        "operations": operations,
        "matrix_rate_per_s": rate,
        "seconds": operations / (rate * EFFICIENCY),
        "device": str(device),
    }


def _codecs(method: ModelMethod) -> str:
    """What its layers may become, in few words."""
    if len(method.codecs) > 2:
        return f"{method.codecs[0]} or another"
    return " or ".join(method.codecs) or "dense"


def sum_weights(walk: Walk) -> int:
    """Numbers of all target weights, biases apart."""
    return sum(layer.weight_numbers for layer in walk.layers)


def untargeted_numbers(model: PreTrainedModel, walk: Walk) -> int:
    """Numbers that are stored beside the target layers, tied tensors once."""
    tensors = {id(tensor): tensor.numel() for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensors.values()) - walk.numbers


def _planned(method: LayerMethod, walk: Walk, keep: float) -> list[dict[str, Any]]:
    """One row a layer, where ranks follow from the shapes."""
    flat = {la.name: torch.ones(min(la.outputs, la.inputs), dtype=torch.float64) for la in walk.layers}
    targets = plan_ranks(method, walk, flat, keep).targets
    return [
        {**row, "codec": target.codec, "rank": target.rank, "numbers": _numbers(method, layer, target)}
        for layer, row in zip(walk.layers, _unplanned(walk, ""), strict=True)
        for target in [targets[layer.name]]
    ]


def _unplanned(walk: Walk, codec: str) -> list[dict[str, Any]]:
    """One row a layer, where what becomes of it waits for calibration."""
    return [
        {"name": layer.name, "shape": [layer.outputs, layer.inputs], "dense": layer.numbers, "codec": codec}
        | {"rank": None, "numbers": None}
        for layer in walk.layers
    ]


def _numbers(method: LayerMethod, layer: Layer, target: Target) -> int:
    bias = layer.numbers - layer.weight_numbers + (0 if target.codec == "dense" else new_bias(method, layer))
    return stored_numbers(layer.outputs, layer.inputs, target) + bias


def peak_bytes(walk: Walk, method: Method, total: int, length: int) -> int:
    """Model in float32, spectra and statistics in float64, activations of a batch; or distillation, if that is more."""
    spectra = sum(min(la.outputs, la.inputs) * (la.outputs + la.inputs) for la in walk.layers) * 8
    statistics = 0
    if Stat.GRAM in method.needs:
        statistics += sum(la.inputs**2 for la in walk.layers) * 8
    if Stat.OUTPUT_GRAD in method.needs:
        statistics += sum(la.outputs**2 for la in walk.layers) * 8
    if method.needs & {Stat.FISHER, Stat.SLOPE}:
        statistics += sum_weights(walk) * 8
    if method.refinement is not None:  # sums in float64 and inverses in float32 beside the plain ones
        statistics = statistics * 5 // 2
    rounds = 2 if rounds_of(method) else 1
    token = length * sum(3 * la.outputs + la.inputs for la in walk.layers) * 4
    learned = spectra // 2 if isinstance(method, TrainedMethod) and method.steps else 0
    batch = method.batch_size if learned and isinstance(method, TrainedMethod) else 4
    peak = 4 * total + spectra + rounds * statistics + learned + batch * token
    if getattr(method, "distil_steps", 0):  # roots of the metric, factors with gradient and two moments, beside spectra
        roots = sum(la.inputs**2 + la.outputs**2 for la in walk.layers) * 8
        factors = 4 * 4 * sum(la.weight_numbers for la in walk.layers)
        peak = max(peak, 4 * total + spectra + roots + factors + RECOVERY_BATCH * token)
    return peak


def count_operations(walk: Walk, method: Method, total: int, windows: int, length: int) -> float:
    """Floating-point operations of calibration, decomposition and learning."""
    tokens = windows * length
    forward = 2.0 * total * tokens
    passes = (1 + rounds_of(method)) * (1.0 if not method.needs & GRADIENT_STATS else 2.0)
    gram = sum(2.0 * la.inputs**2 for la in walk.layers) * tokens if method.needs else 0.0
    if Stat.OUTPUT_GRAD in method.needs:
        gram += sum(2.0 * la.outputs**2 for la in walk.layers) * tokens
    decomposition = sum(30.0 * max(la.outputs, la.inputs) ** 3 for la in walk.layers) * (1 + rounds_of(method))
    calibration = (forward * passes + gram * (1 + rounds_of(method))) if method.needs else 0.0
    if method.refinement is not None:
        coupled = sum(coupling_operations(la.outputs, la.inputs, length) for la in walk.layers) * windows
        calibration += (3 * forward + coupled) * (1 + rounds_of(method))
    if isinstance(method, LayerMethod) and method.error_share > 0:
        # both models: to start, up to each of four groups of layers, and to go on
        calibration += 8 * forward + 2 * gram
        decomposition *= (2 + rounds_of(method)) / (1 + rounds_of(method))
    calibration += forward / windows * searched_windows(method, len(walk.layers))
    learning = 0.0
    if isinstance(method, TrainedMethod):
        steps = method.steps + getattr(method, "distil_steps", 0)
        learning = 8.0 * total * steps * method.batch_size * length  # student there and back, teacher there
    return calibration + decomposition + learning


def rounds_of(method: Method) -> int:
    """How often the statistics are measured again."""
    return method.rounds if isinstance(method, LayerMethod) else 0


def searched_windows(method: Method, layers: int) -> int:
    """Windows that an allocation that searches runs the compressed model on."""
    if not isinstance(method, LayerMethod):
        return 0
    if method.allocation == "sensitivity":
        return layers * SENSITIVITY_LEVELS * SENSITIVITY_WINDOWS
    if method.allocation == "evopress":
        judged = [method.offspring, *(survivors + 1 for survivors, _ in STAGES[:-1])]
        return method.generations * sum(n * windows for n, (_, windows) in zip(judged, STAGES, strict=True))
    return 0


def matrix_rate(device: torch.device) -> float:
    """Operations per second of float32 products of model-like shapes on this device."""
    a, b = torch.randn(2048, 1024, device=device), torch.randn(1024, 1024, device=device)
    torch.matmul(a, b)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < 0.5:
        torch.matmul(a, b)
        count += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
    return count * 2.0 * 2048 * 1024 * 1024 / (time.perf_counter() - start)
