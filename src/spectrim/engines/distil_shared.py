"""Distillation of layers that share their right factor: trained as one stacked product, stored again as they were."""

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.layerwise import build_linear
from spectrim.linalg.factor import Factors
from spectrim.linalg.metric import Root
from spectrim.models.walk import Walk
from spectrim.nn.shared import SharedLinear
from spectrim.nn.spectral import SpectralLinear, spectral_group
from spectrim.replacement import encode_shared

Metric = tuple[Root | None, Root | None]


def shared_layers(model: PreTrainedModel, walk: Walk) -> dict[str, SharedLinear]:
    """The target layers that share, by name."""
    modules = {layer.name: model.get_submodule(layer.name) for layer in walk.layers}
    return {name: module for name, module in modules.items() if isinstance(module, SharedLinear)}


def groups_in(layers: Mapping[str, SharedLinear]) -> list[list[str]]:
    """Names of the layers with one owner, which comes first."""
    names: dict[int, list[str]] = {id(layer): [name] for name, layer in layers.items() if layer.basis is None}
    for name, layer in layers.items():
        if layer.basis is not None:
            names[id(layer.owner)].append(name)
    return list(names.values())


def to_spectral_groups(layers: Mapping[str, SharedLinear], metric: Mapping[str, Metric]) -> dict[str, SpectralLinear]:
    """The same layers in the coordinates of their metrics; of a group, inputs are measured in its owner's."""
    found: dict[str, SpectralLinear] = {}
    for names in groups_in(layers):
        own = [layers[name] for name in names]
        right = own[0].basis_weight().detach().double()
        factors = [Factors(layer.U.weight.detach().double(), right) for layer in own]
        lefts = [metric[name][0] for name in names]
        made = spectral_group(factors, [layer.bias for layer in own], lefts, metric[names[0]][1])
        found |= zip(names, made, strict=True)
    return found


def from_spectral_groups(
    trained: Mapping[str, SpectralLinear], before: Mapping[str, SharedLinear]
) -> dict[str, nn.Module]:
    """Layers in the codec, rank and dtype that they had before training."""
    found: dict[str, nn.Module] = {}
    for names in groups_in(before):
        factors, biases = zip(*(trained[name].trained() for name in names), strict=True)
        like = [before[name].U.weight.detach() for name in names]
        cast: list[Tensor | None] = [
            None if bias is None else bias.to(w.dtype) for bias, w in zip(biases, like, strict=True)
        ]
        made = encode_shared(
            factors, before[names[0]].codec, names[0], like=like, biases=cast, errors=[0.0] * len(names)
        )
        for name, replacement in zip(names, made, strict=True):
            layer = build_linear(replacement, before[name].in_features).train(before[name].training)
            assert isinstance(layer, SharedLinear)
            if layer.basis is not None:
                layer.borrow(found[names[0]])
            found[name] = layer
    return found
