"""Every method by name. Two literal tables; adding a method is adding one line."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from spectrim.errors import UsageError, did_you_mean

if TYPE_CHECKING:  # methods import torch: a wrong name is told without it
    from spectrim.method import Method

METHODS = {
    "svd": "spectrim.methods.weights.svd:SVD",
    "asvd": "spectrim.methods.weights.asvd:ASVD",
    "fwsvd": "spectrim.methods.weights.fwsvd:FWSVD",
    "tfwsvd": "spectrim.methods.weights.tfwsvd:TFWSVD",
    "svd-llm": "spectrim.methods.weights.svd_llm:SVDLLM",
    "afm": "spectrim.methods.weights.afm:AFM",
    "lord": "spectrim.methods.weights.lord:LoRD",
    "welore": "spectrim.methods.weights.welore:WeLore",
    "zero-sum": "spectrim.methods.weights.zero_sum:ZeroSum",
    "mpifa": "spectrim.methods.weights.mpifa:MPIFA",
    "two-sided": "spectrim.methods.weights.two_sided:TwoSided",
    "acip": "spectrim.methods.weights.acip:ACIP",
    "soco": "spectrim.methods.weights.soco:SoCo",
}
"""Methods that treat one weight at a time (method.LayerMethod)."""

MODEL_METHODS: dict[str, str] = {
    "slicegpt": "spectrim.methods.weights.slicegpt:SliceGPT",
    "modegpt": "spectrim.methods.weights.modegpt:MoDeGPT",
    "compactifai": "spectrim.methods.weights.compactifai:CompactifAI",
    "dsformer": "spectrim.methods.weights.dsformer:DSFormer",
    "basis-sharing": "spectrim.methods.weights.basis_sharing:BasisSharing",
    "lpaf": "spectrim.methods.weights.lpaf:LPAF",
    "rtn": "spectrim.methods.weights.rtn:RTN",
    "trellis": "spectrim.methods.weights.trellis:Trellis",
    "gptq": "spectrim.methods.weights.gptq:GPTQ",
    "eora": "spectrim.methods.weights.eora:EoRA",
    "squeezellm": "spectrim.methods.weights.squeezellm:SqueezeLLM",
    "spqr": "spectrim.methods.weights.spqr:SpQR",
    "gqsa": "spectrim.methods.weights.gqsa:GQSA",
    "int2.1": "spectrim.methods.weights.int21:INT21",
    "lq-lora": "spectrim.methods.weights.lq_lora:LQLoRA",
}
"""Methods that treat the model as a whole (model_method.ModelMethod)."""


def all_methods() -> dict[str, str]:
    """Both tables."""
    return {**METHODS, **MODEL_METHODS}


def check_name(name: str) -> None:
    """UsageError for a name that no method has."""
    if name not in all_methods():
        raise UsageError(f"unknown method {name!r}{did_you_mean(name, all_methods())}")


def method_class(name: str) -> "type[Method]":
    """The class behind a name, imported at first use."""
    check_name(name)
    module, _, attribute = all_methods()[name].partition(":")
    return getattr(import_module(module), attribute)


def make_method(name: str, preset: str | None = None, options: dict[str, object] | None = None) -> "Method":
    """A configured method: the preset's values, overridden by `options`."""
    cls = method_class(name)
    preset = preset or cls.default_preset
    values: dict[str, object] = {}
    if preset is not None:
        if not cls.presets:
            raise UsageError(f"method {name} has no presets (it does not train); leave --preset out")
        if preset not in cls.presets:
            raise UsageError(f"method {name}: unknown preset {preset!r}{did_you_mean(preset, cls.presets)}")
        values.update(cls.presets[preset])
    return cls.from_config({**values, **(options or {})})


def cost_of(cls: "type[Method]") -> str:
    """What a run does beside decomposing each weight, the dearest last."""
    from spectrim.method import SEARCHED, LayerMethod, TrainedMethod
    from spectrim.stats import GRADIENT_STATS

    steps = []
    if cls.needs & GRADIENT_STATS:
        steps.append("gradients")
    elif cls.needs:
        steps.append("forward passes")
    if issubclass(cls, LayerMethod) and cls.at_rank is not LayerMethod.at_rank:
        steps.append("iterations")
    if issubclass(cls, LayerMethod) and cls.allocation in SEARCHED:
        steps.append("search")
    if isinstance(cls.recovery, tuple):  # a property depends on the options
        steps.extend(cls.recovery)
    if issubclass(cls, TrainedMethod) or cls().windows_trained:
        steps.append("training")
    return ", ".join(steps) or "nothing"


def describe_methods() -> list[dict[str, Any]]:
    """One row a method, for the table of `spectrim methods`."""
    return [
        {
            "name": name,
            "family": cls.info.family,
            "paper": cls.info.paper,
            "needs": sorted(s.value for s in cls.needs),
            "cost": cost_of(cls),
            "presets": list(cls.presets),
            "promise": cls.info.promise,
        }
        for name, cls in ((name, method_class(name)) for name in all_methods())
    ]
