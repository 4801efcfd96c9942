"""Layer by layer: check the weights, decompose them, encode, swap. Ranks for all at once: engines/ranks.py.

The order of a whole run, with measuring and training around it, is in engines/pipeline.py.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.measure import Progress
from spectrim.engines.parts import Parts, digest_of, spectrum_from, spectrum_tensors
from spectrim.engines.ranks import Plan
from spectrim.engines.spread import encode_spread
from spectrim.errors import NumericalError, UsageError
from spectrim.linalg.factor import Factors, Spectrum, truncate
from spectrim.linalg.solver import LARGEST_SIDE, LinAlgError
from spectrim.method import LayerMethod, Method
from spectrim.models.walk import Layer, Walk, linear_at, weight_of
from spectrim.nn.codecs import StoredLinear, codec_class
from spectrim.nn.shared import SharedLinear
from spectrim.options import Nonfinite
from spectrim.replacement import (
    SHARED,
    Replacement,
    Target,
    dense_replacement,
    encode,
    encode_shared,
    with_mean_kept,
)
from spectrim.stage import at
from spectrim.stats import Stat, Stats


def check_weights(model: PreTrainedModel, walk: Walk, nonfinite: Nonfinite = "refuse") -> tuple[Walk, list[str]]:
    """The walk over layers that are finite, and what there is to say; NumericalError unless others may be skipped."""
    kept: list[Layer] = []
    skipped: list[tuple[str, int, str]] = []
    for layer in walk.layers:
        module = linear_at(model, layer.name)
        for part, tensor in (("weight", module.weight), ("bias", module.bias)):
            bad = 0 if tensor is None else int((~torch.isfinite(tensor)).sum())
            if bad:
                says = f"{layer.name}.{part}: {bad:,} of {tensor.numel():,} values are NaN or Inf"
                if nonfinite == "refuse":
                    raise NumericalError(
                        f"{says}; none is allowed. The checkpoint is damaged or overflowed; download it again, load it "
                        "in a wider dtype, or copy such layers unchanged with --allow-nonfinite skip"
                    )
                skipped.append((layer.name, layer.numbers, says))
                break
        else:
            kept.append(layer)
    if not kept:
        raise NumericalError(f"all {len(walk.layers)} layers hold NaN or Inf; nothing is left to compress")
    finite = dataclasses.replace(walk, layers=tuple(kept), untouched=(*walk.untouched, *skipped))
    return finite, [
        f"{says}: the layer is copied unchanged, and the budget is that of the others" for *_, says in skipped
    ]


def refuse_large_sides(method: Method, walk: Walk) -> None:
    """Refuse, before anything is measured, matrices that no solver takes."""
    for layer in walk.layers:
        sides = [min(layer.outputs, layer.inputs)]
        sides += [layer.inputs] if Stat.GRAM in method.needs else []
        sides += [layer.outputs] if Stat.OUTPUT_GRAD in method.needs else []
        if max(sides) > LARGEST_SIDE:
            raise UsageError(
                f"{layer.name}: method {method.info.name} decomposes a {max(sides):,} x {max(sides):,} matrix for this "
                f"{layer.outputs:,} x {layer.inputs:,} weight; eigensolvers take at most {LARGEST_SIDE:,} rows. "
                "Methods svd and asvd need the shorter side only"
            )


@contextmanager
def solver_errors_of(name: str, what: str) -> Iterator[None]:
    """A failing solver becomes a NumericalError that names the layer and what was solved, with the matrix."""
    try:
        yield
    except LinAlgError as error:
        failed = NumericalError(
            f"{name}: the solver failed on {what}: {error}. Try --device cpu, or more calibration text"
        )
        failed.matrix = getattr(error, "matrix", None)
        raise failed from error


def decompose_layer(method: LayerMethod, layer: Layer, weight: Tensor, stats: Stats) -> Spectrum:
    """The spectrum of one weight (O, I), float64, in the method's metric; NumericalError unless it is finite."""
    shape = f"its {layer.outputs} x {layer.inputs} weight"
    with solver_errors_of(layer.name, f"{shape} ({method.info.name})"):
        # One layout, whether it was worked out or read from a state: products of views may round differently.
        spectrum = Spectrum(*(part.contiguous() for part in method.decompose(weight, stats)))
    if not all(bool(torch.isfinite(t).all()) for t in spectrum):
        raise NumericalError(
            f"{layer.name}: the decomposition of {shape} is not finite "
            f"({method.info.name}); the statistics or the solver failed. Use more calibration text"
        )
    return spectrum


def energies_of_layer(method: LayerMethod, layer: Layer, weight: Tensor, stats: Stats) -> Tensor:
    """The energies (K,) of `decompose_layer`, float64, without its components; NumericalError unless finite."""
    with solver_errors_of(layer.name, f"its {layer.outputs} x {layer.inputs} weight ({method.info.name})"):
        energies = method.energies(weight.detach().double(), stats)
    if not bool(torch.isfinite(energies).all()):
        raise NumericalError(
            f"{layer.name}: the energies of its {layer.outputs} x {layer.inputs} weight are not finite "
            f"({method.info.name}); the statistics or the solver failed. Use more calibration text"
        )
    return energies


def decompose_all(
    method: LayerMethod,
    model: PreTrainedModel,
    walk: Walk,
    stats: Mapping[str, Stats],
    *,
    checkpoint: Checkpoint | None = None,
    stage: str = "spectra",
    progress: Progress | None = None,
    into: MutableMapping[str, Spectrum] | None = None,
) -> MutableMapping[str, Spectrum]:
    """The spectrum of every layer that there are `stats` of, in the method's metric, float64 on the weight's device.

    They are put `into` what is given. With a `checkpoint` they are kept in parts of `stage`, and gone on with for the
    same `stats`.
    """
    layers = [layer for layer in walk.layers if layer.name in stats]
    parts = Parts(checkpoint, stage, {} if checkpoint is None else {"after": digest_of(_diagonals(walk, stats))})
    weights = {la.name: weight_of(model.get_submodule(la.name)) for la in walk.layers}
    spectra = {} if into is None else into
    for saved in parts.load():
        for name in saved.facts["items"]:
            spectra[name] = spectrum_from(saved.tensors, name, weights[name].device)
    for layer in layers:
        if layer.name not in spectra:
            weight = weights[layer.name].detach().double()
            spectrum = decompose_layer(method, layer, weight, stats[layer.name])
            spectra[layer.name] = spectrum
            if checkpoint is not None:
                parts.add(layer.name, spectrum_tensors(layer.name, spectrum))
        if progress is not None:
            progress(at("decompose", layer.name), len(spectra), len(layers))
    parts.finish()
    return spectra


def _diagonals(walk: Walk, stats: Mapping[str, Stats]) -> Iterator[Tensor]:
    """Enough of all statistics to tell two measurements apart."""
    for layer in walk.layers:
        if layer.name not in stats:
            continue
        for stat in Stat:
            measured = getattr(stats[layer.name], stat.value)
            if measured is not None:
                yield measured.diagonal() if measured.ndim == 2 else measured


def solve_at_ranks(
    method: LayerMethod, walk: Walk, spectra: MutableMapping[str, Spectrum], plan: Plan, stats: Mapping[str, Stats]
) -> None:
    """What `method.at_rank` makes of each cut that this process has, in place."""
    if type(method).at_rank is LayerMethod.at_rank:
        return
    for layer in walk.layers:
        if layer.name not in stats:
            continue
        target, spectrum = plan.targets[layer.name], spectra[layer.name]
        if target.codec == "dense":
            continue
        cut = truncate(spectrum, target.rank)
        with solver_errors_of(layer.name, f"its factors at rank {target.rank} ({method.info.name})"):
            solved = method.at_rank(spectrum.left @ spectrum.right, cut, stats[layer.name])
        if solved is not cut:
            spectra[layer.name] = Spectrum(*solved, spectrum.energy)


def place_cut(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    name: str,
    spectrum: Spectrum,
    target: Target,
    mean: Tensor | None = None,
) -> None:
    """A layer at `target` as a dense module of `student`: it computes what the encoded one does, to rounding."""
    module = linear_at(dense, name)
    weight, bias = weight_of(module).detach(), module.bias
    cut = truncate(spectrum, len(spectrum.energy) if target.codec == "dense" else target.rank)
    placed = dense_replacement((cut.left @ cut.right).to(weight.dtype), None if bias is None else bias.detach())
    if mean is not None and target.codec != "dense":
        placed = with_mean_kept(placed, weight, mean)
    swap(student, name, placed)


def encode_layer(
    module: nn.Module,
    given: Spectrum | Factors,
    target: Target,
    *,
    learned: bool = False,
    mean: Tensor | None = None,
) -> Replacement:
    """One layer in its target codec, its bias carried over. `learned` factors replace the weight even when dense.

    With the `mean` (I,) of its inputs, the bias makes up for the mean of what is lost.
    """
    weight = weight_of(module).detach()
    bias = cast(nn.Linear, module).bias
    bias = None if bias is None else bias.detach()
    error = float(given.energy[target.rank :].sum()) if isinstance(given, Spectrum) else 0.0
    factors = truncate(given, target.rank) if isinstance(given, Spectrum) else given
    wide = Factors(factors.left.double(), factors.right.double())
    if target.codec == "dense":
        return dense_replacement((wide.left @ wide.right).to(weight.dtype) if learned else weight, bias)
    placed = encode(wide, target.codec, like=weight, bias=bias, error=error)
    return placed if mean is None else with_mean_kept(placed, weight, mean)


def swap(model: PreTrainedModel, name: str, replacement: Replacement) -> None:
    """Put a module with the replacement's tensors where the layer stood; the old module is not changed."""
    old = model.get_submodule(name)
    if replacement.codec == "dense":
        weight = replacement.tensors["weight"]
        if weight.data_ptr() == weight_of(old).data_ptr():
            return
        new: nn.Module = copy.deepcopy(old)
        weight_of(new).data.copy_(weight)
        bias = replacement.bias
        new.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone(), requires_grad=False))
    else:
        new = build_linear(replacement, width_of(old))
    model.set_submodule(name, new.train(old.training))
    if isinstance(new, SharedLinear):
        new.link(model)


def width_of(module: nn.Module) -> int:
    """How many numbers a linear layer reads, dense or stored."""
    return module.in_features if isinstance(module, StoredLinear) else weight_of(module).shape[1]


def build_linear(replacement: Replacement, inputs: int | None = None) -> nn.Module:
    """The low-rank module that holds a replacement's tensors: these, not copies; of its bias, which the dense layer may
    hold too, a copy. Of a layer that shares, `inputs` says what it reads.
    """
    tensors = replacement.tensors
    own: dict[str, Any] = {"bias": replacement.bias is not None}
    if replacement.codec in SHARED:
        assert inputs is not None
        like = tensors["U.weight"]
        sizes, bias_name = (inputs, len(like), replacement.rank), "U.bias"
        own["basis"] = replacement.basis
    elif replacement.codec == "factor":
        like = tensors["V.weight"]
        sizes, bias_name = (like.shape[1], len(tensors["U.weight"]), replacement.rank), "U.bias"
    else:
        like = tensors["pivot.weight"]
        sizes, bias_name = (like.shape[1], len(like) + len(tensors["rest.weight"]), replacement.rank), "bias"
    module: Any = codec_class(replacement.codec)
    module = module(*sizes, **own, device=like.device, dtype=like.dtype)
    bias = {} if replacement.bias is None else {bias_name: replacement.bias.clone()}
    module.load_state_dict({**tensors, "weight": module.weight, **bias}, assign=True)
    return module


def apply_plan(
    model: PreTrainedModel,
    walk: Walk,
    plan: Plan,
    given: Mapping[str, Spectrum] | Mapping[str, Factors],
    *,
    learned: bool = False,
    means: Mapping[str, Tensor] | None = None,
) -> dict[str, Replacement]:
    """Encode and swap every layer; returns what was put in place. `means` of inputs that biases make up for."""
    means = {} if means is None else means
    together = encode_groups(model, walk, plan, given)

    def encode_one(layer: Layer) -> Replacement:
        module, target = linear_at(model, layer.name), plan.targets[layer.name]
        if layer.name in together:
            return together[layer.name]
        if stays(layer):
            return dense_replacement(weight_of(module).detach(), None if module.bias is None else module.bias.detach())
        with solver_errors_of(layer.name, "its factors"):
            return encode_layer(module, given[layer.name], target, learned=learned, mean=means.get(layer.name))

    def stays(layer: Layer) -> bool:
        return plan.targets[layer.name].codec == "dense" and not learned

    placed = encode_spread(model, walk, given, stays, encode_one)
    for layer in walk.layers:
        swap(model, layer.name, placed[layer.name])
    return placed


def encode_groups(
    model: PreTrainedModel, walk: Walk, plan: Plan, given: Mapping[str, Spectrum] | Mapping[str, Factors]
) -> dict[str, Replacement]:
    """The layers that share a right factor, group by group."""
    groups: dict[str, list[str]] = {}
    for layer in walk.layers:
        target = plan.targets[layer.name]
        if target.codec in SHARED:
            groups.setdefault(target.basis or layer.name, []).append(layer.name)
    found: dict[str, Replacement] = {}
    for owner, names in groups.items():
        target, modules = plan.targets[owner], [linear_at(model, name) for name in names]
        cuts = [Factors(own.left[:, : target.rank], own.right[: target.rank]) for own in (given[n] for n in names)]
        energies = [own.energy if isinstance(own := given[name], Spectrum) else None for name in names]
        with solver_errors_of(owner, f"the factors of {len(names)} layers"):
            made = encode_shared(
                [Factors(cut.left.double(), cut.right.double()) for cut in cuts], target.codec, owner,
                like=[weight_of(module).detach() for module in modules],
                biases=[None if module.bias is None else module.bias.detach() for module in modules],
                errors=[0.0 if energy is None else float(energy[target.rank :].sum()) for energy in energies],
            )  # fmt: skip
        found |= zip(names, made, strict=True)
    return found
