"""One pass over the calibration windows that measures what the methods asked for.

Inputs that several layers share are measured once. Gradients come from labels sampled from the model's own
distribution (the true Fisher, not the empirical one): they need no reference text and vanish nowhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.labels import loss_of_sampled_labels, loss_of_text, skip_labels_of_others
from spectrim.engines.pack import fingerprint
from spectrim.engines.spread import bring_together, is_own, of_nothing, own_spans, owners_of
from spectrim.engines.sums import KeptSums, Sums
from spectrim.errors import InputError, NumericalError
from spectrim.linalg.curvature import add_gram, add_squares, clip_rows
from spectrim.models.walk import Walk, device_of, shared_inputs
from spectrim.processes import Share, present
from spectrim.stats import GRADIENT_STATS, INPUT_STATS, SAMPLED_STATS, Stat, Stats

GRADIENT_CLIP = 10.0
"""Token gradients above this many times the root mean square are scaled down to it (specs: KFAC-SVD)."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""


def measure(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    needs: frozenset[Stat],
    *,
    batch_size: int = 4,
    gradient_windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    unreached: Literal["refuse", "leave out"] = "refuse",
    checkpoint: Checkpoint | None = None,
    stage: str = "statistics",
    after: str = "",
    owned: bool = False,
) -> dict[str, Stats]:
    """Statistics of every target layer over `ids` (windows, length); the model's weights are not touched.

    `unreached` says what becomes of an expert that no token, or no gradient, came to.

    Gradients cost twice what inputs do and need fewer tokens: they come from the first `gradient_windows` only
    (None: all). The layers of `model` may be dense or already compressed; only their inputs and outputs are seen.

    With a `checkpoint` the sums are kept as its `stage` and gone on with, in batches of any size; `after` says by a
    hash what the model is.

    Several processes share the windows; `owned` leaves each with the statistics of the layers that it owns, and the
    sums of unfinished passes are then not kept.
    """
    if not needs:
        return of_nothing(walk, int(ids.numel()), owned=owned)
    owners = owners_of(walk, needs) if owned else None
    checkpoint = checkpoint if present().alone else None
    told = {"batch_size": batch_size, "gradient_windows": gradient_windows, "seed": seed, "progress": progress}
    passed = add_up(model, walk, ids, needs, **told, checkpoint=checkpoint, stage=stage, after=after)
    sums, leader = passed.sums, passed.leader
    bring_together(sums, leader, walk, needs, device_of(model), owners)
    for own in sums.values():
        own.to_means()
    layers = [la.name for la in walk.layers if is_own(la.name, owners)]
    if unreached == "leave out":
        layers = [n for n in layers if sums[leader[n]].tokens and (sums[n].gradient_tokens or not passed.border)]
    return {name: finish(name, sums[name], sums[leader[name]], needs) for name in layers}


class Passed(NamedTuple):
    """The sums over a share of the windows."""

    sums: dict[str, Sums]
    leader: dict[str, str]
    """Of every layer the one that its input was measured at."""
    border: int
    """How many of all windows give gradients."""
    keeper: KeptSums
    windows: int
    """The position, among all windows, behind the last of this share."""


def add_up(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    needs: frozenset[Stat],
    *,
    batch_size: int = 4,
    gradient_windows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    stage: str = "statistics",
    after: str = "",
    share: Share | None = None,
) -> Passed:
    """The sums that `measure` makes statistics of, over this process's windows, or over a `share` of them.

    Arguments are those of `measure`. A `checkpoint` keeps what is unfinished; the sums of a `share` are for the caller
    to keep.
    """
    ends = share is None
    share = share or present().share_of
    assert not (Stat.SLOPE in needs and needs & SAMPLED_STATS), "one pass has one kind of labels"
    with frozen(model):  # before the groups are found: in training mode OPT drops whole layers at random
        groups = shared_inputs(model, walk.layers)
        leader = {name: group[0] for group in groups for name in group}
        sums = {name: Sums() for name in leader}  # in the order in which the model runs its layers
        device = device_of(model)
        generator = torch.Generator(device=device).manual_seed(seed)
        border = 0
        if needs & GRADIENT_STATS:
            border = len(ids) if gradient_windows is None else min(gradient_windows, len(ids))
        run = {"after": after, "windows": fingerprint(ids), "border": border, "seed": seed}
        keeper = KeptSums(checkpoint, stage, run | {"needs": sorted(s.value for s in needs)}, sums, generator)
        measured = keeper.load(device)

        def on_input(name: str, x: Tensor) -> None:
            if leader[name] == name:
                add_input(sums[name], x, needs)

        def on_gradient(name: str, gradient: Tensor, x: Tensor, windows: torch.Size) -> None:
            add_gradient(sums[name], gradient, x, needs, windows)

        if not measured:  # else the generator that was kept has drawn them
            skip_labels_of_others(model, ids[:border], batch_size, generator, share)
        spans = own_spans(len(ids), border, batch_size, measured, share)
        end = spans[-1][1] if spans else measured
        total = sum(stop - start for start, stop in own_spans(len(ids), border, batch_size, share=share))
        done = total - sum(stop - start for start, stop in spans)
        with hooks(model, walk, on_input, on_gradient if border else None), autocast(device):
            for start, stop in spans:
                batch = ids[start:stop].to(device)
                if start < border and Stat.SLOPE in needs:
                    backward_from_text(model, batch)
                elif start < border:
                    backward_from_sampled_labels(model, batch, generator)
                else:
                    with torch.no_grad():
                        model(input_ids=batch, use_cache=False)
                check_sums(sums, f"the batch that starts at calibration window {start}")
                keeper.save(stop, last=ends and stop == end)
                done += stop - start
                if progress is not None:
                    progress("calibrate", done, total)
    return Passed(sums, leader, border, keeper, end)


def backward_from_sampled_labels(model: PreTrainedModel, batch: Tensor, generator: torch.Generator) -> None:
    """Backpropagate `sum over tokens of -log p(sampled next token)`."""
    with torch.enable_grad():
        loss_of_sampled_labels(model(input_ids=batch, use_cache=False).logits, generator).backward()


def backward_from_text(model: PreTrainedModel, batch: Tensor) -> None:
    """Backpropagate `sum over tokens of -log p(next token of the text)`."""
    with torch.enable_grad():
        loss_of_text(model(input_ids=batch, use_cache=False).logits, batch).backward()


OnInput = Callable[[str, Tensor], None]
"""Called with a layer's name and its input (..., I)."""
OnGradient = Callable[[str, Tensor, Tensor, torch.Size], None]
"""Called with a layer's name, the gradient at its output (..., O), its input (..., I), and (B, S) of the batch."""


@contextmanager
def hooks(
    model: PreTrainedModel, walk: Walk, on_input: OnInput | None, on_gradient: OnGradient | None
) -> Iterator[None]:
    """Forward hooks on every target layer that call back with its input; gradients through a hook on each output."""
    shape = [torch.Size((1, 1))]  # (B, S) of the present batch

    def begin(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        shape[0] = output.shape[:2]
        output.requires_grad_(True)  # with all weights frozen the graph has to start somewhere

    start = None if on_gradient is None else model.get_input_embeddings().register_forward_hook(begin)
    try:
        with hooks_on({la.name: model.get_submodule(la.name) for la in walk.layers}, on_input, on_gradient, shape):
            yield
    finally:
        if start is not None:
            start.remove()


@contextmanager
def hooks_on(
    layers: Mapping[str, nn.Module],
    on_input: OnInput | None,
    on_gradient: OnGradient | None,
    shape: Sequence[torch.Size] = (),
) -> Iterator[None]:
    """The same on some layers by name; `shape` holds (B, S) of the batch that is run when gradients are wanted."""

    def pass_on(call: OnGradient, name: str, x: Tensor, windows: torch.Size, gradient: Tensor) -> None:
        call(name, gradient.detach(), x, windows)

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if on_input is not None:
                on_input(name, x)
            if on_gradient is not None and output.requires_grad:
                output.register_hook(partial(pass_on, on_gradient, name, x, shape[0]))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_input(sums: Sums, x: Tensor, needs: frozenset[Stat]) -> None:
    """Add the rows of x (..., I)."""
    rows = x.reshape(-1, x.shape[-1])
    sums.tokens += len(rows)
    width = rows.shape[1]
    if Stat.GRAM in needs:
        add_gram(sums.total(Stat.GRAM, (width, width), x.device), rows, upper=True)
    if Stat.MEAN in needs:
        sums.total(Stat.MEAN, (width,), x.device).add_(rows.double().sum(0))
    if Stat.MEAN_ABS in needs:
        sums.total(Stat.MEAN_ABS, (width,), x.device).add_(rows.double().abs().sum(0))


def add_gradient(sums: Sums, gradient: Tensor, x: Tensor, needs: frozenset[Stat], windows: torch.Size) -> None:
    """Add the rows of the gradient (..., O) at a layer's output; x (..., I) is the input of the same call.

    `windows` is (B, S) of the batch; FISHER squares the sum over one sequence.
    """
    rows = gradient.reshape(-1, gradient.shape[-1])
    sums.gradient_tokens += len(rows)
    if Stat.OUTPUT_GRAD in needs:
        width = rows.shape[1]
        clipped = clip_rows(rows, ratio=GRADIENT_CLIP)
        add_gram(sums.total(Stat.OUTPUT_GRAD, (width, width), x.device), clipped, upper=True)
    if Stat.SLOPE in needs:
        flat = x.reshape(-1, x.shape[-1])
        add_gram(sums.total(Stat.SLOPE, (rows.shape[1], flat.shape[1]), x.device), rows, flat)
    if Stat.FISHER in needs:
        g, rows_in = in_sequences(rows, windows), in_sequences(x, windows)
        add_squares(sums.total(Stat.FISHER, (g.shape[-1], x.shape[-1]), x.device), g, rows_in)
        sums.sequences += len(g)


def in_sequences(rows: Tensor, windows: torch.Size) -> Tensor:
    """Rows (..., n) as (B, S, n), where `windows` is (B, S) of the batch.

    Some layers see its tokens flattened to (B S, n) (OPT's mlp): they are put back. Tokens routed to an expert belong
    to no sequence: all of a batch are taken as one, (1, N, n).
    """
    width = rows.shape[-1]
    batch = windows[0] if rows.numel() == windows.numel() * width else 1
    return rows.reshape(batch, -1, width)


def finish(name: str, own: Sums, shared: Sums, needs: frozenset[Stat]) -> Stats:
    """What was asked for: input statistics from the layer that was measured for all that share it, the rest its own."""
    if shared.tokens == 0:
        raise InputError(f"{name}: no calibration token reached this layer (an expert never routed to?)")
    if needs & GRADIENT_STATS and own.gradient_tokens == 0:
        raise InputError(
            f"{name}: no gradient reached this layer; raise gradient_windows (an expert seldom routed to?)"
        )
    found = {s.value: (shared if s in INPUT_STATS else own).totals[s] for s in needs}
    return Stats(tokens=shared.tokens, **found)


def check_sums(sums: Mapping[str, Sums], where: str) -> None:
    """Stop at the first layer (sums are in running order) whose sums are not finite; later layers only inherit it."""
    # The diagonal of a Gram matrix tells all; others have none and have to be looked at in full.
    bad = [(name, stat) for name, own in sums.items() for stat, t in own.totals.items()
           if not bool(torch.isfinite(t.diagonal() if stat in (Stat.GRAM, Stat.OUTPUT_GRAD) else t).all())]  # fmt: skip
    if not bad:
        return
    # A gradient turns bad from the last layer backwards, an input from the first layer forwards.
    inputs = [b for b in bad if b[1] in INPUT_STATS]
    name, stat = inputs[0] if inputs else bad[-1]
    what = "inputs" if inputs else "output gradients"
    total = sums[name].totals[stat]
    count = int((~torch.isfinite(total)).sum())
    raise NumericalError(
        f"{name}: the {what} are not finite in {where} "
        f"({count} of {total.numel()} entries of {stat.value}); no NaN or Inf is allowed. "
        f"Computed in {computing_dtype(total.device)} (bfloat16 and float32 reach further than float16): check the "
        "weights, or leave the text of that window out"
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight collects gradients and dropout is off; both are put back afterwards, module by module."""
    wanted = [(p, p.requires_grad) for p in model.parameters()]  # those replaced meanwhile too: others may share them
    training = {name: module.training for name, module in model.named_modules()}
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, training[""])
        for parameter, own in wanted:
            parameter.requires_grad_(own)


def both_logits(student: PreTrainedModel, teacher: PreTrainedModel, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, S, V) of both on tokens (B, S), in the same precision; gradients through the student alone."""
    with autocast(batch.device):
        with torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits
        return student(input_ids=batch, use_cache=False).logits, wanted


def autocast(device: torch.device):
    """bf16 products where the hardware has them (GPU; CPU with AVX512-BF16 or AMX), else float32 throughout."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    if device.type == "cpu" and cpu_has_bf16():
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def computing_dtype(device: torch.device) -> str:
    """What `autocast` makes products on this device be computed in."""
    context = autocast(device)
    return "float32" if isinstance(context, nullcontext) else str(context.fast_dtype).removeprefix("torch.")


def cpu_has_bf16() -> bool:
    """True when bf16 products run in hardware; emulated ones are slower than float32."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())
