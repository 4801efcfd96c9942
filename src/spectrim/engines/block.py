"""Block refinement: one block after another is trained to give what the dense model's block gives.

    x  hidden states before the block in the dense model, x' in the compressed one (all blocks before it refined)
    loss = mean || block(x) - block'(x') ||^2            over the block's factors, their biases, and its norms

AdamW 1e-4, weight decay 0.01, warm-up over 10 % of the steps, cosine to 10 %, gradients clipped at norm 1.

Source: AA-SVD (arXiv 2604.02119), which reports it as worth more than the choice of the start (no code was taken).
`mixed` takes a share of the target from the dense block on x' instead: what the block can still do about x'.

Memory: the inputs of the present block in both models and its targets, 3 x windows x length x width numbers in float32
(1,024 windows of 512 tokens at width 4,096: 26 GB), beside the two models; gradients and optimizer state of one block.
No more windows are kept than the steps can use.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.loop import Group, Training, train
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.stream import Stream, low_rank_layers, pivot_buffers, restore_pivots, start
from spectrim.models.walk import Walk, device_of
from spectrim.nn.linears import LowRankLinear, PivotLinear

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
    device = device_of(teacher)
    with frozen(student), frozen(teacher):
        with autocast(device):
            dense, small = (start(model, walk, ids, batch_size) for model in (teacher, student))
        for block, layers_here in enumerate(own):
            targets = _targets(dense, small, block, mixed)
            losses.append([])
            if layers_here:
                training = Training(
                    stage=f"{stage} {block}",
                    label=f"block {block + 1} of {len(own)}",
                    says=f"block refinement of {walk.block_names[block]}",
                    advice="Lower its learning rate (refine_blocks(learning_rate=...) in Python), or leave it out",
                    groups=[Group(parameters={**_factors(layers_here), **norms[block]}, peak=learning_rate)],
                    loss=partial(_loss, small, block, targets),
                    optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY),
                    steps=steps,
                    batch_size=1,
                    seed=seed,
                    warm_up=round(WARM_UP * steps),
                    floor=FLOOR,
                    clip=GRADIENT_NORM,
                    recorded=False,
                    state=partial(pivot_buffers, layers_here),
                    restore=partial(restore_pivots, layers_here, stage=f"{stage} {block}"),
                )
                losses[-1] = train(training, torch.arange(len(targets)), progress=progress, checkpoint=checkpoint)
            _advance(dense, small, block, None if mixed else targets)
    return losses


def _targets(dense: Stream, small: Stream, block: int, mixed: float) -> list[Tensor]:
    """What the block should give on each batch."""
    targets = []
    with torch.no_grad(), autocast(device_of(dense.model)):
        for batch in range(len(dense.hidden)):
            target = dense.run(block, batch)
            if mixed:
                target = torch.lerp(target, dense.run(block, batch, small.hidden[batch]), mixed)
            targets.append(target)
    return targets


def _loss(small: Stream, block: int, targets: list[Tensor], batch: Tensor) -> Tensor:
    """Mean squared error of one batch, given by its index (1,)."""
    index = int(batch)
    # Entered anew at each step: autocast keeps cast weights for as long as it is open, and they change.
    with autocast(targets[index].device):
        output = small.run(block, index)
    return F.mse_loss(output.float(), targets[index].float())


def _advance(dense: Stream, small: Stream, block: int, outputs: list[Tensor] | None) -> None:
    """Both streams past the block; the dense outputs are the targets, unless those were mixed."""
    with torch.no_grad(), autocast(device_of(dense.model)):
        small.advance(block)
        if outputs is None:
            dense.advance(block)
        else:
            dense.hidden = outputs


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
