"""Distillation: factors, or the numbers beside codes, trained against the dense model.

    loss = (1 - share) E[KL(dense || compressed)] + share E[-log p(next token)]       share = LABEL_SHARE

1. measure the metric of the compressed model: input Grams and output-gradient covariances       engines/measure.py
2. write every low-rank layer as a product in the coordinates of that metric                     nn/spectral.py
3. train them with Adam, one relative rate for all numbers, warm-up and cosine
4. put them back in the codec they had

Layers that share their right factor are one stacked product there (engines/distil_shared.py).

Layers in few bits (`packed`) train what they keep in 16-bit numbers: scales, tables, entries apart, corrections and
biases; codes stay. They need no metric: each tensor is trained in units of its own size (nn/packed.py). Steps, loss
and schedule are the same, and a model may have layers of both kinds.

Embeddings, norms and dense layers stay as they are. Trained in the rows and coefficients of pivot storage instead, the
same steps end at a 14 % higher divergence; in plain balanced factors at a 2 % higher one (docs/log.md).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.distil_shared import from_spectral_groups, shared_layers, to_spectral_groups
from spectrim.engines.layerwise import build_linear
from spectrim.engines.loop import Group, Training, train
from spectrim.engines.measure import Progress, both_logits, frozen, measure
from spectrim.engines.pack import fill
from spectrim.engines.parts import SavedFirst, digest_of
from spectrim.engines.stream import low_rank_layers, packed_layers
from spectrim.errors import UsageError
from spectrim.linalg.divergence import distillation_loss
from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import Root, root_of, shrink
from spectrim.memory import Batch
from spectrim.models.walk import Walk
from spectrim.nn.linears import LowRankLinear, PivotLinear
from spectrim.nn.packed import PackedLinear, TrainedPackedLinear
from spectrim.nn.shared import SharedLinear
from spectrim.nn.spectral import SpectralLinear
from spectrim.replacement import encode
from spectrim.stats import Stat, Stats

Metric = tuple[Root | None, Root | None]
"""Roots of the output and the input metric of a layer."""
GRADIENT_NORM = 1.0
LEARNING_RATE = 0.01
"""Relative: entries of the trained factors have root mean square 1 at the start."""
LABEL_SHARE = 0.1
"""A little of the next-token loss keeps perplexity from paying for the likeness (specs: 0.1)."""
METRIC_WINDOWS, METRIC_BATCH = 64, 8
INPUT_SHRINKAGE, OUTPUT_SHRINKAGE = 0.01, 0.2
"""As in the two-sided closed form."""


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = LEARNING_RATE,
    label_share: float = LABEL_SHARE,
    seed: int = 0,
    stage: str = "kl",
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train the low-rank and the packed layers of `student` in place for `steps`; returns the losses.

    On any error the layers are what they were before (a checkpoint holds the last good state). Beside the factors it
    holds the roots of the metric: O^2 + I^2 float32 numbers a layer. UsageError when layers are all packed and hold
    nothing but zeros beside their codes.
    """
    low_rank, packed = low_rank_layers(student, walk), packed_layers(student, walk)
    sharing = shared_layers(student, walk)
    factored = {**low_rank, **sharing}
    if not (factored or packed) or steps == 0:
        return []
    spectral: dict[str, SpectralLinear] = {}
    if factored:
        measured, checkpoint = metric_or_saved(student, walk, ids[:METRIC_WINDOWS], factored, stage, seed, checkpoint)
        roots = roots_of(measured, factored)
        spectral = {**to_spectral(low_rank, roots), **to_spectral_groups(sharing, roots)}
    if packed:
        checkpoint = same_codes(packed, f"{stage} codes", checkpoint)
    unpacked = {name: TrainedPackedLinear(layer, numbers=True) for name, layer in packed.items()}
    trained: dict[str, torch.nn.Module] = {**spectral, **unpacked}
    require_parameters(trained)

    back: dict[str, torch.nn.Module] = {}

    def finished(name: str) -> torch.nn.Module:
        if name in sharing:
            if not back:  # all of them, since they refer to each other
                back.update(from_spectral_groups(spectral, sharing))
            return back[name]
        if name in spectral:
            return from_spectral(spectral[name], low_rank[name])
        return unpacked[name].stored(packed[name]).train(packed[name].training)

    return train_in_place(
        student, teacher, {**factored, **packed}, trained, finished, ids, steps=steps, batch_size=batch_size,
        learning_rate=learning_rate, label_share=label_share, seed=seed, stage=stage, progress=progress,
        checkpoint=checkpoint,
    )  # fmt: skip


def require_parameters(trained: Mapping[str, torch.nn.Module]) -> None:
    """UsageError when nothing would be trained."""
    if not any(True for layer in trained.values() for _ in layer.parameters()):
        raise UsageError(
            f"distillation: all {len(trained)} layers in few bits hold only zeros beside their codes, so there is "
            "nothing to train; leave the recovery step kl out"
        )


def same_codes(layers: Mapping[str, PackedLinear], stage: str, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Layers as they were when training began, and the checkpoint, which keeps them when it must.

    Made again on another device, codes may be other ones, and numbers that were trained beside them mean nothing.
    """
    if checkpoint is None:
        return None
    state = {f"{name}.{key}": t for name, m in layers.items() for key, t in m.state_dict().items() if t.numel()}
    saved = checkpoint.load(stage)
    if saved is not None:
        fill(state, saved.tensors, stage)
    return SavedFirst(checkpoint, stage, lambda: Saved(1, state, {}), kept=saved is not None)


def train_in_place(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layers: Mapping[str, torch.nn.Module],
    trained: Mapping[str, torch.nn.Module],
    finished: Callable[[str], torch.nn.Module],
    ids: Tensor,
    *,
    advice: str = "Lower its learning rate (distil(learning_rate=...) in Python), or leave the step out",
    steps: int,
    batch_size: int,
    learning_rate: float,
    label_share: float = LABEL_SHARE,
    seed: int = 0,
    stage: str,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    **hooks: Any,
) -> list[float]:
    """Train `trained`, by name what stands for each of `layers` meanwhile, against the teacher; returns the losses.

    All parameters of `trained` are trained, at one rate: each should be of root mean square 1. `finished` gives what
    stands in a layer's place afterwards; on any error that is the layer itself. `hooks` are those of `Training`.
    """
    parameters = {f"{name}.{p}": t for name, layer in trained.items() for p, t in layer.named_parameters()}

    def loss(batch: Tensor) -> Tensor:
        student_logits, teacher_logits = both_logits(student, teacher, batch)
        # The last position has no label; the same positions count for both parts.
        return distillation_loss(student_logits[:, :-1], teacher_logits[:, :-1], batch[:, 1:], label_share)

    training = Training(
        stage=stage,
        label="distil",
        says="distillation",
        advice=advice,
        groups=[Group(parameters=parameters, peak=learning_rate)],
        loss=loss,
        # Gradients by numbers of size 1 are small: an absolute eps of 1e-8 would slow some layers and not others.
        optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        clip=GRADIENT_NORM,
        **hooks,
    )
    left: Mapping[str, torch.nn.Module] = layers
    for name, layer in trained.items():
        student.set_submodule(name, layer.train(layers[name].training))
    try:
        with frozen(student), frozen(teacher):
            losses = train(training, ids, progress=progress, checkpoint=checkpoint)
        left = {name: finished(name) for name in layers}
    finally:
        for name, layer in left.items():
            student.set_submodule(name, layer)
    return losses


def to_spectral(
    layers: Mapping[str, LowRankLinear | PivotLinear], metric: Mapping[str, Metric]
) -> dict[str, SpectralLinear]:
    """The same layers with their factors in the coordinates of their metrics."""
    return {name: SpectralLinear(factors_of(layer), layer.bias, *metric[name]) for name, layer in layers.items()}


def from_spectral(trained: SpectralLinear, before: LowRankLinear | PivotLinear) -> torch.nn.Module:
    """A layer in the codec, rank and dtype that it had before training."""
    like = before.V.weight if isinstance(before, LowRankLinear) else before.pivot.weight
    factors, bias = trained.trained()
    bias = None if bias is None else bias.to(like.dtype)
    replacement = encode(factors, before.codec, like=like.detach(), bias=bias)
    return build_linear(replacement).train(before.training)


def factors_of(layer: LowRankLinear | PivotLinear) -> Factors:
    """left (O, R) and right (R, I) in float64; of pivot storage: the coefficients with 1 in the pivot rows."""
    if isinstance(layer, LowRankLinear):
        return Factors(layer.U.weight.detach().double(), layer.V.weight.detach().double())
    rows, rest = layer.pivot.weight.detach().double(), layer.rest.weight.detach().double()
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return Factors(torch.cat([eye, rest]).index_select(0, layer.order), rows)


def metric_or_saved(
    student: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    layers: Mapping[str, LowRankLinear | PivotLinear | SharedLinear],
    stage: str,
    seed: int,
    checkpoint: Checkpoint | None,
) -> tuple[Mapping[str, Tensor], Checkpoint | None]:
    """Covariances `NAME.inputs` and `NAME.outputs` of the student, and the checkpoint, which keeps them when it must.

    An expert that no gradient reached has none.
    """
    sums, stage = f"{stage} statistics", f"{stage} metric"
    saved = None if checkpoint is None else checkpoint.load(stage, optional=True)
    if saved is not None and checkpoint is not None:
        checkpoint.forget(sums)
        return {name: saved.tensors[key] for name, key in saved.facts["kept_as"].items()}, checkpoint
    needs = frozenset({Stat.GRAM, Stat.OUTPUT_GRAD})
    after = "" if checkpoint is None else digest_of(t for layer in layers.values() for t in layer.parameters())

    def measured_by(size: int) -> dict[str, Stats]:
        return measure(
            student, walk, ids, needs, batch_size=size, seed=seed, unreached="leave out", checkpoint=checkpoint,
            stage=sums, after=after,
        )  # fmt: skip

    found = Batch(METRIC_BATCH).run("metric of distillation", measured_by)
    if checkpoint is not None:
        checkpoint.load(stage)  # measured anew: what was trained in another metric is discarded
    measured = {f"{n}.inputs": found[n].get(Stat.GRAM) for n in layers if n in found}
    measured |= {f"{n}.outputs": found[n].get(Stat.OUTPUT_GRAD) for n in layers if n in found}
    if checkpoint is not None:
        checkpoint = SavedFirst(checkpoint, stage, lambda: _pack(measured), kept=False, replaces=(sums,))
    return measured, checkpoint


def _pack(measured: Mapping[str, Tensor]) -> Saved:
    """Covariances that layers share are kept once."""
    first: dict[int, str] = {}
    kept_as = {name: first.setdefault(tensor.data_ptr(), name) for name, tensor in measured.items()}
    return Saved(1, {key: measured[key] for key in first.values()}, {"kept_as": kept_as})


def roots_of(
    measured: Mapping[str, Tensor], layers: Mapping[str, LowRankLinear | PivotLinear | SharedLinear]
) -> dict[str, Metric]:
    """The metric of each layer; None where nothing was measured: its factors are trained as they are."""
    known: dict[int, Root] = {}

    def root(name: str, shrinkage: float, device: torch.device) -> Root | None:
        covariance = measured.get(name)
        if covariance is None:
            return None
        if covariance.data_ptr() not in known:  # layers that share an input share its root
            known[covariance.data_ptr()] = root_of(shrink(covariance.to(device), shrinkage))
        return known[covariance.data_ptr()]

    return {
        name: (
            root(f"{name}.outputs", OUTPUT_SHRINKAGE, layer.weight.device),
            root(f"{name}.inputs", INPUT_SHRINKAGE, layer.weight.device),
        )
        for name, layer in layers.items()
    }
