"""What a run would do, without touching a weight: shapes, ranks where they follow, numbers, bytes, disk, memory, time.

    numbers, bytes    from the shapes, as the files will count them          here
    memory            what is alive in each stage                            engines/plan_memory.py
    seconds           operations over the rates of this machine              engines/plan_time.py, machine.py

How near that is to what then happens is measured by benchmarks/plan_accuracy.py.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from spectrim.engines.gradient_windows import default_gradient_windows
from spectrim.engines.low_memory_way import LowMemory, limit_of, low_memory_method, low_memory_of
from spectrim.engines.masked import budget_of
from spectrim.engines.passes import Passes, clock_passes, facts_of
from spectrim.engines.plan_costs import Sizes
from spectrim.engines.plan_large import large_peak_of
from spectrim.engines.plan_layers import own_work
from spectrim.engines.plan_memory import Peak, peak_memory_of
from spectrim.engines.plan_spread import Part, check_part, part_of, told_of
from spectrim.engines.plan_time import seconds_by_stage
from spectrim.engines.quantise_factors import group_of
from spectrim.engines.ranks import new_bias, plan_ranks
from spectrim.engines.recompute import step_bytes
from spectrim.engines.run import calibration_batch
from spectrim.engines.way import Way, way_of
from spectrim.linalg.bits import Account, bias_account, uniform_account
from spectrim.machine import Rates, measure_rates, start_seconds
from spectrim.memory import fits_whole, held_dtype, memory_capped, total_memory
from spectrim.method import LayerMethod, MaskedMethod, Method
from spectrim.model_method import ModelMethod
from spectrim.models.load import Source, context_length, meta_model
from spectrim.models.walk import Layer, Walk, find_layers
from spectrim.options import RECOVERY_BATCH, recovery_of
from spectrim.replacement import Target, stored_numbers
from spectrim.request import Request
from spectrim.windows_in_use import training_windows

DOCUMENTS = (8_000, 700)
"""Bytes of headers, report, card and manifest: of any result, and for each layer."""


UNCOUNTED = "peak memory is not known: block by block, runs for all sizes or with masks are not counted yet"


UNCLOCKED = "time follows from rates alone: no passes of this model were clocked"


UNREAD = "seconds are those of the work alone: what --low-memory reads from disk and writes there comes on top"


class Stored(NamedTuple):
    """What the linear layers take: numbers as `keep` counts them, elements and bytes in the file."""

    numbers: int | None
    elements: int | None
    nbytes: int


def estimate(
    source: Source,
    method: Method,
    request: Request,
    *,
    dtype: torch.dtype,
    device: torch.device,
    companions: int = 0,
    rates: Rates | None = None,
    clock: bool = True,
    part: Part = Part(),
) -> dict[str, Any]:
    """The plan as a dict; `rank` is None where it depends on what calibration will measure.

    `request` is settled (byte_budget.py): its `keep` is what a budget in bytes leaves. `companions` are the bytes of
    the files that are copied beside the weights. `rates` are measured where they are not given; with `clock`, passes
    of one block of this model too (passes.py). `part` is whose work is planned, where several share it.
    """
    model = meta_model(source.config)
    walk = find_layers(model)
    way = _way(request, device, walk, method)
    method = way.method
    layers, known = planned_layers(source, method, request, walk)
    stored = stored_by(method, request, walk, layers, dtype, known)
    rest = untargeted_numbers(model, walk)
    bytes_after = rest * dtype.itemsize + stored.nbytes
    total = sum(p.numel() for p in model.parameters())
    sizes = sizes_of(source, method, request, walk, bytes_after, device, whole=way.whole)
    check_part(part, request, method, sizes)
    number = held_dtype(device, source.dtype, source.checkpoint.numel).itemsize
    sizes = part_of(sizes, part, request, method, number=number, device=device)
    told, said = told_of(part, sizes, method)
    asked = partial(_memory, request, way, sizes, total, device, source)
    memory = None if device.type == "cuda" else asked()  # before clocking leaves its own memory behind
    start = start_seconds(device)  # before anything is clocked
    rates = measure_rates(device, common_side(walk)) if rates is None else rates
    passes = clocked(source, sizes, total, device) if clock else UNCLOCKED
    only = None if isinstance(passes, str) else passes
    own = own_work(method, request, walk, device) if clock else None
    layers_clocked = None if isinstance(own, str) else own
    # Of a GPU after that: what CUDA's libraries take of the host is then there, as in the run.
    peak, stages, scratch = asked() if memory is None else memory
    seconds, time_known = seconds_by_stage(method, sizes, rates, only, layers_clocked, start=start)
    return {
        "model": source.name,
        "method": method.to_config(),
        "keep": request.keep,
        "any_size": request.any_size,
        "recovery": [str(step) for step in sizes.steps],
        "factor_bits": request.factor_bits,
        "layers": layers,
        "ranks_known": known,
        "untouched": [{"name": n, "numbers": k, "why": why} for n, k, why in walk.untouched],
        "linear_numbers": {"before": walk.numbers, "after": stored.numbers},
        "linear_bytes": {"before": walk.numbers * source.dtype.itemsize, "after": stored.nbytes},
        "model_numbers": {
            "before": source.checkpoint.numel,
            "after": None if stored.elements is None else rest + stored.elements,
        },
        "model_bytes": {"before": source.checkpoint.nbytes, "after": bytes_after},
        "disk_bytes": bytes_after + companions + DOCUMENTS[0] + DOCUMENTS[1] * len(walk.layers),
        "scratch_bytes": scratch,
        "way": "low memory" if request.low_memory else "at once" if way.whole else "block by block",
        "notes": [
            *way.warnings,
            *said,
            *([] if peak else [UNCOUNTED]),
            *([UNREAD] if request.low_memory else []),
            *([passes] if isinstance(passes, str) else []),
            *([f"no time is given: {own}"] if isinstance(own, str) else []),
        ],
        "peak_memory_bytes": peak and {"host": peak.host, **({"gpu": peak.gpu} if peak.gpu else {})},
        "memory_by_stage": stages,
        "seconds": sum(seconds.values()) if time_known else None,
        "seconds_by_stage": seconds,
        "rates": dataclasses.asdict(rates),
        "passes": facts_of(only),
        "device": str(device),
        **told,
    }


def _way(request: Request, device: torch.device, walk: Walk, method: Method) -> Way:
    """How the run will go."""
    if request.low_memory:
        return Way(False, *low_memory_method(request, method))
    return way_of(device, walk, method, request.options)


def low_memory_bytes(method: Method, source: Source, sizes: Sizes, total: int, device: torch.device) -> LowMemory:
    """What a run with `--low-memory` takes; `total` counts the numbers of the whole model."""
    assert isinstance(method, LayerMethod)
    limit = limit_of(device)
    with memory_capped(limit):
        number = held_dtype(device, source.dtype, source.checkpoint.numel).itemsize
    return low_memory_of(method, sizes, total, number=number, limit=limit)


class Memory(NamedTuple):
    """The peak and what each stage holds, and what lies in scratch files; None and no stages where it is not known."""

    peak: Peak | None
    stages: dict[str, int]
    scratch: int = 0


def _memory(request: Request, way: Way, sizes: Sizes, total: int, device: torch.device, source: Source) -> Memory:
    """By the way that the run will take."""
    if request.low_memory:
        gpu, host, scratch, _ = low_memory_bytes(way.method, source, sizes, total, device)
        return Memory(Peak(host, gpu), {}, scratch)
    if way.whole:
        return Memory(*peak_memory_of(way.method, sizes, total, on_gpu=device.type != "cpu"))
    gpu = total_memory(device)
    assert gpu is not None  # all else goes at once
    assert isinstance(way.method, LayerMethod)
    found = large_peak_of(way.method, sizes, total, gpu=gpu, stored=source.dtype.itemsize)
    return Memory(None, {}) if found is None else Memory(*found)


def clocked(source: Source, sizes: Sizes, total: int, device: torch.device) -> Passes | str:
    """Passes of one block of the model on the device; what is to be said where there are none."""
    given = {"windows": sizes.batch, "length": sizes.length, "numbers": total}
    found = clock_passes(source.config, sizes.walk, device, **given)
    return f"{UNCLOCKED}: {found}" if isinstance(found, str) else found


def common_side(walk: Walk) -> int:
    """The rows of the eigenproblem that most layers have."""
    sides = [min(layer.outputs, layer.inputs) for layer in walk.layers]
    return max(set(sides), key=sides.count)


def planned_layers(source: Source, method: Method, request: Request, walk: Walk) -> tuple[list[dict[str, Any]], bool]:
    """One row a layer, and whether ranks follow from the shapes."""
    if isinstance(method, ModelMethod):
        method.check_model(source.config, walk, request.keep)
        return _unplanned(walk, _codecs(method)), False
    assert isinstance(method, LayerMethod)
    if request.any_size:
        return _unplanned(walk, "nested"), False
    known = method.allocation == "uniform" and not (isinstance(method, MaskedMethod) and method.steps)
    known = known and not method.shares  # which layers read one input is seen when the model runs
    rows = _planned(method, walk, request.keep) if known else _unplanned(walk, _may_be(method))
    if request.factor_bits is None:
        return rows, known
    coded = {"factor": "quantised-factor", "pivot": "quantised-pivot", "dense": "packed"}
    return [{**row, "codec": coded[row["codec"]]} for row in rows], known


def stored_by(
    method: Method,
    request: Request,
    walk: Walk,
    layers: list[dict[str, Any]],
    dtype: torch.dtype,
    known: bool,
) -> Stored:
    """What all linear layers will take in the file; a budget in full where ranks are not known."""
    if request.any_size:
        return all_sizes(walk, method, request.anchors, dtype)
    budget = budget_of(method, walk, request.keep)
    if isinstance(method, ModelMethod):
        after = method.stored(walk, budget)
        if method.budget_unit == "bytes":
            return Stored(None, None, after)
        return Stored(after, after, after * dtype.itemsize)
    assert isinstance(method, LayerMethod)
    after = sum(row["numbers"] for row in layers) if known else budget + walk.numbers - sum_weights(walk)
    if request.factor_bits is not None:
        account = sum((_in_bits(row, layer, request) for row, layer in zip(
            _planned(method, walk, request.keep), walk.layers, strict=True)), Account())  # fmt: skip
        codes = account.codes + account.zeros + account.indices
        values = (account.scales + account.bias) // 2
        return Stored(after, codes + values, codes + values * dtype.itemsize)
    masks = sum((row["shape"][0] + 7) // 8 for row in layers if known and row["codec"] == "pivot")  # one byte each
    return Stored(after, after, (after - masks) * dtype.itemsize + masks)


def all_sizes(walk: Walk, method: Method, anchors: tuple[float, ...], dtype: torch.dtype) -> Stored:
    """All components and adapters of all layers, the size at which each one goes, and their scores at each anchor."""
    adapter = method.adapter_rank if isinstance(method, MaskedMethod) and method.steps else 0
    ranks = [min(la.outputs, la.inputs) + adapter for la in walk.layers]
    pairs = list(zip(ranks, walk.layers, strict=True))
    values = sum(rank * (la.outputs + la.inputs) + la.numbers - la.weight_numbers for rank, la in pairs)
    marks = sum(rank * (1 + 1 + len(anchors)) for rank in ranks)
    return Stored(values, values + marks, values * dtype.itemsize + 4 * marks)


def sizes_of(
    source: Source, method: Method, request: Request, walk: Walk, bytes_after: int, device: torch.device, *, whole: bool
) -> Sizes:
    """What time and memory depend on."""
    told = source.config.get_text_config()
    windows = request.statistics_windows
    gradients = request.gradient_windows or default_gradient_windows(windows, device, request.calib_length)
    length = min(request.calib_length, context_length(source.config) or request.calib_length)
    return Sizes(
        walk=walk,
        hidden=told.hidden_size,
        vocabulary=told.vocab_size,
        keep=request.keep,
        windows=windows,
        gradient_windows=min(windows, gradients),
        length=length,
        eval_windows=0 if request.eval == "none" else request.eval_windows,
        bytes_read=source.checkpoint.nbytes,
        bytes_written=bytes_after,
        training_windows=training_windows(request, method),
        builtin_text=request.calib.startswith("builtin:"),
        batch=calibration_batch(device, length),
        steps=recovery_of(method, request.recover),
        factor_bits=request.factor_bits,
        any_size=request.any_size,
        anchors=request.anchors if request.any_size else (),
        any_size_steps=request.any_size_steps,
        by_blocks=not whole,
        samples=not request.low_memory,
        recomputed=not fits_whole(device, step_bytes(walk, length * getattr(method, "batch_size", RECOVERY_BATCH))),
    )


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


def _may_be(method: LayerMethod) -> str:
    """What its layers may become, in few words."""
    return method.alone if not method.shares else f"{method.alone} or shared{'-pivot' * (method.alone == 'pivot')}"


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


def _in_bits(row: Mapping[str, Any], layer: Layer, request: Request) -> Account:
    """A layer's parts in codes, as engines/quantise_factors.py stores them."""
    bits, outputs, inputs, rank = request.factor_bits, layer.outputs, layer.inputs, row["rank"]
    assert bits is not None
    parts = {
        "factor": [(rank, inputs), (outputs, rank)],
        "pivot": [(rank, inputs), (outputs - rank, rank)],
        "dense": [(outputs, inputs)],
    }[row["codec"]]
    found = bias_account(outputs, bias=layer.has_bias)
    for rows, columns in parts:
        size = group_of(columns, request.factor_group_size)
        found += uniform_account(rows, columns, bits, size, symmetric=False)
    return found + Account(indices=(outputs + 7) // 8 if row["codec"] == "pivot" else 0)
