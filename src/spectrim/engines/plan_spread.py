"""What one of several processes (`plan --world N`), or one task of a job array (`plan --shard I/N`), does of a run.

Windows, rows of a batch and layers are shared out as the run shares them; exchanges between processes are not counted.
"""

import dataclasses
from typing import Any, NamedTuple

import torch

from spectrim.engines.measure_blocks import whole_bytes
from spectrim.engines.plan_costs import Sizes
from spectrim.engines.sharded import check_sharding, in_parts, learns_scores
from spectrim.engines.unspread import refuse_unspread
from spectrim.errors import UsageError
from spectrim.method import Method
from spectrim.request import Request
from spectrim.shard import Shard

ALONE_FLAGS = {"any_size": "--any-size", "low_memory": "--low-memory"}


class Part(NamedTuple):
    """What part of the work a plan is for: that of one of `world` processes, or of a job array's task or merge."""

    world: int = 1
    shard: Shard | None = None


def check_part(part: Part, request: Request, method: Method, sizes: Sizes) -> None:
    """UsageError for what several processes would refuse."""
    check_sharding(method, request.shard_weights, part.world)
    if part.world == 1:
        return
    flags = [flag for name, flag in ALONE_FLAGS.items() if getattr(request, name)]
    if part.shard is not None:
        flags.append("--shard")
    if flags:
        raise UsageError(
            f"--world {part.world}: {flags[0]} is not spread over several processes; leave one of the two out"
        )
    refuse_unspread(method, sizes.steps, request.factor_bits, sizes.windows, sizes.gradient_windows, part.world)


def part_of(sizes: Sizes, part: Part, request: Request, method: Method, *, number: int, device: torch.device) -> Sizes:
    """The sizes of a part; a dense `number` has so many bytes."""
    if part.shard is not None:
        task = part.shard.number is not None
        share = part.shard.of if task else 1
        return dataclasses.replace(
            sizes, windows=-(-sizes.windows // share), gradient_windows=-(-sizes.gradient_windows // share),
            text_windows=sizes.windows, shards=part.shard.of, task=task,
        )  # fmt: skip
    world = part.world
    if world == 1:
        return sizes
    shared = learns_scores(method) and in_parts(sizes.walk, number, device, request.shard_weights)
    return dataclasses.replace(
        sizes, windows=-(-sizes.windows // world), gradient_windows=-(-sizes.gradient_windows // world),
        eval_windows=-(-sizes.eval_windows // world), text_windows=sizes.windows, world=world, sharded=shared,
    )  # fmt: skip


def sums_of(sizes: Sizes, method: Method) -> int:
    """Bytes of the sums that a task leaves beside the output."""
    return whole_bytes(sizes.walk, method.needs)


def told_of(part: Part, sizes: Sizes, method: Method) -> tuple[dict[str, Any], list[str]]:
    """What is added to a plan's keys, and what is to be said."""
    if part.shard is not None:
        sums = sums_of(sizes, method)
        if not sizes.task:
            return {"shard": str(part.shard), "scratch_bytes": part.shard.of * sums}, [
                f"what {part.shard.of} tasks have measured takes {part.shard.of * sums:,} bytes beside OUT until then"
            ]
        return {"shard": str(part.shard), "disk_bytes": sums, "scratch_bytes": sums}, [
            "numbers and bytes are those of the result; memory, disk and time those of this task"
        ]
    if part.world == 1:
        return {}, []
    how = "in parts" if sizes.sharded else "whole on every one"
    weights = f"; frozen weights are {how} while scores are learned" if learns_scores(method) else ""
    return {"world": part.world, "weights_in_parts": sizes.sharded}, [
        f"memory is that of each of {part.world} processes{weights}; what they exchange is not in the time"
    ]
