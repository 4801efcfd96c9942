"""The closed form in a checkpoint: spectra and ranks, so that going on neither measures nor decomposes again.

Learned scores belong to one sign and order of the components, which another decomposition need not give; so a run that
goes on must take the spectra of the run that was interrupted. They are large (for learned scores: all components in
float32, K (O + I) numbers a layer) and are therefore saved when there is a later state to save, or when that is little
beside the work they took. Once they are there, the states of all that led to them are removed.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from spectrim.engines.checkpoint import Saved
from spectrim.engines.pack import find, fingerprint
from spectrim.engines.ranks import Plan, plan_from_facts, plan_to_facts
from spectrim.engines.shelf import SpectraShelf
from spectrim.errors import InputError
from spectrim.linalg.factor import Spectrum
from spectrim.method import LayerMethod
from spectrim.models.walk import Walk, weight_of

STAGE = "closed form"
LEADS_TO_IT = ("statistics", "coupling", "spectra", "propagated", "newton")
"""Stages of the closed form, by how their names start; the state of it stands for all of them."""


def identity(method: LayerMethod, walk: Walk, keep: float, seed: int, calibration: Tensor) -> dict[str, Any]:
    """What decides the closed form and all that follows it, JSON-ready.

    Not the learning rate: after a run that diverged, one may go on from its last good state with a lower one.
    """
    return {
        "method": {name: value for name, value in method.to_config().items() if name != "learning_rate"},
        "keep": keep,
        "seed": seed,
        "calibration": fingerprint(calibration),
        "layers": {layer.name: [layer.outputs, layer.inputs] for layer in walk.layers},
    }


def pack_closed_form(
    spectra: Mapping[str, Spectrum],
    plan: Plan,
    run: dict[str, Any],
    *,
    learned: bool,
    changed: bool,
    every: bool = False,
    warnings: Sequence[str] = (),
    means: Mapping[str, Tensor] | None = None,
) -> Saved:
    """On the CPU: all components in float32 where scores are learned on them, else those that are kept, in float64.

    `changed` says that weights that stay dense are not the model's own: their components are then kept too. `every`
    keeps all components of all layers in float64, for a result that serves more sizes than that of `plan`.
    """
    tensors: dict[str, Tensor] = {}
    for name, spectrum in spectra.items():
        target = plan.targets[name]
        left_alone = target.codec == "dense" and not changed
        count = len(spectrum.energy) if learned or every else 0 if left_alone else target.rank
        left, right = spectrum.left[:, :count], spectrum.right[:count]
        tensors[f"{name}.left"] = (left.float() if learned else left).contiguous().cpu()
        tensors[f"{name}.right"] = (right.float() if learned else right).contiguous().cpu()
        tensors[f"{name}.energy"] = spectrum.energy.cpu()
    tensors |= {f"{name}.mean": mean.cpu() for name, mean in (means or {}).items()}
    return Saved(1, tensors, {"run": run, "plan": plan_to_facts(plan), "warnings": list(warnings)})


def unpack_closed_form(
    saved: Saved, model: PreTrainedModel, walk: Walk, run: dict[str, Any], into: MutableMapping[str, Spectrum]
) -> tuple[Plan, dict[str, Tensor], list[str]]:
    """The plan, means, and warnings; InputError when they are of another run. The spectra are put `into` a shelf, which
    chooses where they lie, or a dict, then on their weights' devices; means and energies are there in any case.
    """
    for name, value in run.items():
        if saved.facts["run"].get(name) != value:
            raise InputError(
                f"checkpoint: it is of a run with another {name} ({_short(saved.facts['run'].get(name))}, now "
                f"{_short(value)}); go on with what it was made with, or remove it"
            )
    means = {}
    for layer in walk.layers:
        device = weight_of(model.get_submodule(layer.name)).device
        left, right, energy = (find(saved.tensors, f"{layer.name}.{part}") for part in ("left", "right", "energy"))
        if not isinstance(into, SpectraShelf):
            left, right = left.to(device), right.to(device)
        into[layer.name] = Spectrum(left, right, energy.to(device))
        if f"{layer.name}.mean" in saved.tensors:
            means[layer.name] = find(saved.tensors, f"{layer.name}.mean").to(device)
    return plan_from_facts(saved.facts["plan"]), means, list(saved.facts["warnings"])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
