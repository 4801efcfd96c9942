"""Whether a closed form goes over all layers at once (run.py) or block by block (large.py): by the memory at hand.

    the least it holds     sums of one measurement, spectra     up to WHOLE_SHARE of a GPU: at once
    what it really holds   rounds and couplings counted         up to MOST_SHARE: at once, where blocks cannot serve
    above                  block by block, without the coupling unless it was asked for by name; or refused

Weights are not needed, so that a refusal comes before they are loaded.
"""

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import torch

from spectrim.engines.measure_blocks import whole_bytes
from spectrim.errors import UsageError
from spectrim.memory import MOST_SHARE, fits_whole
from spectrim.method import LayerMethod, Method
from spectrim.models.walk import Walk


class Way(NamedTuple):
    """How, with which method, and what is to be said of it."""

    whole: bool
    method: Method
    warnings: tuple[str, ...] = ()


def way_of(device: torch.device, walk: Walk, method: Method, insists: Collection[str] = ()) -> Way:
    """How the closed form of `method` goes on a device; `insists` names the options that were asked for by name.

    UsageError where the method can go neither way as it was asked for.
    """
    if not isinstance(method, LayerMethod):
        return Way(True, method)
    if fits_whole(device, whole_bytes(walk, method.needs) + spectra_bytes(walk)):
        return Way(True, method)
    wanted = needs_all_layers(method)
    if not wanted:
        return Way(False, method)
    held = run_bytes(walk, method)
    if fits_whole(device, held, MOST_SHARE):
        return Way(True, method)
    too_much = (
        f"method {method.info.name}: {', '.join(wanted)} holds sums of all layers at once, here about "
        f"{held / 2**30:.1f} GiB, and at most {MOST_SHARE:.0%} of this device's memory may go there"
    )
    fields = {field.name for field in dataclasses.fields(method)}
    if list(wanted) == ["coupling=sequence"] and "coupling" in fields and "coupling" not in insists:
        told = f"{too_much}; the model was measured block by block, with coupling=none"
        return Way(False, dataclasses.replace(method, coupling="none"), (told,))
    raise UsageError(
        f"{too_much}; block by block it cannot be done. Use {' '.join(wanted.values())}, a larger GPU, or --device cpu"
    )


def needs_all_layers(method: LayerMethod) -> dict[str, str]:
    """What of a method is not there block by block, and the option that leaves it out."""
    found = {}
    if method.refinement is not None:
        found["coupling=sequence"] = "--set coupling=none"
    if method.rounds > 1:
        found[f"rounds={method.rounds}"] = "--set rounds=1"
    if method.allocation == "order":
        found["allocation=order"] = "--set allocation=global"
    if method.shares:
        found[f"storage={method.storage}"] = f"--set storage={method.alone}"
    return found


def run_bytes(walk: Walk, method: LayerMethod) -> int:
    """Sums and spectra that run.py holds at its worst moment, float64.

    Of a later round: the first sums, the second, their mean. A coupling holds sums of its own and inverses in float32
    beside the plain ones, and in a later round the first ones too.
    """
    plain = 3.0 if method.rounds else 1.0
    coupled = (2.5 + (1 if method.rounds else 0)) if method.refinement is not None else 0.0
    return int(max(plain, coupled) * whole_bytes(walk, method.needs)) + spectra_bytes(walk)


def spectra_bytes(walk: Walk) -> int:
    """All components of all layers, float64."""
    return 8 * sum(min(la.outputs, la.inputs) * (la.outputs + la.inputs) for la in walk.layers)
