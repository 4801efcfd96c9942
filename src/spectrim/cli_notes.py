"""What `compress` says before it begins: that a run will take long, where that is known from headers."""

from typing import TYPE_CHECKING

from spectrim.terminal import speaker, stderr

if TYPE_CHECKING:
    from spectrim.method import Method
    from spectrim.request import Request

OPERATIONS = 8.0
"""For a number of the model and a token of a training step: both models forward, one back to its inputs and weights."""
LONG = 1e13
"""Operations of a run that takes minutes: `balanced` was measured to do 8e10 of them a second on one core
(benchmarks/results/plan-accuracy-cpu.json, 10 steps of 8 windows of 128 tokens in 8.5 s)."""


def say_if_slow(request: "Request", method: "Method", *, quiet: bool) -> None:
    """One line on stderr where a run trains for long and no GPU does it; nothing where `quiet`, or of other ranks.

    Errors: those of `models.load.resolve` and `pick_device`, which the run itself would raise next.
    """
    if quiet or speaker():
        return
    from spectrim.windows_in_use import windows_by_stage

    windows = sum(windows_by_stage(request, method))
    if not windows:
        return
    from spectrim.models.load import pick_device, resolve

    if pick_device(request.device).type != "cpu":
        return
    numbers = resolve(request.model).checkpoint.numel
    if OPERATIONS * windows * request.calib_length * numbers >= LONG:
        stderr.print(
            f"note: this run trains on the CPU, {windows:,} windows of {request.calib_length} tokens with "
            f"{numbers:,} numbers, which takes long; --preset fast (of soco, the default method) trains nothing, and "
            "`spectrim plan` with the same flags says how long a run takes"
        )
