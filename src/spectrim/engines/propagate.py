"""Each weight makes up for the error of its inputs before it is cut: in running order, after the ranks are planned.

Going through the blocks, and inside a block through the groups of layers that share an input:

    x  the group's input in the dense model, x' in the compressed one (everything before it already placed)
    W* = W + t mix W (E[x x'^T] - S) (S + ridge)^-1,  S = E[x' x'^T]         linalg/factor.drift_target
    W* is decomposed in the method's metric, with a share t of S in its input Gram, and cut to the planned rank
    t  how far moments of so many inputs can be trusted over so many tokens   linalg/factor.token_share

A layer that stays dense becomes W* itself: the correction costs nothing there. Unlike refit, which solves for one
factor when the other is chosen, both factors are chosen for the new target. All components of W* are kept in the
spectra, so that learned scores go on from them.

Source of sequential targets: SVD-LLM's update (arXiv 2403.07378). Only a share is asked for: making up for the whole
error overfits the calibration text, on which C and S are measured.
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Checkpoint
from spectrim.engines.layerwise import decompose_layer, place_cut, solver_errors_of
from spectrim.engines.learned import skeleton
from spectrim.engines.measure import Progress, autocast, frozen
from spectrim.engines.parts import Parts, energies_of, spectrum_from, spectrum_tensors
from spectrim.engines.ranks import Plan, plan_to_facts
from spectrim.engines.sharing import decompose_group
from spectrim.engines.spread import handed_some, holders_of, own_windows
from spectrim.engines.stream import Stream, input_moments, inputs_of, start
from spectrim.linalg.factor import Spectrum, drift_target, token_share
from spectrim.memory import has_room
from spectrim.method import LayerMethod
from spectrim.models.walk import Layer, Walk, device_of, shared_inputs, weight_of
from spectrim.processes import present
from spectrim.replacement import SHARED
from spectrim.stats import Stat, Stats

STAGE = "propagated"


@torch.no_grad()
def propagate(
    method: LayerMethod,
    dense: PreTrainedModel,
    walk: Walk,
    spectra: MutableMapping[str, Spectrum],
    plan: Plan,
    stats: Mapping[str, Stats],
    ids: Tensor,
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
    after: str | None = None,
    begin: Callable[[PreTrainedModel, Walk, Tensor, int], Stream] = start,
) -> list[str]:
    """Put the spectra of all W* into `spectra`, layer by layer, for `ids` (windows, length); returns warnings.

    In place, since all components of all layers are the largest thing in memory. Layers whose tokens are routed keep
    their spectra and are named in a warning: the two models route differently, so that inputs have no partner.

    Several processes share the windows; each layer is decomposed, and kept, by the one that has its `stats`.

    With a `checkpoint` finished blocks are kept in parts; going on, both models pass them again without measuring.
    `after` says by a hash what the spectra were at first: a try that failed has replaced some of them. `begin` makes
    the streams of both models (relay.entered runs no block for that).

    Of the compressed model one block is there at a time.
    """
    layers = {layer.name: layer for layer in walk.layers}
    unpaired: list[str] = []
    run = {} if checkpoint is None else {"after": after or energies_of(spectra), "plan": plan_to_facts(plan)}
    parts = Parts(checkpoint, STAGE, run)
    finished = _restore(parts, dense, spectra, unpaired)
    with frozen(dense), autocast(device_of(dense)):
        student = skeleton(dense)
        groups = shared_inputs(dense, walk.layers)  # in running order
        owners, mine = holders_of(walk, stats), own_windows(ids)
        full, small = begin(dense, walk, mine, batch_size), begin(student, walk, mine, batch_size)
        for block in range(len(walk.block_names)):
            here = [group for group in groups if layers[group[0]].block == block]
            leaders = [layers[group[0]] for group in here]
            known = inputs_of(full, block, [la.name for la in leaders]) if _has_room(full, leaders) else {}
            before = {name: student.get_submodule(name) for group in here for name in group}
            for group in here:
                seen, moments = known.pop(group[0], None), None
                if block >= finished:
                    moments = _moments(full, small, block, group[0], seen, len(mine) / len(ids))
                del seen  # inputs of all windows, as large as the matrices that are decomposed next
                if block >= finished:
                    unpaired += group if moments is None else []
                    own = [layers[name] for name in group if name in stats]
                    shared = plan.targets[group[0]].codec in SHARED
                    _decompose(method, dense, own, spectra, stats, moments, ids.numel(), together=shared)
                there = handed_some(dense, group, owners, spectra.__getitem__)
                for name in group:
                    place_cut(student, dense, name, there[name], plan.targets[name])
            if block >= finished:
                _keep(parts, [name for group in here for name in group if name not in unpaired], unpaired, spectra)
            for stream in (full, small):
                stream.advance(block)
            for name, module in before.items():  # no later block runs this one: what was placed in it goes
                student.set_submodule(name, module)
            if progress is not None:
                progress("propagate", block + 1, len(walk.block_names))
    parts.finish()
    return [_warning(unpaired)] if unpaired else []


def _has_room(full: Stream, leaders: Sequence[Layer]) -> bool:
    """Whether the inputs of all groups of a block, which the dense model has in one pass, are held on a GPU at once.

    Without room that model runs up to each group in turn, as it does on a CPU, whose memory is not ours to fill.
    """
    numbers = sum(hidden.shape[:-1].numel() for hidden in full.hidden) * sum(la.inputs for la in leaders)
    first = full.hidden[0] if full.hidden else None
    return first is not None and first.is_cuda and has_room(first.device, numbers * first.element_size())


def _moments(
    full: Stream, small: Stream, block: int, name: str, known: list[Tensor] | None, share: float
) -> tuple[Tensor, Tensor] | None:
    """`input_moments` over the windows of all ranks, of which this one has a `share`; the same bits everywhere."""
    own, group = input_moments(full, small, block, name, known), present()
    if group.alone:
        return own
    if not all(group.objects(own is not None)):
        return None
    assert own is not None
    return group.sum_everywhere(own[0] * share), group.sum_everywhere(own[1] * share)


def _keep(parts: Parts, paired: list[str], unpaired: list[str], spectra: Mapping[str, Spectrum]) -> None:
    """One more block is done."""
    if parts.checkpoint is not None:
        tensors = {k: t for name in paired for k, t in spectrum_tensors(name, spectra[name]).items()}
        parts.add({"paired": paired, "unpaired": list(unpaired)}, tensors)


def _restore(
    parts: Parts,
    dense: PreTrainedModel,
    spectra: MutableMapping[str, Spectrum],
    unpaired: list[str],
) -> int:
    """Take up the blocks that are in a checkpoint; how many. Each item names the unpaired layers up to it."""
    for saved in parts.load():
        for item in saved.facts["items"]:
            unpaired[:] = item["unpaired"]
            for name in item["paired"]:
                spectra[name] = spectrum_from(saved.tensors, name, weight_of(dense.get_submodule(name)).device)
    return parts.saved


def _decompose(
    method: LayerMethod,
    dense: PreTrainedModel,
    layers: Sequence[Layer],
    spectra: MutableMapping[str, Spectrum],
    stats: Mapping[str, Stats],
    moments: tuple[Tensor, Tensor] | None,
    tokens: int,
    *,
    together: bool,
) -> None:
    """The spectra of layers with one input, in place: of W*, or of the weight where the input has no partner.

    `together`: they share their right factor.
    """
    weights = [weight_of(dense.get_submodule(layer.name)).double() for layer in layers]
    if moments is not None:
        given = [
            _corrected(method, layer, weight, stats[layer.name], moments, tokens)
            for layer, weight in zip(layers, weights, strict=True)
        ]
        if together:
            found = decompose_group(method, tuple(layers), *zip(*given, strict=True)).spectra()
        else:
            found = [decompose_layer(method, layer, *own) for layer, own in zip(layers, given, strict=True)]
        spectra.update(zip((layer.name for layer in layers), found, strict=True))
        return
    for layer, weight in zip(layers, weights, strict=True):
        if layer.name not in spectra:  # only the energies were worked out (large.py)
            spectra[layer.name] = decompose_layer(method, layer, weight, stats[layer.name])


def _corrected(
    method: LayerMethod, layer: Layer, weight: Tensor, stats: Stats, moments: tuple[Tensor, Tensor], tokens: int
) -> tuple[Tensor, Stats]:
    """W* and the statistics of its metric; target and metric move by what the tokens are worth."""
    cross, gram = moments
    share = token_share(tokens, len(gram))
    with solver_errors_of(layer.name, "the input Gram matrix of the compressed model"):
        target = drift_target(weight, cross, gram, mix=share * method.error_share)
    # Energies stay in units of the loss: a coupled Gram matrix carries the size of the token correlation with it.
    first = stats.get(Stat.GRAM)
    size = first.diagonal().sum() / gram.diagonal().sum()
    scaled = gram * size if bool(torch.isfinite(size)) else gram  # an input that never fires has no size
    mixed = (1 - share) * first + share * scaled
    return target, dataclasses.replace(stats, gram=mixed)


def _warning(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"propagate: {shown}: tokens are routed to these layers by each model in its own way, or not at all; "
        "they do not make up for the error of their inputs"
    )
