"""Loss, gradients and their norm of one training step, recorded once on the GPU and replayed.

A small model's step is thousands of short kernels, and the GPU waits for Python to launch them: 60 to 100 ms a step
for 24 M parameters, of which it works for a third. A CUDA graph launches all of them at once. Values are those of the
same kernels; what changes between steps (batch, parameters, masks) must change in place.

Some steps cannot be recorded (an expert's tokens are counted on the host, memory does not suffice). They then run as
before, and the log says why; so do the first steps, in which libraries set themselves up.
"""

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import masking_utils

log = logging.getLogger(__name__)

EAGER_STEPS = 3
"""Steps that run as usual first: kernels are chosen and workspaces made in them."""


class Told(NamedTuple):
    """Detached loss and gradient norm of a step; the gradients are in the parameters."""

    loss: Tensor
    norm: Tensor


Compute = Callable[[Tensor], Told]


class Replay:
    """Computes steps; records one as soon as that is possible, and anew whenever `phase` changes."""

    def __init__(self, parameters: list[nn.Parameter], *, wanted: bool = True) -> None:
        self.parameters = parameters
        devices = {parameter.device for parameter in parameters}
        self.possible = wanted and len(devices) == 1 and next(iter(devices)).type == "cuda"
        self.phase: Hashable = None
        self.ran = 0
        self.recorded: _Recorded | None = None

    def __call__(self, compute: Compute, batch: Tensor, phase: Hashable) -> Told:
        """One step on `batch`; `phase` stands for whatever `compute` depends on beside living tensors.

        `compute` is not kept: it belongs to whoever owns this object, and the ring would hold on to GPU memory.
        """
        if phase != self.phase:
            self.phase, self.ran, self.recorded = phase, 0, None
        if self.possible and self.recorded is None and self.ran >= EAGER_STEPS:
            self._record(compute, batch)
        self.ran += 1
        if self.recorded is not None and self.recorded.batch.shape == batch.shape:
            return self.recorded.replay(batch)
        for parameter in self.parameters:
            parameter.grad = None
        with whole_windows():
            return compute(batch)

    def _record(self, compute: Compute, batch: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        try:
            with whole_windows():
                self.recorded = _Recorded(compute, self.parameters, batch)
        except Exception as error:  # whatever it is, the same step without recording shows it or does without
            self.possible = False
            torch.cuda.synchronize()
            log.info("training steps are not recorded, each kernel is launched alone: %s", error)


class _Recorded:
    """A step's kernels, with the memory they work in."""

    def __init__(self, compute: Compute, parameters: list[nn.Parameter], batch: Tensor) -> None:
        self.batch = batch.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.told = compute(self.batch)
        # A parameter that nothing reached has no gradient, now and in every replay.
        self.gradients = [(parameter, parameter.grad) for parameter in parameters]

    def replay(self, batch: Tensor) -> Told:
        self.batch.copy_(batch)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return Told(*(value.clone() for value in self.told))


@contextmanager
def whole_windows() -> Iterator[None]:
    """Tells transformers that every row of a batch is one sequence.

    It would look for packed sequences in the position ids, which waits for the GPU in every forward pass, and, while
    a step is recorded, would build a mask in place of the causal kernel. Our windows are whole and unpadded.
    """
    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:  # a version that does not look
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)
