"""The most memory of a run that goes block by block (large.py): what is alive in each stage, in bytes.

    GPU     weights as they are held, one block's sums in float64, hidden states of all windows, spectra while there is
            room for them; while scores are learned, components and formed weights in 16 bits. Of the compressed model
            all blocks while it is measured, one in propagation and in Newton's step

Work beside what is kept (DECOMPOSING, PASSING, what a batch takes) is fitted to `fast` on 32 blocks of 7B shape
(docs/large-models.md), stage by stage.

    host    packed statistics and what of the spectra has no room on the GPU, in float32

Runs that train masks, or serve all sizes, are not counted: `large_peak_of` is then None.
"""

import math
from typing import NamedTuple

from spectrim.engines.measure_blocks import ONE_WAY, SPARE, kept_before
from spectrim.engines.newton import HELD_OUT
from spectrim.engines.plan_costs import Sizes, distinct_inputs
from spectrim.engines.plan_memory import (
    LOGITS_SAMPLED,
    TEXT_BYTES,
    Peak,
    activations,
    judging,
    recovery,
    resident,
    trained_vocabulary,
    vocabulary,
)
from spectrim.engines.run import GPU_BATCH, SHORT
from spectrim.engines.way import spectra_bytes
from spectrim.memory import SHELF_SHARE, WIDE_SHARE
from spectrim.method import LayerMethod, LearnedMethod
from spectrim.stats import GRADIENT_STATS, Stat

WORK_MATRICES = 10
"""Of the largest side, in float64, while a weight is decomposed beside the moments of its inputs in both models."""

DECOMPOSING = 5
"""The same without moments, beyond the room for spectra, of which some of this work was counted when it was filled."""

PASSING = 0.4
"""Of what a pass keeps for the way back, what one without a way back holds."""

FORMED = 10
"""Bytes for a weight of a scored layer: what it is added to, both factors and the sum in 16 bits, and a gradient."""


class _Held(NamedTuple):
    """What is there through most stages."""

    number: int  # bytes of a weight's number
    dense: int
    student: int
    room: int  # that spectra have on the GPU
    kept: int  # of it, once they are cut to their ranks


def large_peak_of(
    method: LayerMethod, sizes: Sizes, total: int, *, gpu: int, stored: int
) -> tuple[Peak, dict[str, int]] | None:
    """The peak and what each stage holds on a GPU of `gpu` bytes; None where it is not known.

    `total` counts the numbers of the whole model, `stored` the bytes of one in its files.
    """
    if sizes.any_size or (method.windows_trained and not isinstance(method, LearnedMethod)):
        return None
    number = 2 if stored == 2 and 4 * total > WIDE_SHARE * gpu else 4
    dense = number * total
    narrow = spectra_bytes(sizes.walk) // 2 // sizes.world  # of several processes each keeps those of its own layers
    room = 0 if method.windows_trained else min(narrow, max(0, int(SHELF_SHARE * gpu) - dense))
    # The student that is measured holds whole weights: it computes what the stored layers do.
    held = _Held(number, dense, number * sizes.weights, room, min(room, _components(method, sizes)))
    block = held.student // max(1, len(sizes.walk.block_names))
    stages = {
        "calibrate": dense + _calibration(method, sizes, held, int(SHELF_SHARE * gpu) - dense),
        "decompose": dense + room + DECOMPOSING * _matrix(sizes),
        "propagate": dense
        + block
        + held.kept
        + WORK_MATRICES * _matrix(sizes)
        + 2 * _states(sizes, sizes.gradient_windows, held),
        "learn": dense + _learning(method, sizes, held),
        "recover": dense + recovery(sizes, on_gpu=True),
        "encode": dense + held.kept + int(number * sizes.weights * sizes.keep),
        "evaluate": dense + held.kept + judging(sizes, number),
    }
    kept = _packed(method, sizes) + narrow - room
    return Peak(resident() + TEXT_BYTES + max(2 * sizes.bytes_read, kept), max(stages.values())), stages


def _states(sizes: Sizes, windows: int, held: _Held) -> int:
    """Hidden states between two blocks."""
    return windows * sizes.length * sizes.hidden * held.number


def _batch(sizes: Sizes, windows: int) -> int:
    return min(windows, max(1, GPU_BATCH * SHORT // max(SHORT, sizes.length)))


def _one_block(sizes: Sizes, windows: int, held: _Held) -> int:
    """What a pass of so many windows through one block keeps for the way back; in float32 it would be twice that of
    16 bits.
    """
    return activations(sizes, windows) * held.number // 4 // len(sizes.walk.block_names)


def _calibration(method: LayerMethod, sizes: Sizes, held: _Held, room: int) -> int:
    """The larger of both measurements; `room` for results is what the dense model leaves of it."""
    if not method.needs:
        return 0
    first = _measurement(method, sizes, held, sizes.windows, room)
    if not method.rounds or sizes.keep >= 1:
        return first
    # Again in the student, over the windows that give gradients.
    again = _measurement(method, sizes, held, sizes.gradient_windows, room - held.student)
    return max(first, held.student + again)


def _measurement(method: LayerMethod, sizes: Sizes, held: _Held, windows: int, room: int) -> int:
    """The larger of both ways through the blocks, beside the model: see measure_blocks.py, which keeps states."""
    walk = sizes.walk
    blocks = len(walk.block_names)
    steep = sizes.gradient_windows if method.needs & GRADIENT_STATS else 0
    batch = _batch(sizes, windows)
    state, states = _states(sizes, steep, held), _states(sizes, windows, held)
    stride = math.ceil(math.sqrt(blocks))
    fits = (room - states) // state - SPARE if steep and sizes.world == 1 else 0  # several keep what they must
    kept = len(kept_before(blocks, stride, fits)) if steep else 0
    inputs = 8 * max(sum(n**2 for n in block) for block in distinct_inputs(walk))
    only_forward = min(ONE_WAY * batch, windows - steep)
    passing = max(int(PASSING * _one_block(sizes, n, held)) for n in (batch, only_forward))
    there = inputs + states + kept * state + passing
    if not steep:
        return there
    outputs = dict.fromkeys(range(blocks), 0)
    full = bool(method.needs & {Stat.FISHER, Stat.SLOPE})
    for layer in walk.layers:
        outputs[layer.block] += 8 * (layer.outputs**2 + (layer.weight_numbers if full else 0))
    back = (max(kept, 2 * stride - 1) + 1) * state  # and the gradient
    at_loss = (kept + 2) * state + vocabulary(sizes, 1, LOGITS_SAMPLED["cuda"])
    return max(there, max(outputs.values()) + back + _one_block(sizes, batch, held), at_loss)


def _matrix(sizes: Sizes) -> int:
    """Of the largest side, in float64."""
    return 8 * max(max(la.outputs, la.inputs) ** 2 for la in sizes.walk.layers)


def _components(method: LayerMethod, sizes: Sizes) -> int:
    """Of all layers, in float32, at the rank at which each stores the share that is kept."""
    numbers = 0.0
    for layer in sizes.walk.layers:
        sides, stored = layer.outputs + layer.inputs, sizes.keep * layer.weight_numbers
        numbers += (sides - math.sqrt(sides**2 - 4 * stored)) / 2 * sides if method.storage == "pivot" else stored
    return int(4 * numbers)


def _learning(method: LayerMethod, sizes: Sizes, held: _Held) -> int:
    """Training: all components (all in 16 bits; for Newton of several processes the kept ones in 32), formed weights,
    inputs of all blocks of a batch. Newton of one process: see below.
    """
    if not isinstance(method, LearnedMethod) or not (method.steps or method.newton_steps):
        return 0
    steps = method.steps > 0
    if not steps and sizes.world == 1:
        return _newton(sizes, held)
    components = spectra_bytes(sizes.walk) // 4 if steps else int(4 * sizes.weights * sizes.keep)
    windows = -(-method.batch_size // sizes.world) if steps else _batch(sizes, sizes.gradient_windows)
    blocks = len(sizes.walk.block_names)
    anchors, gathered = 2 * sizes.weights, 0
    if sizes.sharded:  # a part of all, and two blocks whole: the one that runs and the one that is on its way
        gathered = 2 * (components + anchors + held.number * sizes.weights) // blocks
        components, anchors = components // sizes.world, anchors // sizes.world
        gathered -= held.number * sizes.weights * (sizes.world - 1) // sizes.world
    formed = anchors + 8 * sizes.weights // blocks + gathered
    passing = _states(sizes, windows * blocks, held) + activations(sizes, windows) // blocks
    return components + formed + passing + trained_vocabulary(sizes, windows)


def _newton(sizes: Sizes, held: _Held) -> int:
    """Kept components, one block's weights as they are formed (newton_blocks.py), states before twice as many blocks as
    lie between two kept ones, and a batch in one block or at the loss.
    """
    blocks = len(sizes.walk.block_names)
    steep = sizes.gradient_windows - max(1, sizes.gradient_windows // HELD_OUT)
    windows = _batch(sizes, steep)
    states = 2 * math.ceil(math.sqrt(blocks)) * _states(sizes, steep, held)
    formed = FORMED * sizes.weights // blocks
    return held.kept + formed + states + max(_one_block(sizes, windows, held), trained_vocabulary(sizes, windows))


def _packed(method: LayerMethod, sizes: Sizes) -> int:
    """Statistics of all layers on the host: upper halves in float32."""
    held = 0
    if Stat.GRAM in method.needs:
        held += sum(n**2 for block in distinct_inputs(sizes.walk) for n in block)
    if Stat.OUTPUT_GRAD in method.needs:
        held += sum(la.outputs**2 for la in sizes.walk.layers)
    return (2 * held + (4 * sizes.weights if method.needs & {Stat.FISHER, Stat.SLOPE} else 0)) // sizes.world
