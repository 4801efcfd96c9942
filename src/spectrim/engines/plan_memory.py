"""The most memory of a run: what is alive in each stage, in bytes; the largest stage decides.

On a CPU it starts from what this process holds already (Python, torch, transformers); on a GPU that is on the host.
Statistics and spectra are float64, weights float32, logits float32 and several of them at a time.
"""

import os
from pathlib import Path
from typing import NamedTuple

from spectrim.engines.block import MOST_WINDOWS
from spectrim.engines.plan_costs import Sizes, distinct_inputs
from spectrim.engines.run import CPU_BATCH, GPU_BATCH
from spectrim.engines.way import spectra_bytes
from spectrim.linalg.divergence import CHUNK_NUMBERS
from spectrim.method import LayerMethod, LearnedMethod, Method, TrainedMethod
from spectrim.model_method import TrainedModelMethod
from spectrim.options import RECOVERY_BATCH
from spectrim.stats import GRADIENT_STATS, Stat

TEXT_BYTES = 95 * 2**20
"""Text and tokens of `builtin:stdlib`, tokenizer included."""
EVALUATED = 16
"""Windows at a time when a model is judged (evaluate/language.py)."""
LOGITS_COMPARED, LOGITS_SAMPLED, LOGITS_TRAINED, LOGITS_WIDENED = 20, 32, 10, 16
"""Bytes for an entry of the vocabulary at a position: two distributions and their difference in float64; labels sampled
from one and the way back; a loss between two and its gradient, all in 16 bits, and what of it is in float32, which is
one chunk of linalg/divergence.py at most."""
KEPT = 3
"""Bytes kept for the way back for every number that a layer reads or writes."""
NOT_GIVEN_BACK = 0.5
"""Share of the memory of earlier stages that an allocator still holds when the models are judged (seen on CPUs)."""


class Peak(NamedTuple):
    """Bytes on the host and, where the work is done there, on the GPU (else 0)."""

    host: int
    gpu: int


def peak_memory_of(method: Method, sizes: Sizes, total: int, *, on_gpu: bool) -> tuple[Peak, dict[str, int]]:
    """The peak, and what each stage holds beside what the process has at the start.

    `total` counts the numbers of the whole model.
    """
    dense = 4 * total
    before = {
        "calibrate": _calibration(method, sizes, on_gpu),
        "learn": _learning(method, sizes, on_gpu),
        "recover": recovery(sizes),
    }
    spectra = spectra_bytes(sizes.walk) if isinstance(method, LayerMethod) else 0
    kept = spectra if on_gpu else max(spectra, int(NOT_GIVEN_BACK * max(before.values())))
    stages = {stage: dense + own for stage, own in (*before.items(), ("evaluate", kept + judging(sizes)))}
    most = max(stages.values())
    start = resident() + TEXT_BYTES
    if on_gpu:  # the weights pass through the host, and the result is written from it
        return Peak(start + 2 * sizes.bytes_read, most), stages
    return Peak(start + most, 0), stages


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def activations(sizes: Sizes, windows: int) -> int:
    """What a pass keeps for the way back."""
    numbers = sum(3 * la.outputs + la.inputs for la in sizes.walk.layers)
    return windows * sizes.length * numbers * KEPT


def vocabulary(sizes: Sizes, windows: int, entry_bytes: int) -> int:
    """Over all positions of so many windows."""
    return windows * sizes.length * sizes.vocabulary * entry_bytes


def trained_vocabulary(sizes: Sizes, windows: int) -> int:
    """The same of a training step that compares two models."""
    entries = windows * sizes.length * sizes.vocabulary
    return LOGITS_TRAINED * entries + LOGITS_WIDENED * min(entries, CHUNK_NUMBERS)


def _statistics(method: Method, sizes: Sizes) -> int:
    """Of the first round, and of the second with the mean of both where there is one."""
    walk = sizes.walk
    rounds = 3 if isinstance(method, LayerMethod) and method.rounds and sizes.keep < 1 else 1
    held = 0
    if Stat.GRAM in method.needs:
        held += sum(inputs**2 for block in distinct_inputs(walk) for inputs in block)
    if Stat.OUTPUT_GRAD in method.needs:
        held += sum(la.outputs**2 for la in walk.layers)
    if method.needs & {Stat.FISHER, Stat.SLOPE}:
        held += sizes.weights
    return 8 * held * rounds


def _calibration(method: Method, sizes: Sizes, on_gpu: bool) -> int:
    """Statistics, spectra, one batch."""
    walk, batch = sizes.walk, min(GPU_BATCH if on_gpu else CPU_BATCH, sizes.windows)
    held = _statistics(method, sizes)
    if method.refinement is not None:  # each layer's own sums in float64, inverses in float32
        held += 8 * sum(la.inputs**2 + la.outputs**2 for la in walk.layers)
        held += 4 * sum(la.outputs**2 for la in walk.layers)
        held += 4 * sum(inputs**2 for block in distinct_inputs(walk) for inputs in block)
    spectra = spectra_bytes(sizes.walk) if isinstance(method, LayerMethod) else 0
    if not method.needs:
        return spectra
    if method.needs & GRADIENT_STATS:
        return held + spectra + activations(sizes, batch) + vocabulary(sizes, batch, LOGITS_SAMPLED)
    return held + spectra + vocabulary(sizes, batch, 4)


def _learning(method: Method, sizes: Sizes, on_gpu: bool) -> int:
    """Components in float32 beside the spectra they come from; activations of both models' batch.

    Newton steps come before the statistics and the spectra that were propagated are let go.
    """
    spectra = spectra_bytes(sizes.walk) if isinstance(method, LayerMethod) else 4 * 4 * sizes.weights
    held = spectra * 3 // 2
    if isinstance(method, LearnedMethod) and not method.steps and method.newton_steps:
        windows = min(GPU_BATCH if on_gpu else CPU_BATCH, sizes.gradient_windows)
        held += 2 * spectra + _statistics(method, sizes)
    elif isinstance(method, TrainedMethod | TrainedModelMethod) and method.steps:
        windows = method.batch_size
    else:
        return 0
    return held + activations(sizes, windows) + trained_vocabulary(sizes, windows)


def recovery(sizes: Sizes) -> int:
    """Factors with gradient and two moments, roots of their metric, a batch."""
    if not any(step.steps for step in sizes.steps):
        return 0
    factors = 4 * 4 * int(sizes.weights * sizes.keep)
    batch = activations(sizes, RECOVERY_BATCH)
    needed = 0
    for step in sizes.steps:
        if step.name == "kl":
            roots = 16 * sum(la.inputs**2 + la.outputs**2 for la in sizes.walk.layers)
            needed = max(needed, roots + batch + trained_vocabulary(sizes, RECOVERY_BATCH))
        elif step.steps is not None:  # inputs of a block in both models and its targets, activations of one block
            stream = 3 * 4 * min(MOST_WINDOWS, step.steps * RECOVERY_BATCH) * sizes.length * sizes.hidden
            needed = max(needed, stream + batch // max(1, len(sizes.walk.block_names)))
    return factors + needed


def judging(sizes: Sizes) -> int:
    """The compressed model beside the dense one, and both distributions of a batch."""
    windows = min(EVALUATED, sizes.eval_windows)
    return int(4 * sizes.weights * sizes.keep) + vocabulary(sizes, windows, LOGITS_COMPARED)
