"""The most memory of a run: what is alive in each stage, in bytes; the largest stage decides.

On a CPU it starts from what this process holds already (Python, torch, transformers); on a GPU that is on the host,
and what a run has there beyond a plan that has clocked the same device comes on top.
Statistics and spectra are float64, weights float32, logits float32 and several of them at a time.
"""

import os
from pathlib import Path
from typing import NamedTuple

from spectrim.engines.block import MOST_WINDOWS
from spectrim.engines.plan_costs import Sizes, distinct_inputs
from spectrim.engines.run import CPU_BATCH, GPU_BATCH
from spectrim.engines.way import spectra_bytes
from spectrim.evaluate.language import WINDOWS
from spectrim.linalg.divergence import CHUNK_NUMBERS
from spectrim.method import LayerMethod, LearnedMethod, MaskedMethod, Method, TrainedMethod
from spectrim.model_method import TrainedModelMethod
from spectrim.options import RECOVERY_BATCH
from spectrim.stats import GRADIENT_STATS, Stat

TEXT_BYTES = 150 * 2**20
"""Text and tokens of `builtin:stdlib`, the tokenizer, and modules that a run imports and a plan does not."""
EVALUATED = WINDOWS
"""Windows at a time when a model is judged."""
LOGITS_COMPARED, LOGITS_TRAINED, LOGITS_WIDENED = 20, 10, 16
"""Bytes for an entry of the vocabulary at a position: two distributions and their difference in float64; a loss between
two and its gradient, all in 16 bits, and what of it is in float32, one chunk of linalg/divergence.py at most."""
LOGITS_SAMPLED, KEPT = {"cpu": 32, "cuda": 20}, {"cpu": 3.0, "cuda": 1.02}
"""For an entry of the vocabulary, labels sampled and the way back; and what is kept for the way back for every number
that a layer reads or writes. A GPU's attention keeps no scores, and its allocator uses again what was let go."""
NOT_GIVEN_BACK = 0.5
"""Share of the memory of earlier stages that an allocator still holds when the models are judged (seen on CPUs)."""
KERNEL_BYTES, MOST_KERNELS = int(0.45 * 2**20), 1024
"""On a CPU: what its library (oneDNN) compiles for a product of a shape that it has not met, and of how many shapes it
keeps that at a time."""

DECOMPOSED_BYTES, BACK_BYTES = 350 * 2**20, 220 * 2**20
"""On the host of a GPU, beyond what a plan holds there once it has clocked passes and eigenvalues: of a run that
decomposes weights, and more of one that goes back for gradients. Fitted to one run each on an H200 (docs/plan.md): what
torch and CUDA's libraries keep, whatever the model. Which of them does has not been looked into."""


class Peak(NamedTuple):
    """Bytes on the host and, where the work is done there, on the GPU (else 0)."""

    host: int
    gpu: int


def kind_of(on_gpu: bool) -> str:
    """The key of constants that depend on it."""
    return "cuda" if on_gpu else "cpu"


def peak_memory_of(method: Method, sizes: Sizes, total: int, *, on_gpu: bool) -> tuple[Peak, dict[str, int]]:
    """The peak, and what each stage holds beside what the process has at the start.

    `total` counts the numbers of the whole model.
    """
    dense = 4 * total
    before = {
        "calibrate": _calibration(method, sizes, on_gpu),
        "learn": _learning(method, sizes, on_gpu),
        "recover": recovery(sizes, on_gpu=on_gpu),
    }
    if sizes.task:
        before = {"calibrate": before["calibrate"]}
    compiled = {} if on_gpu else kernels(method, sizes)
    spectra = spectra_bytes(sizes.walk) if isinstance(method, LayerMethod) else 0
    kept = spectra if on_gpu else max(spectra, int(NOT_GIVEN_BACK * max(before.values())))
    stages = {
        stage: dense + own + compiled.get(stage, 0)
        for stage, own in (*before.items(), *([] if sizes.task else [("evaluate", kept + judging(sizes))]))
    }
    most = max(stages.values())
    start = resident() + TEXT_BYTES
    if on_gpu:  # the weights pass through the host, and the result is written from it
        return Peak(start + 2 * sizes.bytes_read + beside_a_gpu(method, sizes), most), stages
    return Peak(start + most, 0), stages


def beside_a_gpu(method: Method, sizes: Sizes) -> int:
    """Bytes of the host that a run on a GPU takes for what it does there, and a plan does not do."""
    decomposes = isinstance(method, LayerMethod) and not sizes.task
    scored = isinstance(method, LearnedMethod) and method.newton_steps > 0
    learns = scored or method.windows_trained > 0 or any(step.steps for step in sizes.steps)
    goes_back = bool(method.needs & GRADIENT_STATS) or (learns and not sizes.task)
    return decomposes * DECOMPOSED_BYTES + goes_back * BACK_BYTES


def resident() -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def kernels(method: Method, sizes: Sizes) -> dict[str, int]:
    """What a CPU's library has compiled by the end of each stage: of a pass there and back three products a weight.

    Of ranks that differ from layer to layer every product has a shape of its own; weights that are formed or unpacked
    have the shapes of the dense ones. Every stage passes other numbers of tokens at a time.
    """
    dense = len({(la.outputs, la.inputs) for la in sizes.walk.layers}) + 1
    small, rounds, newton = dense, 0, False
    if isinstance(method, LayerMethod):
        uniform = method.allocation == "uniform" and not isinstance(method, MaskedMethod)
        small = 2 * (dense if uniform else len(sizes.walk.layers))
        rounds = method.rounds * (sizes.middles if sizes.any_size else 1) if sizes.keep < 1 else 0
        newton = isinstance(method, LearnedMethod) and method.newton_steps > 0
    back = 3 if method.needs & GRADIENT_STATS else 1
    met = {"calibrate": (dense + rounds * small) * back if method.needs else 0}
    met["learn"] = met["calibrate"] + (dense * 3 if newton or method.windows_trained else 0)
    met["learn"] += small if isinstance(method, LayerMethod) and method.error_share > 0 else 0
    met["recover"] = met["learn"] + sum(3 * small for step in sizes.steps if step.steps)
    sizes_judged = len(sizes.anchors) if sizes.any_size else 1
    met["evaluate"] = met["recover"] + 2 * dense + (sizes_judged + 1) * small
    return {stage: KERNEL_BYTES * min(count, MOST_KERNELS) for stage, count in met.items()}


def activations(sizes: Sizes, windows: int, *, kept: float = KEPT["cpu"]) -> int:
    """What a pass keeps for the way back, `kept` bytes a number."""
    numbers = sum(3 * la.outputs + la.inputs for la in sizes.walk.layers)
    return int(windows * sizes.length * numbers * kept)


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
    return int(8 * held * (1 + (rounds - 1) / sizes.world))  # the first sums and the mean are of a process's own layers


def _calibration(method: Method, sizes: Sizes, on_gpu: bool) -> int:
    """Statistics, spectra, one batch."""
    walk, batch = sizes.walk, min(GPU_BATCH if on_gpu else CPU_BATCH, sizes.windows)
    held = _statistics(method, sizes)
    if method.refinement is not None:  # each layer's own sums in float64, inverses in float32
        held += 8 * sum(la.inputs**2 + la.outputs**2 for la in walk.layers)
        held += 4 * sum(la.outputs**2 for la in walk.layers)
        held += 4 * sum(inputs**2 for block in distinct_inputs(walk) for inputs in block)
    spectra = spectra_bytes(sizes.walk) // sizes.world if isinstance(method, LayerMethod) and not sizes.task else 0
    if not method.needs:
        return spectra
    if method.needs & GRADIENT_STATS:
        kind = kind_of(on_gpu)
        passing = activations(sizes, batch, kept=KEPT[kind]) + vocabulary(sizes, batch, LOGITS_SAMPLED[kind])
        return held + spectra + passing
    return held + spectra + vocabulary(sizes, batch, 4)


def _learning(method: Method, sizes: Sizes, on_gpu: bool) -> int:
    """Components in float32 beside the spectra they come from; activations of both models' batch.

    Newton steps come before the statistics and the spectra that were propagated are let go.
    """
    spectra = spectra_bytes(sizes.walk) if isinstance(method, LayerMethod) else 4 * 4 * sizes.weights
    held = spectra + spectra // 2 // (sizes.world if sizes.sharded else 1)
    if isinstance(method, LearnedMethod) and not method.steps and method.newton_steps:
        windows = min(GPU_BATCH if on_gpu else CPU_BATCH, sizes.gradient_windows)
        held += 2 * spectra + _statistics(method, sizes)
    elif isinstance(method, TrainedMethod | TrainedModelMethod) and method.steps:
        windows = -(-method.batch_size // sizes.world)
    else:
        return 0
    return held + activations(sizes, windows, kept=KEPT[kind_of(on_gpu)]) + trained_vocabulary(sizes, windows)


def recovery(sizes: Sizes, *, on_gpu: bool) -> int:
    """Factors with gradient and two moments, roots of their metric, a batch."""
    if not any(step.steps for step in sizes.steps):
        return 0
    factors = 4 * 4 * int(sizes.weights * sizes.keep)
    batch = activations(sizes, RECOVERY_BATCH, kept=KEPT[kind_of(on_gpu)])
    needed = 0
    for step in sizes.steps:
        if step.name == "kl":
            roots = 16 * sum(la.inputs**2 + la.outputs**2 for la in sizes.walk.layers)
            needed = max(needed, roots + batch + trained_vocabulary(sizes, RECOVERY_BATCH))
        elif step.steps is not None:  # inputs of a block in both models and its targets, activations of one block
            stream = 3 * 4 * min(MOST_WINDOWS, step.steps * RECOVERY_BATCH) * sizes.length * sizes.hidden
            needed = max(needed, stream + batch // max(1, len(sizes.walk.block_names)))
    return factors + needed


def judging(sizes: Sizes, number: int = 4) -> int:
    """The compressed model beside the dense one, numbers of so many bytes, and both distributions of a batch."""
    windows = min(EVALUATED, sizes.eval_windows)
    return int(number * sizes.weights * sizes.keep) + vocabulary(sizes, windows, LOGITS_COMPARED)
