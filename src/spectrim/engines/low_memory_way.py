"""Which runs can be had with `--low-memory`, and what such a run takes of the GPU, the host and the disk.

Refusals come before any weight is read; plan and job ask the same functions.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from spectrim.engines.plan_costs import Sizes, distinct_inputs
from spectrim.engines.plan_large import WORK_MATRICES
from spectrim.engines.plan_memory import (
    LOGITS_COMPARED,
    TEXT_BYTES,
    activations,
    resident,
    trained_vocabulary,
    vocabulary,
)
from spectrim.engines.run import CPU_BATCH, GPU_BATCH, SHORT
from spectrim.engines.shelf import packed_numbers
from spectrim.engines.way import needs_all_layers, spectra_bytes
from spectrim.errors import UsageError
from spectrim.memory import total_memory
from spectrim.method import SEARCHED, LayerMethod, LearnedMethod, Method
from spectrim.options import recovery_of
from spectrim.processes import launched
from spectrim.request import Request
from spectrim.stats import GRADIENT_STATS, Stat

METHODS = "svd, asvd, svd-llm, afm, two-sided, and soco with --preset fast"
GPU_LIMIT = 23_000_000_000
"""Bytes that torch may take of a GPU: of a card of 24 GB, CUDA itself needs about one."""
STATES_SHARE = 0.55
"""Of the limit, all that is allocated counted, up to which hidden states stay on the GPU."""


FEWER = 2
"""Times fewer windows in a batch on a GPU: what a block saves for its way back is as large as many states."""


def limit_of(device: torch.device) -> int | None:
    """Bytes of a GPU that may be used; None of what has no memory of its own."""
    total = total_memory(device)
    return None if total is None else min(total, GPU_LIMIT)


def low_memory_method(request: Request, method: Method) -> tuple[LayerMethod, tuple[str, ...]]:
    """The method as such a run uses it, and what is to be said; UsageError, with all reasons, where it cannot."""
    wrong = [*_of_the_method(method), *_of_the_run(request, method)]
    told: tuple[str, ...] = ()
    if isinstance(method, LayerMethod):
        unmet = needs_all_layers(method)
        if list(unmet) == ["coupling=sequence"] and "coupling" not in request.options:
            method = dataclasses.replace(method, coupling="none")  # type: ignore[call-arg]  it has that field
            told = (f"method {method.info.name}: --low-memory goes block by block, with coupling=none",)
        else:
            wrong += [f"{what} needs sums of all layers at once; use {instead}" for what, instead in unmet.items()]
    if wrong:
        raise UsageError("--low-memory: " + "; ".join(wrong))
    assert isinstance(method, LayerMethod)
    return method, told


def _of_the_method(method: Method) -> list[str]:
    name = method.info.name
    if not isinstance(method, LayerMethod):
        return [f"method {name} treats the model as a whole; use one of {METHODS}"]
    wrong = []
    if method.windows_trained:
        advice = "use --preset fast" if name == "soco" else "use --set steps=0"
        wrong.append(f"method {name} trains with the whole model in memory; {advice}")
    if type(method).at_rank is not LayerMethod.at_rank:
        wrong.append(f"method {name} solves for its factors again at the planned rank; use one of {METHODS}")
    if method.allocation in SEARCHED:
        wrong.append(f"allocation={method.allocation} tries ranks in the whole model; use --set allocation=global")
    return wrong


def _of_the_run(request: Request, method: Method) -> list[str]:
    found = [
        (request.any_size, "--any-size holds all components of all layers; leave one of the two out"),
        (bool(recovery_of(method, request.recover)), "recovery trains the whole model; leave --recover out"),
        (request.factor_bits is not None, "--factor-bits works on the whole result; leave it out"),
        (
            request.model_bytes is not None or request.keep_bytes is not None,
            "a budget in bytes is not known; use --keep",
        ),
        (request.allow_nonfinite != "refuse", "layers that hold NaN or Inf are not looked for one by one; use refuse"),
        (
            "self" in (request.calib, request.eval),
            "sampling text needs the whole model; use text for --calib and --eval",
        ),
        (bool(request.shard_weights), "--shard-weights shares weights out among processes; leave it out"),
        (launched() > 1, "it is not spread over several processes; run it without torchrun"),
    ]
    return [says for applies, says in found if applies]


class LowMemory(NamedTuple):
    """Bytes that a run takes: on the GPU (0 without one), on the host, of scratch files, of them with the result."""

    gpu: int
    host: int
    scratch: int
    disk: int


def low_memory_of(method: LayerMethod, sizes: Sizes, total: int, *, number: int, limit: int | None) -> LowMemory:
    """The most of each; `total` counts the numbers of the whole model, a `number` is held in so many bytes.

    `limit` is that of the GPU, None on a CPU, whose host then holds what the GPU would.
    """
    blocks = len(sizes.walk.block_names)
    work = number * (total - sizes.walk.numbers) + 2 * number * sizes.walk.numbers // blocks + max(
        _matrices(sizes), _measuring(method, sizes, limit), _newton(method, sizes, limit), _judging(sizes)
    )  # fmt: skip
    held, disk = _scratch(method, sizes, number, 0 if limit is None else int(STATES_SHARE * limit))
    start = resident() + TEXT_BYTES
    if limit is None:
        return LowMemory(0, start + work, held, disk)
    room = min(max(_states(method, sizes, number)), int(STATES_SHARE * limit))
    return LowMemory(min(limit, work + room), start, held, disk)


def _square(n: int) -> int:
    return n * n


def _block_statistics(
    method: LayerMethod, sizes: Sizes, symmetric: Callable[[int], int] = _square
) -> tuple[list[int], list[int]]:
    """Numbers of input and of output statistics, block by block; `symmetric` counts those of a matrix (n, n)."""
    walk = sizes.walk
    inputs = [sum(map(symmetric, block)) if Stat.GRAM in method.needs else 0 for block in distinct_inputs(walk)]
    outputs = [0] * len(walk.block_names)
    for layer in walk.layers:
        outputs[layer.block] += symmetric(layer.outputs) if Stat.OUTPUT_GRAD in method.needs else 0
        outputs[layer.block] += layer.weight_numbers if method.needs & {Stat.FISHER, Stat.SLOPE} else 0
    return inputs, outputs


def _scratch(method: LayerMethod, sizes: Sizes, number: int, room: int) -> tuple[int, int]:
    """The most that lies in scratch files, and with the result, which is written when statistics are gone.

    Statistics are packed in float32; beside them is the student of a second round. While weights are propagated, what
    is kept of the spectra takes the place of the statistics.
    """
    inputs, outputs = _block_statistics(method, sizes, packed_numbers)
    blocks = [4 * (a + b) for a, b in zip(inputs, outputs, strict=True)]
    packed = sum(blocks)
    again = method.rounds > 0 and sizes.keep < 1
    student = number * sizes.weights if again else 0
    # The most that a budget can make them: all components of layers that stay dense, none of the others.
    spectra = int(sizes.keep * spectra_bytes(sizes.walk) // 2) if sizes.keep < 1 else 0
    first, second, paired, newton = (max(0, own - room) for own in _states(method, sizes, number))
    handed_over = max(packed, spectra) + 3 * max(blocks, default=0) if method.error_share else packed + spectra
    held = max(packed + first, (packed + student + second) if again else 0, handed_over + paired, spectra + newton)
    return held, max(held, spectra + sizes.bytes_written)


def _states(method: LayerMethod, sizes: Sizes, number: int) -> tuple[int, int, int, int]:
    """Hidden states: of the first measurement, of a second one, of two models side by side, of Newton's step."""
    one = sizes.length * sizes.hidden * number
    steep = sizes.gradient_windows if method.needs & GRADIENT_STATS else 0
    apart = math.ceil(math.sqrt(len(sizes.walk.block_names)))
    there, back = apart * steep, (2 * apart + 2) * steep
    first = max(sizes.windows + there, back) if method.needs else 0
    second = max(sizes.gradient_windows + there, back) if method.needs else 0
    newton = (
        (2 * apart + 4) * sizes.gradient_windows if isinstance(method, LearnedMethod) and method.newton_steps else 0
    )
    return one * first, one * second, one * 2 * sizes.gradient_windows, one * newton


def _batch(sizes: Sizes, limit: int | None) -> int:
    on_gpu = max(1, GPU_BATCH * SHORT // max(SHORT, sizes.length) // FEWER)
    return min(sizes.windows, CPU_BATCH if limit is None else on_gpu)


def _measuring(method: LayerMethod, sizes: Sizes, limit: int | None) -> int:
    inputs, outputs = _block_statistics(method, sizes)
    passing = activations(sizes, _batch(sizes, limit)) // len(sizes.walk.block_names)
    return 8 * max(max(inputs), max(outputs)) + passing


def _matrices(sizes: Sizes) -> int:
    return WORK_MATRICES * 8 * max(max(la.outputs, la.inputs) ** 2 for la in sizes.walk.layers)


def _newton(method: LayerMethod, sizes: Sizes, limit: int | None) -> int:
    if not isinstance(method, LearnedMethod) or not method.newton_steps:
        return 0
    blocks = len(sizes.walk.block_names)
    formed = (4 + 8) * sizes.weights // blocks
    return formed + activations(sizes, _batch(sizes, limit)) // blocks + trained_vocabulary(sizes, _batch(sizes, limit))


def _judging(sizes: Sizes) -> int:
    return vocabulary(sizes, min(max(1, 16 * 512 // max(512, sizes.length)), sizes.eval_windows), LOGITS_COMPARED)
