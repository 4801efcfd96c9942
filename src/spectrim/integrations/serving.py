"""Low-rank layers inside the fused layers of a serving engine (vLLM, SGLang); knows torch, and no engine.

An engine fuses q, k and v (or gate and up) into one layer and may split that between devices. The parts of a layer
have ranks of their own, or stay dense, so that their factors make no rectangle. Here: all first factors (`V`, or the
pivot rows) are stacked, which is one product for the whole layer; then one small product for each part; then, where a
part is in pivot storage, one gather that puts all outputs in place. Parts that share their first factor read the same
rows of the stack; where its pivots are inputs, it is written out when it is loaded (R^2 numbers more in memory).

    ServedLinear.attach     before loading: empty parameters under the names that the file's tensors will have
    ServedLinear.keep       each tensor, as the engine's loader hands it over: cut to this device's share
    ServedLinear.finish     after loading: what is missing is an error; the tensors that `forward` uses
    ServedLinear.forward    x (..., I) to (..., O)

Split over outputs (column-parallel): the first factors are whole on each device, the second ones are cut. Split over
inputs (row-parallel): the first are cut, the second whole; each device's result is then a share of the sum that the
engine makes anyway.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.errors import InputError
from spectrim.linalg.pivot import unpack_mask
from spectrim.linalg.shared import spread_basis
from spectrim.nn.linears import order_of
from spectrim.replacement import SHARED

SERVED = ("factor", "pivot", *SHARED)
"""Codecs that are served as they are stored."""
FIRST = {"factor": "V.weight", "pivot": "pivot.weight", "shared": "V.weight", "shared-pivot": "V.rest.weight"}
"""What is multiplied with the inputs."""
OF_INPUTS = ("V.weight", "pivot.weight", "weight")
"""Tensors with a column for each input."""
SHARDS = {"q": 0, "k": 1, "v": 2, None: 0}
"""What engines call the parts of a fused layer; numbers stand for themselves."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What of a (fused) layer this device holds; sizes are those of one device."""

    inputs: int
    outputs: tuple[int, ...]  # of each part that the engine fuses
    rank: int = 0  # of this device among those that share the layer
    replicas: int = 1  # devices that hold the same k and v heads
    over_inputs: bool = False  # row-parallel
    over_outputs: bool = False  # column-parallel

    def columns(self, tensor: Tensor) -> Tensor:
        """This device's inputs of a tensor (N, all inputs)."""
        return tensor.narrow(1, self.rank * self.inputs, self.inputs) if self.over_inputs else tensor

    def start(self, part: int) -> int:
        """Where this device's outputs start among all outputs of a part."""
        if not self.over_outputs:
            return 0
        replicas = self.replicas if part in (1, 2) and len(self.outputs) == 3 else 1
        return self.rank // replicas * self.outputs[part]

    def rows(self, part: int, stored: int, parts: int) -> Tensor:
        """Indices of this device's outputs among the `stored` ones of a matrix that is part `part` of `parts` files.

        One matrix may hold what the engine splits into several (Phi-3 stores q, k and v as one).
        """
        if parts > 1 or len(self.outputs) == 1:
            return torch.arange(self.start(part), self.start(part) + self.outputs[part])
        if not self.over_outputs:
            return torch.arange(stored)
        raise InputError(
            "a layer that the file stores as one and the engine splits into "
            f"{len(self.outputs)} parts cannot be cut for several devices; serve it on one, or its dense export"
        )


class ServedLinear:
    """The parts of one layer of an engine."""

    def __init__(self, name: str, entries: Sequence[Mapping[str, Any] | None], share: Share) -> None:
        """`entries`: of config.json, one for each part; None for a part that is dense."""
        self.name, self.share = name, share
        self.entries = [{"codec": "dense", "bias": False} if entry is None else entry for entry in entries]
        self.loaded: list[dict[str, Tensor]] = [{} for _ in entries]
        self.gathers = any(entry["codec"] == "pivot" for entry in self.entries)
        self.starts = self._starts()

    def _starts(self) -> list[int]:
        """Where each part's first products start among those of all parts; a dense part's do not matter."""
        found, at, shared = [], 0, 0
        for entry in self.entries:
            if borrows(entry):
                found.append(shared)
                continue
            shared = at if entry["codec"] in SHARED else shared
            found.append(at)
            at += entry.get("rank", 0) if entry["codec"] != "dense" else 0
        return found

    def keys(self, part: int) -> tuple[str, ...]:
        """Tensors that the file has to hold of a part, biases apart."""
        entry = self.entries[part]
        if borrows(entry):
            return ("U.weight",)
        return {
            "dense": ("weight",),
            "factor": ("V.weight", "U.weight"),
            "pivot": ("pivot.weight", "rest.weight", "mask"),
            "shared": ("V.weight", "U.weight"),
            "shared-pivot": ("V.rest.weight", "V.mask", "U.weight"),
        }[entry["codec"]]

    def attach(self, layer: nn.Module, dtype: torch.dtype) -> None:
        """Parameters without elements, whose `weight_loader(parameter, tensor, shard)` the engine calls."""
        for key in sorted({"weight", *(key for part in range(len(self.entries)) for key in self.keys(part))}):
            self._empty(layer, key, dtype, partial(self._from_file, key))
        if any(entry["codec"] in ("factor", *SHARED) and entry["bias"] for entry in self.entries):
            self._empty(layer, "U.bias", dtype, partial(self._bias_of, layer))

    def _empty(self, layer: nn.Module, key: str, dtype: torch.dtype, loader: Any) -> None:
        owner_name, _, attribute = key.rpartition(".")
        at = layer
        for name in owner_name.split(".") if owner_name else ():
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        kind = torch.uint8 if attribute == "mask" else dtype
        parameter = nn.Parameter(torch.empty(0, dtype=kind), requires_grad=False)
        setattr(parameter, "weight_loader", loader)  # noqa: B010  tensors take attributes, type checkers do not know
        layer.get_submodule(owner_name).register_parameter(attribute, parameter)

    def _from_file(self, key: str, parameter: Tensor, tensor: Tensor, shard: Any = None) -> None:
        part = SHARDS[shard] if shard in SHARDS else int(shard)
        self.keep(key, tensor, part, like=parameter)

    def _bias_of(self, layer: nn.Module, _: Tensor, tensor: Tensor, shard: Any = None) -> None:
        """The bias of a factor belongs to the layer, which adds it."""
        bias: Any = getattr(layer, "bias", None)
        if bias is None:
            raise InputError(
                f"{self.name}: has a bias that the architecture has no place for; no engine can serve it. "
                "Compress again with a method that adds no bias (svd-llm)"
            )
        bias.weight_loader(bias, tensor, *(() if shard is None else (shard,)))

    def keep(self, key: str, tensor: Tensor, part: int, *, like: Tensor) -> None:
        """One tensor of the file, cut, on the device and in the dtype of `like`; the guard is passed over."""
        if tensor.numel() == 0 and key == "weight":
            return
        codec = self.entries[part]["codec"]
        if key not in self.keys(part):
            raise InputError(
                f"{self.name}: part {part} is {codec} by config.json, the file holds a {key} of shape "
                f"{list(tensor.shape)}; the folder is damaged or was edited"
            )
        if key == FIRST.get(codec) and len(tensor) != self.entries[part]["rank"]:
            raise InputError(
                f"{self.name}: part {part} has rank {self.entries[part]['rank']} by config.json, {key} has shape "
                f"{list(tensor.shape)}; the folder is damaged or was edited"
            )
        if key in OF_INPUTS:
            tensor = self.share.columns(tensor)
        if key in ("U.weight", "weight"):  # what belongs to which output is known of `rest` when the mask is there
            tensor = tensor[self.share.rows(part, len(tensor), len(self.entries))]
        self.loaded[part][key] = tensor.to(device=like.device, dtype=like.dtype, copy=True)

    def finish(self, layer: nn.Module) -> None:
        """Put the tensors of `forward` in the place of the empty ones."""
        for part, found in enumerate(self.loaded):
            missing = sorted(set(self.keys(part)) - found.keys())
            if missing:
                raise InputError(
                    f"{self.name}: part {part} ({self.entries[part]['codec']}): the files do not hold "
                    f"{', '.join(missing)}; the folder is damaged, or the engine did not load its weights"
                )
            if self.entries[part]["codec"] == "pivot" and self.entries[part]["bias"] and _has_no_bias(layer):
                self._bias_of(layer, found["mask"], found["mask"])
        for name in ("V", "U", "pivot", "rest"):
            layer._modules.pop(name, None)
        for name in ("weight", "mask"):
            layer._parameters.pop(name, None)
        firsts = [
            self._first(entry, found)
            for entry, found in zip(self.entries, self.loaded, strict=True)
            if entry["codec"] in FIRST and not borrows(entry)
        ]
        _put(layer, "first", torch.cat(firsts))
        orders, end = [], sum(len(first) for first in firsts)
        for part, found in enumerate(self.loaded):
            second, order = self._second(part, self.starts[part], end)
            _put(layer, f"second_{part}", second)
            orders.append(order)
            end += len(second)
            found.clear()
        if self.gathers:
            order = torch.cat(orders).to(firsts[0].device)
            layer.register_buffer("order", order, persistent=False)

    def _first(self, entry: Mapping[str, Any], found: Mapping[str, Tensor]) -> Tensor:
        """This device's columns of what multiplies the inputs."""
        first = found[FIRST[entry["codec"]]]
        if entry["codec"] != "shared-pivot":
            return first
        mask = unpack_mask(found["V.mask"], sum(first.shape))
        if int(mask.sum()) != entry["rank"]:
            raise InputError(
                f"{self.name}: the mask marks {int(mask.sum())} inputs, the shared factor has rank {entry['rank']}; "
                "the folder is damaged or was edited"
            )
        return self.share.columns(spread_basis(first, mask))

    def _second(self, part: int, at: int, end: int) -> tuple[Tensor, Tensor]:
        """What a part multiplies last, and where each of its outputs stands among all candidates.

        The candidates are the stacked first products, of which this part's start at `at`, then the second products of
        all parts, of which this part's start at `end`.
        """
        codec, found = self.entries[part]["codec"], self.loaded[part]
        if codec != "pivot":
            second = found["weight" if codec == "dense" else "U.weight"]
            return second, end + torch.arange(len(second))
        rest, rank = found["rest.weight"], self.entries[part]["rank"]
        rows = self.share.rows(part, rank + len(rest), len(self.entries))
        try:
            order = order_of(found["mask"].cpu(), rank + len(rest), rank)[rows]
        except ValueError as error:
            raise InputError(f"{self.name}: part {part}: {error}") from error
        of_rest = order >= rank
        placed = torch.where(of_rest, end + of_rest.cumsum(0) - 1, at + order)
        return rest[(order[of_rest] - rank).to(rest.device)], placed

    def forward(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., inputs) to (..., outputs of all parts), on this device's share."""
        first = F.linear(x, layer.first)
        seconds = []
        for part, (entry, at) in enumerate(zip(self.entries, self.starts, strict=True)):
            weight = getattr(layer, f"second_{part}")
            if entry["codec"] == "dense":
                seconds.append(F.linear(x, weight))
            else:
                seconds.append(F.linear(first[..., at : at + entry["rank"]], weight))
        if self.gathers:
            y = torch.cat([first, *seconds], dim=-1).index_select(-1, layer.order)
        else:
            y = seconds[0] if len(seconds) == 1 else torch.cat(seconds, dim=-1)
        return y if bias is None else y + bias


def borrows(entry: Mapping[str, Any]) -> bool:
    """Whether a part has its first factor from another."""
    return entry["codec"] in SHARED and entry["basis"] is not None


def _has_no_bias(layer: nn.Module) -> bool:
    return getattr(layer, "bias", None) is None


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    layer.register_parameter(name, nn.Parameter(tensor.contiguous(), requires_grad=False))


def parts_of(
    modules: Mapping[str, dict[str, Any]], prefix: str, fused: Mapping[str, Sequence[str]]
) -> list[Any] | None:
    """Entries of the parts of an engine's layer by its path; None where none of them is compressed.

    fused: name of a fused layer -> names of the layers in it, as in a model's `packed_modules_mapping`.
    """
    owner, _, name = prefix.rpartition(".")
    alone = prefix in modules
    names = (name,) if alone else fused.get(name, ())
    entries = [modules.get(f"{owner}.{part}" if owner else part) for part in names]
    held: set[tuple[str, int]] = set()
    for part, entry in zip(names, entries, strict=True):
        if entry is None or entry["codec"] not in SHARED:
            continue
        if entry["basis"] is None:
            held.add((part, entry["rank"]))
        elif (str(entry["basis"]).rpartition(".")[2], entry["rank"]) not in held:
            raise InputError(
                f"{prefix}: {part} has its first factor from {entry['basis']}, which this engine does not hold in the "
                "same layer before it. Serve the dense model: spectrim export DIR --to dense --out OUT"
            )
    return entries if any(entries) else None


def check_served(modules: Mapping[str, dict[str, Any]], any_size: object, engine: str) -> None:
    """`InputError` for folders that engines do not read."""
    if any_size is not None:
        raise InputError(
            f"{engine}: this folder holds all sizes; write the one to serve: spectrim export DIR --keep SIZE --out OUT"
        )
    other = sorted({entry["codec"] for entry in modules.values()} - set(SERVED))
    if other:
        raise InputError(
            f"{engine}: layers stored as {', '.join(other)} are not served; {' and '.join(SERVED)} are. Serve "
            "the dense model: spectrim export DIR --to dense --out OUT"
        )
