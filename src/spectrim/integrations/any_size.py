"""Loading a folder that holds all sizes: only the asked size is read, as plain low-rank layers.

    AutoModelForCausalLM.from_pretrained(folder, size_ratio=0.6)

Before the weights are loaded, while the model has none: check what the files hold of each layer, work out every
layer's rank from the one order of all steps, put empty modules of those ranks in place (so that a device map sees the
true sizes). transformers then loads everything else; the components have names that no module has, which it skips
without reading. Afterwards each layer's first rows are read and written into its module, one layer at a time.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.nested import Nested, first_rank, plan_at, slice_at
from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.linalg.ladder import are_levels, ladder_costs
from spectrim.models.walk import Layer, Walk, is_linear, path_in, weight_of
from spectrim.nn.linears import LINEARS, LowRankLinear
from spectrim.replacement import Replacement, Storage, Target
from spectrim.store import TensorInfo, read_header
from spectrim.store.tensors import read_tensor

NESTED = "nested"
"""The codec of a layer that holds all of its components."""
MOST_ADAPTER_RANK = 65_536
"""As in the method's options (method.py)."""
FLOATS = ("F32", "BF16", "F16")
DTYPES = {"levels": ("I32",), "scores": ("F32",)}
"""What tensors may be that are not in the model's dtype."""
IGNORED = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
"""Where a model keeps the names that transformers is not to complain about."""


@dataclass(frozen=True, kw_only=True)
class AnySizeFormat:
    """`quantization_config.any_size`: how a slice is stored, the sizes of the scores' rows, the adapters' rank."""

    storage: Storage
    anchors: tuple[float, ...]  # descending from 1; the last is the smallest size there is
    adapter_rank: int = 0  # so many components of every layer come first and stay at every size

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Checked; the file is not trusted."""
        anchors = found.get("anchors") if isinstance(found, dict) else None
        ok = (
            isinstance(found, dict)
            and found.get("storage") in ("pivot", "factor")
            and isinstance(anchors, list)
            and all(type(a) in (int, float) and 0 < a <= 1 for a in anchors)
            and anchors[:1] == [1.0]
            and all(a > b for a, b in pairwise(anchors))
            and type(found.get("adapter_rank", 0)) is int
            and 0 <= found.get("adapter_rank", 0) <= MOST_ADAPTER_RANK
        )
        if not ok:
            raise InputError(
                f"config.json: quantization_config.any_size is {found!r}; expected storage factor or pivot, anchors "
                f"that descend from 1.0 towards 0, and an adapter_rank from 0 to {MOST_ADAPTER_RANK:,} if any"
            )
        sizes = tuple(float(a) for a in cast(list[float], anchors))
        return cls(storage=found["storage"], anchors=sizes, adapter_rank=found.get("adapter_rank", 0))

    def to_json(self) -> dict[str, Any]:
        """As in config.json."""
        adapters = {"adapter_rank": self.adapter_rank} if self.adapter_rank else {}
        return {"storage": self.storage, "anchors": list(self.anchors), **adapters}

    def check_size(self, size: Any) -> float:
        """Refuse a size that the folder does not hold."""
        smallest = self.anchors[-1]
        if type(size) not in (int, float) or not smallest <= size <= 1:
            raise UsageError(
                f"size_ratio={size!r}: this folder holds every size from {smallest:g} to 1 "
                "(the share of the decoder linears' numbers that remains)"
            )
        return float(size)


class DenseSlot(nn.Module):
    """Where a layer is dense at the asked size: the layer, and the zero-element `weight` that the file has for it."""

    weight: Tensor

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("weight", torch.empty(0, device=weight_of(whole).device, dtype=weight_of(whole).dtype))


class Slices:
    """The layers of one model at one size, between the two moments at which transformers calls us."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, dict[str, Any]],
        stored: AnySizeFormat,
        files: Iterable[str | Path],
    ) -> None:
        self.model, self.modules, self.stored = model, modules, stored
        self.size = stored.check_size(getattr(model.config, "size_ratio", None))
        self.shapes = locate(files)
        self.ignored: dict[str, Any] = {}
        present = dict(model.named_modules())
        self.names = {path: self._name(path, present) for path in modules}
        with torch.device("cpu"):  # transformers builds models under the meta device; ranks are worked out for real
            self.targets = self._plan(present)

    def _plan(self, present: Mapping[str, nn.Module]) -> Mapping[str, Target]:
        """What each layer is at the size."""
        layers = tuple(self._layer(path, present[name]) for path, name in self.names.items())
        if not layers:
            raise InputError("config.json: quantization_config.modules is empty in a folder that is to hold all sizes")
        self.levels = {layer.name: self._read(layer.name, "levels") for layer in layers}
        if not are_levels(list(self.levels.values())):
            raise InputError(
                "the steps of all layers (`levels`) do not make one order, each place once: the files are damaged"
            )
        walk = Walk(layers=layers, block_names=(), untouched=())
        return plan_at(walk, self.levels, self.stored.storage, self.size, adapter_rank=self.stored.adapter_rank).targets

    def _name(self, path: str, present: Mapping[str, nn.Module]) -> str:
        name = path_in(present, path, self.model.base_model_prefix)
        if name is None:
            raise InputError(
                f"config.json lists {path}, which {type(self.model).__name__} does not have; ranks are chosen for all "
                "layers together, so that none may be missing"
            )
        if not is_linear(present[name]):
            raise InputError(f"config.json lists {path}, which is a {type(present[name]).__name__}, not a linear layer")
        return name

    def _layer(self, path: str, module: nn.Module) -> Layer:
        """What the layer looks like, after the shapes in the files are found to be those of it."""
        (outputs, inputs), entry = weight_of(module).shape, self.modules[path]
        adapter_rank, storage = self.stored.adapter_rank, self.stored.storage
        rank, anchors = min(outputs, inputs) + adapter_rank, len(self.stored.anchors)
        expected = {
            "left": (rank, outputs),
            "right": (rank, inputs),
            "scores": (anchors, rank),
            "levels": (len(ladder_costs(outputs, inputs, storage, first_rank(adapter_rank))) - 1,),
            "weight": (0,),
            **({"bias": (outputs,)} if entry["bias"] else {}),
        }
        found = {key: info.shape for key, info in self.shapes.get(path, {}).items()}
        if entry["rank"] != rank or found != expected:
            raise InputError(
                f"{path}: the files hold {_shown(found)} and config.json gives rank {entry['rank']}; a layer of "
                f"{outputs} x {inputs} in all sizes holds {_shown(expected)}. The folder is damaged or was edited"
            )
        for key, info in self.shapes[path].items():
            allowed = DTYPES.get(key, FLOATS)
            if info.dtype not in allowed:
                raise InputError(f"{path}.{key}: is {info.dtype}, expected {' or '.join(allowed)}; damaged file")
        return Layer(name=path, block=0, outputs=outputs, inputs=inputs, has_bias=entry["bias"])

    def _read(self, path: str, key: str, rows: int | None = None) -> Tensor:
        """One tensor, or its first rows; nothing else of the file."""
        return read_tensor(self.shapes[path][key], rows)

    def install(self) -> None:
        """Empty modules of the right ranks; transformers is told to leave their tensors to us."""
        for path, name in self.names.items():
            old, target = self.model.get_submodule(name), self.targets[path]
            outputs, inputs = weight_of(old).shape
            if target.codec == "dense":
                new: nn.Module = DenseSlot(old)
            else:
                options = {"device": weight_of(old).device, "dtype": weight_of(old).dtype}
                new = LINEARS[target.codec](inputs, outputs, target.rank, bias=self.modules[path]["bias"], **options)
            for module in new.modules():
                setattr(module, "_is_hf_initialized", True)  # noqa: B010  no random numbers for what is filled anyway
            self.model.set_submodule(name, new)
        prefix = self.model.base_model_prefix + "."
        patterns = [rf"(^|\.){re.escape(path.removeprefix(prefix))}\." for path in self.names]
        for attribute in IGNORED:
            known = getattr(self.model, attribute, None)
            self.ignored[attribute] = known
            kind = list if known is None else type(known)  # a set in new releases, which never leave it None
            setattr(self.model, attribute, kind([*(known or ()), *patterns]))

    @torch.no_grad()
    def fill(self) -> None:
        """Read each layer's slice, bring it into its storage, write it where the layer stands."""
        for attribute, known in self.ignored.items():
            setattr(self.model, attribute, known)
        for path, name in self.names.items():
            module, target = self.model.get_submodule(name), self.targets[path]
            tensors = [*module.parameters(), *module.buffers()]
            if any(tensor.is_meta for tensor in tensors):
                raise InputError(
                    f"{name}: was offloaded before its slice could be read; write the size first "
                    f"(spectrim export --keep {self.size:g}) and load that, or load without offloading"
                )
            device = tensors[0].device
            placed = self.slice_of(path, target, device if device.type != "mps" else torch.device("cpu"))
            if isinstance(module, DenseSlot):
                module = self._unpack(name, module)
            write(module, placed)

    def slice_of(self, path: str, target: Target, device: torch.device) -> Replacement:
        """One layer at the asked size, worked out on `device`."""
        rank = self.shapes[path]["left"].shape[0] if target.codec == "dense" else target.rank
        nested = Nested(
            left=self._read(path, "left", rank).to(device),
            right=self._read(path, "right", rank).to(device),
            scores=self._read(path, "scores").to(device),
            levels=self.levels[path],
            bias=self._read(path, "bias").to(device) if self.modules[path]["bias"] else None,
        )
        for key in ("left", "right", "scores"):
            if not bool(torch.isfinite(getattr(nested, key)).all()):
                raise NumericalError(f"{path}.{key}: holds NaN or Inf; none is allowed. The file is damaged")
        return slice_at(nested, target, self.stored.anchors, self.size)

    def _unpack(self, name: str, slot: DenseSlot) -> nn.Module:
        """The dense layer itself in the place of its slot."""
        self.model.set_submodule(name, slot.whole.train(slot.training))
        return slot.whole

    def modules_now(self) -> dict[str, dict[str, Any]]:
        """`modules` of config.json for the size that was loaded; dense layers are not listed."""
        return {
            path: {"codec": target.codec, "rank": target.rank, "bias": self.modules[path]["bias"]}
            for path, target in self.targets.items()
            if target.codec != "dense"
        }


def write(module: nn.Module, placed: Replacement) -> None:
    """Copy a replacement's tensors into a module of its shape, which keeps its device and dtype."""
    if placed.codec == "dense":
        weight_of(module).copy_(placed.tensors["weight"])
        bias = module.bias
    else:
        for key, tensor in placed.tensors.items():
            owner, _, attribute = key.rpartition(".")
            cast(Tensor, getattr(module.get_submodule(owner), attribute)).copy_(tensor)
        bias = module.U.bias if isinstance(module, LowRankLinear) else module.bias
    if placed.bias is not None:
        cast(Tensor, bias).copy_(placed.bias)


def locate(files: Iterable[str | Path]) -> dict[str, dict[str, TensorInfo]]:
    """What the headers say of each tensor, by module and key."""
    shapes: dict[str, dict[str, TensorInfo]] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            continue
        for name, info in read_header(file).items():
            owner, _, key = name.rpartition(".")
            shapes.setdefault(owner, {})[key] = info
    return shapes


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items())) or "nothing"
