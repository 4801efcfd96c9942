"""The most memory of a run: what is alive in each stage, in bytes; the largest stage decides.

On a CPU it starts from what this process holds already (Python, torch, transformers); on a GPU that is on the host.
Statistics and spectra are float64, weights float32, logits float32 and several of them at a time.
"""

import os
from pathlib import Path
from typing import NamedTuple

from spectrim.engines.pipeline import CPU_BATCH, GPU_BATCH
from spectrim.engines.plan_time import Sizes
from spectrim.method import LayerMethod, LearnedMethod, Method, TrainedMethod
from spectrim.model_method import TrainedModelMethod
from spectrim.options import RECOVERY_BATCH
from spectrim.stats import GRADIENT_STATS, Stat

TEXT_BYTES = 95 * 2**20
"""Text and tokens of `builtin:stdlib`, tokenizer included."""
EVALUATED = 16
"""Windows at a time when a model is judged (evaluate/language.py)."""
LOGITS_COMPARED, LOGITS_SAMPLED, LOGITS_TRAINED = 20, 24, 24
"""Bytes for an entry of the vocabulary at a position: two distributions and their difference in float64; labels sampled
from one and the way back; a loss between two and the way back."""
KEPT = 6
"""Bytes kept for the way back for every number that a layer reads or writes."""


class Peak(NamedTuple):
    """Bytes on the host and, where the work is done there, on the GPU (else 0)."""

    host: int
    gpu: int


def peak_memory_of(method: Method, sizes: Sizes, total: int, *, on_gpu: bool) -> tuple[Peak, dict[str, int]]:
    """The peak, and what each stage holds beside what the process has at the start.

    `total` counts the numbers of the whole model.
    """
    dense = 4 * total
    stages = {
        stage: dense + extra
        for stage, extra in (
            ("calibrate", _calibration(method, sizes, on_gpu)),
            ("learn", _learning(method, sizes)),
            ("recover", _recovery(sizes)),
            ("evaluate", _judging(sizes)),
        )
    }
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


def _spectra(sizes: Sizes) -> int:
    """All components of all layers."""
    return 8 * sum(min(la.outputs, la.inputs) * (la.outputs + la.inputs) for la in sizes.walk.layers)


def _activations(sizes: Sizes, windows: int) -> int:
    """What a pass keeps for the way back."""
    numbers = sum(3 * la.outputs + la.inputs for la in sizes.walk.layers)
    return windows * sizes.length * numbers * KEPT


def _vocabulary(sizes: Sizes, windows: int, entry_bytes: int) -> int:
    return windows * sizes.length * sizes.vocabulary * entry_bytes


def _calibration(method: Method, sizes: Sizes, on_gpu: bool) -> int:
    """Statistics of two rounds, spectra, one batch."""
    walk, batch = sizes.walk, min(GPU_BATCH if on_gpu else CPU_BATCH, sizes.windows)
    rounds = 2 if isinstance(method, LayerMethod) and method.rounds and sizes.keep < 1 else 1
    shared = {(la.block, la.inputs) for la in walk.layers}
    held = 0
    if Stat.GRAM in method.needs:
        held += 8 * sum(inputs**2 for _, inputs in shared)
    if Stat.OUTPUT_GRAD in method.needs:
        held += 8 * sum(la.outputs**2 for la in walk.layers)
    if method.needs & {Stat.FISHER, Stat.SLOPE}:
        held += 8 * sizes.weights
    held *= rounds
    if method.refinement is not None:  # each layer's own sums in float64, inverses in float32
        held += 8 * sum(la.inputs**2 + la.outputs**2 for la in walk.layers)
        held += 4 * sum(la.outputs**2 for la in walk.layers) + 4 * sum(inputs**2 for _, inputs in shared)
    spectra = _spectra(sizes) if isinstance(method, LayerMethod) else 0
    if not method.needs:
        return spectra
    if method.needs & GRADIENT_STATS:
        return held + spectra + _activations(sizes, batch) + _vocabulary(sizes, batch, LOGITS_SAMPLED)
    return held + spectra + _vocabulary(sizes, batch, 4)


def _learning(method: Method, sizes: Sizes) -> int:
    """Components in float32 beside the spectra they come from; activations of both models' batch."""
    if isinstance(method, LearnedMethod) and not method.steps and method.newton_steps:
        windows = min(CPU_BATCH, sizes.gradient_windows)
    elif isinstance(method, TrainedMethod | TrainedModelMethod) and method.steps:
        windows = method.batch_size
    else:
        return 0
    spectra = _spectra(sizes) if isinstance(method, LayerMethod) else 4 * 4 * sizes.weights
    return spectra * 3 // 2 + _activations(sizes, windows) + _vocabulary(sizes, windows, LOGITS_TRAINED)


def _recovery(sizes: Sizes) -> int:
    """Factors with gradient and two moments, roots of their metric, a batch."""
    if not any(step.steps for step in sizes.steps):
        return 0
    roots = 16 * sum(la.inputs**2 + la.outputs**2 for la in sizes.walk.layers)
    factors = 4 * 4 * int(sizes.weights * sizes.keep)
    logits = any(step.name == "kl" for step in sizes.steps)
    batch = _activations(sizes, RECOVERY_BATCH) + (_vocabulary(sizes, RECOVERY_BATCH, LOGITS_TRAINED) if logits else 0)
    return roots + factors + batch if logits else factors + batch // max(1, len(sizes.walk.block_names))


def _judging(sizes: Sizes) -> int:
    """The compressed model beside the dense one, and both distributions of a batch."""
    windows = min(EVALUATED, sizes.eval_windows)
    return int(4 * sizes.weights * sizes.keep) + _vocabulary(sizes, windows, LOGITS_COMPARED)
