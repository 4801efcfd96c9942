"""Block refinement: one block after another is trained to give what the dense model's block gives.

    x  hidden states before the block in the dense model, x' in the compressed one (all blocks before it refined)
    loss = mean || block(x) - block'(x') ||^2            over the block's factors, their biases, and its norms

AdamW 1e-4, weight decay 0.01, warm-up over 10 % of the steps, cosine to 10 %, gradients clipped at norm 1.

Source: AA-SVD (arXiv 2604.02119), which reports it as worth more than the choice of the start (no code was taken).
`mixed` takes a share of the target from the dense block on x' instead: what the block can still do about x'.

Memory: the inputs of the present block in both models and its targets, 3 x windows x length x width numbers in float32
(1,024 windows of 512 tokens at width 4,096: 26 GB), beside the two models; gradients and optimizer state of one block.
No more windows are kept than the steps can use. Where memory runs out, a batch goes through in parts, each of which is
worked out again for its gradients, so that only one part's activations are there at a time.

Models that are held in bfloat16 train in float32: a step of 1e-4 is less than half the last digit of most bfloat16
numbers and would be rounded away. The present block's parameters are widened, and rounded when it is done.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as worked_out_again
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.loop import Group, Training, train
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import Stream, low_rank_layers, pivot_buffers, restore_pivots, start
from spectrim.memory import Batch
from spectrim.models.walk import Walk, device_of
from spectrim.nn.linears import LowRankLinear, PivotLinear

STAGE = "block refinement"
MOST_WINDOWS = 1024
WEIGHT_DECAY, GRADIENT_NORM = 0.01, 1.0
WARM_UP, FLOOR = 0.1, 0.1
"""Share of the steps, and of the peak learning rate at the end."""


def refine_blocks(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-4,
    mixed: float = 0.0,
    seed: int = 0,
    stage: str = "block",
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[list[float]]:
    """Train each block of `student` in place for `steps` on `ids` (windows, length); the losses of every block.

    Windows stay in batches of `batch_size` as they come; the order of the batches is seeded. Blocks without a low-rank
    layer are left alone (no losses). Each block is a stage of its own in the checkpoint. Raises NumericalError.
    """
    ids = ids[: min(len(ids), MOST_WINDOWS, steps * batch_size)]
    layers = low_rank_layers(student, walk)
    block_of = {layer.name: layer.block for layer in walk.layers}
    own = [{n: m for n, m in layers.items() if block_of[n] == block} for block in range(len(walk.block_names))]
    if not layers or steps == 0:
        return [[] for _ in own]
    norms = [_own_norms(student, name) if own[block] else {} for block, name in enumerate(walk.block_names)]
    losses: list[list[float]] = []
    with frozen(student), frozen(teacher):
        pair = _Pair.begin(teacher, student, walk, ids, Batch(batch_size), mixed)
        for block, layers_here in enumerate(own):
            pair.aim(block)
            losses.append([])
            trained = {**_factors(layers_here), **norms[block]}
            if layers_here:
                training = Training(
                    stage=f"{stage} {block}",
                    label=f"block {block + 1} of {len(own)}",
                    says=f"block refinement of {walk.block_names[block]}",
                    advice="Lower its learning rate (refine_blocks(learning_rate=...) in Python), or leave it out",
                    groups=[Group(parameters=trained, peak=learning_rate)],
                    loss=partial(pair.loss, block),
                    optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY),
                    steps=steps,
                    batch_size=1,
                    seed=seed,
                    warm_up=round(WARM_UP * steps),
                    floor=FLOOR,
                    clip=GRADIENT_NORM,
                    recorded=False,
                    shrink=pair.shrink,
                    state=partial(pivot_buffers, layers_here),
                    restore=partial(restore_pivots, layers_here, stage=f"{stage} {block}"),
                )
                with _in_float32(trained):
                    losses[-1] = train(training, torch.arange(pair.batches), progress=progress, checkpoint=checkpoint)
            pair.advance(block)
    return losses


@dataclass
class _Pair:
    """Both models before the present block, and what the block should give, in parts of `batch.size` windows."""

    walk: Walk
    ids: Tensor  # (windows, length)
    whole: int  # windows in a batch of training
    batch: Batch
    mixed: float
    dense: Stream
    small: Stream
    size: int  # of the parts as they are
    targets: list[Tensor]

    @classmethod
    def begin(
        cls, teacher: PreTrainedModel, student: PreTrainedModel, walk: Walk, ids: Tensor, batch: Batch, mixed: float
    ) -> "_Pair":
        """Both before the first block."""
        whole = batch.size

        def started(size: int) -> tuple[Stream, Stream, int]:
            with autocast(device_of(teacher)):
                return start(teacher, walk, ids, size), start(student, walk, ids, size), size

        dense, small, size = batch.run(STAGE, started, most=len(ids))
        return cls(walk, ids, whole, batch, mixed, dense, small, size, [])

    @property
    def batches(self) -> int:
        """Of training."""
        return -(-len(self.ids) // self.whole)

    def fit(self, size: int) -> None:
        """Parts of at most `size` windows, from now on."""
        if size >= self.size:
            return
        sizes = [len(part) for hidden in self.dense.hidden for part in hidden.split(size)]
        streams = (self.dense, self.small)
        with _products_like(self.dense.hidden[0]):  # in the midst of training, perhaps
            arguments = [start(stream.model, self.walk, self.ids, sizes).arguments for stream in streams]
        for stream, own in zip(streams, arguments, strict=True):
            stream.split(size, own)
        self.targets = [part for target in self.targets for part in target.split(size)]
        self.size = size

    def shrink(self, said: str) -> None:
        """Parts of half the size; OutOfMemory where they are one window."""
        self.batch.size = self.size
        self.batch.halve(STAGE, said)
        self.batch.run(STAGE, self.fit)

    @torch.no_grad()
    def aim(self, block: int) -> None:
        """What the block should give on each part."""
        self.targets = []

        def aimed(size: int) -> None:
            self.fit(size)
            with autocast(device_of(self.dense.model)):
                for part in range(len(self.targets), len(self.dense.hidden)):
                    target = self.dense.run(block, part)
                    if self.mixed:
                        target = torch.lerp(target, self.dense.run(block, part, self.small.hidden[part]), self.mixed)
                    self.targets.append(target)

        self.batch.run(STAGE, aimed, most=self.size)

    def loss(self, block: int, batch: Tensor) -> Tensor:
        """Mean squared error of one batch of training, given by its index (1,)."""
        ends = accumulate(len(target) for target in self.targets)
        parts = [part for part, end in enumerate(ends) if (end - 1) // self.whole == int(batch)]
        if len(parts) == 1:
            return self._loss(block, parts[0])
        count = sum(self.targets[part].numel() for part in parts)
        return torch.stack([
            worked_out_again(self._loss, block, part, use_reentrant=False) * (self.targets[part].numel() / count)
            for part in parts
        ]).sum()  # fmt: skip

    def _loss(self, block: int, part: int) -> Tensor:
        # Entered anew at each step: autocast keeps cast weights for as long as it is open, and they change.
        with _products_like(self.targets[part]):
            output = self.small.run(block, part)
        return F.mse_loss(output.float(), self.targets[part].float())

    @torch.no_grad()
    def advance(self, block: int) -> None:
        """Both past the block; the dense outputs are the targets, unless those were mixed."""

        def advanced(size: int) -> None:
            self.fit(size)
            with autocast(device_of(self.dense.model)):
                self.small.advance(block)
                if self.mixed:
                    self.dense.advance(block)

        self.batch.run(STAGE, advanced, most=self.size)
        if not self.mixed:
            self.dense.put(block, self.targets)


@contextmanager
def _in_float32(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Narrower parameters in float32 inside, in their own dtype again after; the same objects throughout."""
    narrow = {p: p.dtype for p in parameters.values() if torch.finfo(p.dtype).bits < 32}
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _products_like(hidden: Tensor) -> AbstractContextManager[object]:
    """Products of narrow hidden states with float32 weights need autocast, on machines that are slow at it too."""
    if hidden.dtype == torch.float32:
        return autocast(hidden.device)
    return torch.autocast(hidden.device.type, dtype=hidden.dtype)


def _factors(layers: dict[str, LowRankLinear | PivotLinear]) -> dict[str, nn.Parameter]:
    """All tensors of the low-rank layers, biases too."""
    return {f"{name}.{p}": tensor for name, layer in layers.items() for p, tensor in layer.named_parameters()}


def _own_norms(student: PreTrainedModel, block: str) -> dict[str, nn.Parameter]:
    """The norms' tensors in one block, made the student's own: until now it shares them with the dense model."""
    found = {}
    for path, module in student.get_submodule(block).named_modules(prefix=block):
        if "norm" not in type(module).__name__.lower():
            continue
        for name, parameter in [*module.named_parameters(recurse=False)]:
            own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(module, name, own)
            found[f"{path}.{name}"] = own
    return found
