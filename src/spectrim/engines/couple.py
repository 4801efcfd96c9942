"""A second gradient pass that refines the Kronecker factors of every layer's metric by what tokens have in common.

    first pass     A0 = E[x x^T], B0 = E[g g^T] over single tokens                       engines/measure.py
    this one       A = E[G^T B0^-1 G] / O,  B = E[G A0^-1 G^T] / (c I)                   linalg/curvature.add_coupled
                   G = sum of g x^T over the tokens of one calibration window
    result         between the two, nearer to (A, B) the more windows there were          linalg/curvature.toward

With few windows (A, B) is noisier than (A0, B0), for which every token is a sample of its own.
A0 and B0 are shrunk as the method shrinks them. Labels are those of the first pass: same seed, same batches.

Memory: layers that share an input share A0 but no longer A, which also depends on their gradients; during the pass
each layer holds its two sums in float64 and the two inverses in float32 beside A0 and B0.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines import measure as plain_measure
from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.labels import skip_labels_of_others
from spectrim.engines.layerwise import solver_errors_of
from spectrim.engines.measure import Progress, autocast, frozen, hooks, in_sequences
from spectrim.engines.pack import fill, fingerprint
from spectrim.engines.parts import Run, digest_of, load_own, size_of
from spectrim.engines.spread import holders_of, layers_of, own_spans
from spectrim.engines.sums import sum_dtype
from spectrim.errors import NumericalError
from spectrim.linalg.curvature import Coupled, add_coupled, clip_rows, toward, window_share
from spectrim.linalg.metric import quick_root, shrink
from spectrim.models.walk import Layer, Walk, device_of
from spectrim.processes import present
from spectrim.stats import Coupling, Stat, Stats


@dataclasses.dataclass
class _Side:
    """The inverse of one shrunk covariance in units of its mean, so that float32 neither over- nor underflows."""

    scale: float  # mean diagonal of the covariance
    inverse: Tensor  # (n, n) float32, of covariance / scale

    def rows(self, rows: Tensor) -> Tensor:
        """Rows in units of the root of that mean."""
        return rows.float() / self.scale**0.5


@dataclasses.dataclass
class _Sums:
    """One layer."""

    total: Coupled
    tokens: int = 0
    windows: int = 0  # how many G, each of them one sample


def couple(
    model: PreTrainedModel,
    walk: Walk,
    ids: Tensor,
    plain: Mapping[str, Stats],
    coupling: Coupling,
    *,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    stage: str = "coupling",
) -> dict[str, Stats]:
    """`plain` statistics of every layer with `gram` and `output_grad` refined over `ids` (windows, length).

    `ids` are the windows that gave `plain` its gradients, `seed` that of that pass. A layer that no gradient reaches at
    all (a model that is certain) keeps its plain statistics. With a `checkpoint` the sums are kept as its `stage` and
    gone on with, in batches of any size; one process alone can do so.

    Several processes share the windows. `plain`, and what is returned, holds then the layers that each owns.
    """
    device = device_of(model)
    sides = _sides_of_all(walk, _sides(layers_of(walk, plain), plain, coupling), device)
    sums = {layer.name: _Sums(_zeros(layer, device)) for layer in walk.layers}

    def on_gradient(name: str, gradient: Tensor, x: Tensor, windows: torch.Size) -> None:
        (a, b), own = sides[name], sums[name]
        rows = clip_rows(gradient.reshape(-1, gradient.shape[-1]), ratio=plain_measure.GRADIENT_CLIP)
        g = in_sequences(b.rows(rows), windows)
        add_coupled(own.total, g, in_sequences(a.rows(x), windows), a.inverse, b.inverse)
        own.tokens += len(rows)
        own.windows += len(g)

    generator = torch.Generator(device=device).manual_seed(seed)
    keeper = _Keeper(checkpoint if present().alone else None, stage, sums, generator)
    coupled = keeper.load(plain, {"windows": fingerprint(ids), "seed": seed})
    spans = own_spans(len(ids), len(ids), batch_size, coupled)
    skip_labels_of_others(model, ids, batch_size, generator)
    with frozen(model), hooks(model, walk, None, on_gradient), autocast(device):
        for start, stop in spans:
            plain_measure.backward_from_sampled_labels(model, ids[start:stop].to(device), generator)
            keeper.save(stop, last=stop == len(ids))
            if progress is not None:
                progress("couple", stop - spans[0][0] + coupled, spans[-1][1] - spans[0][0] + coupled)
    _bring_together(walk, sums, holders_of(walk, plain))
    return {name: _refined(name, plain[name], sums.pop(name), sides.pop(name)) for name in plain}


@dataclasses.dataclass
class _Keeper:
    """The sums in a checkpoint, between two batches."""

    checkpoint: Checkpoint | None
    stage: str
    sums: dict[str, _Sums]
    generator: torch.Generator
    run: Run = dataclasses.field(default_factory=dict)

    def load(self, plain: Mapping[str, Stats], run: Run) -> int:
        """Take up what was summed before over the same first statistics; how many windows that were."""
        if self.checkpoint is None:
            return 0
        diagonals = (plain[name].get(stat).diagonal() for name in self.sums for stat in (Stat.GRAM, Stat.OUTPUT_GRAD))
        self.run = run | {"after": digest_of(diagonals)}
        saved = load_own(self.checkpoint, self.stage, self.run)
        if saved is None:
            return 0
        fill(self.totals(), saved.tensors, self.stage)
        for name, own in self.sums.items():
            own.tokens, own.windows = saved.facts["counts"][name]
        self.generator.set_state(saved.tensors["generator"])
        return saved.step

    def save(self, windows: int, *, last: bool) -> None:
        """The sums over so many windows, if it is time, or if they are complete and worth it."""
        if self.checkpoint is None:
            return
        totals = self.totals()
        if self.checkpoint.due() or (last and self.checkpoint.worth(size_of(totals))):
            counts = {name: [own.tokens, own.windows] for name, own in self.sums.items()}
            tensors = {**totals, "generator": self.generator.get_state()}
            self.checkpoint.save(self.stage, Saved(windows, tensors, {"run": self.run, "counts": counts}))

    def totals(self) -> dict[str, Tensor]:
        """The living sums by name."""
        return {f"{name}.{part}": t for name, own in self.sums.items() for part, t in own.total._asdict().items()}


def _sides(walk: Walk, plain: Mapping[str, Stats], coupling: Coupling) -> dict[str, tuple[_Side, _Side]]:
    """(A0, B0) of every layer; inputs that layers share are inverted once."""
    shared: dict[int, _Side] = {}
    sides = {}
    for layer in walk.layers:
        a, b = plain[layer.name].get(Stat.GRAM), plain[layer.name].get(Stat.OUTPUT_GRAD)
        with solver_errors_of(layer.name, "its measured covariances"):
            if id(a) not in shared:
                shared[id(a)] = _side(a, coupling.input_shrinkage)
            sides[layer.name] = (shared[id(a)], _side(b, coupling.output_shrinkage))
    return sides


def _side(covariance: Tensor, shrinkage: float) -> _Side:
    scale = float(covariance.diagonal().mean()) or 1.0
    dual = quick_root(shrink(covariance / scale, shrinkage)).dual
    return _Side(scale, (dual @ dual.mT).float())


def _sides_of_all(
    walk: Walk, own: dict[str, tuple[_Side, _Side]], device: torch.device
) -> dict[str, tuple[_Side, _Side]]:
    """Those of other ranks too; an inverse that layers share is handed over once by each rank that has it."""
    group = present()
    if group.alone:
        return own
    holders, first = holders_of(walk, own), {}
    for name, (a, _) in own.items():
        first.setdefault(id(a), name)
    same = group.objects({name: first[id(a)] for name, (a, _) in own.items()})
    sides: dict[str, tuple[_Side, _Side]] = {}
    for layer in walk.layers:
        name, holder = layer.name, holders[layer.name]
        given = None
        known = same[holder][name]  # the layer whose inverse this one shares, at its holder; the first of them itself
        if group.rank == holder:
            given = {f"{i}": side.inverse for i, side in enumerate(own[name]) if i or known == name}
        scales = group.objects(tuple(side.scale for side in own[name]) if given is not None else None)[holder]
        assert scales is not None
        found = group.share(given, holder, device)
        a = _Side(scales[0], found["0"]) if known == name else sides[known][0]
        sides[name] = a, _Side(scales[1], found["1"])
    return sides


def _bring_together(walk: Walk, sums: dict[str, _Sums], owners: dict[str, int]) -> None:
    """Sums over all ranks at each layer's owner, in place; elsewhere they mean nothing afterwards."""
    group = present()
    if group.alone:
        return
    counts = group.objects({name: (own.tokens, own.windows) for name, own in sums.items()})
    for layer in walk.layers:
        own = sums[layer.name]
        own.total = Coupled(*(group.sum_at(owners[layer.name], part) for part in own.total))
        own.tokens, own.windows = (sum(found[layer.name][i] for found in counts) for i in range(2))


def _zeros(layer: Layer, device: torch.device) -> Coupled:
    shapes = ((layer.inputs, layer.inputs), (layer.outputs, layer.outputs), ())
    return Coupled(*(torch.zeros(shape, dtype=sum_dtype(device), device=device) for shape in shapes))


def _refined(name: str, plain: Stats, sums: _Sums, sides: tuple[_Side, _Side]) -> Stats:
    overlap = float(sums.total.overlap)
    if overlap == 0:
        return plain
    a, b = sums.total.finish(sums.tokens)
    share = window_share(sums.windows)
    refined = dataclasses.replace(
        plain,
        gram=toward(plain.get(Stat.GRAM), a * sides[0].scale, share),
        output_grad=toward(plain.get(Stat.OUTPUT_GRAD), b * sides[1].scale, share),
    )
    if not refined.is_finite():
        raise NumericalError(
            f"{name}: the coupled covariances are not finite (overlap {overlap:g} over {sums.tokens} tokens; no NaN or "
            "Inf is allowed). Leave them out with --set coupling=none, or use more calibration text"
        )
    return refined
