"""Models whose blocks are read from their files when they run, one block at a time.

    outside the blocks   embeddings, last norm, head: on the device all the time
    a block              its tensors are read when it is called, and let go when another block is

Such a model computes what the model does; only where its weights are differs. A `Home` belongs to the blocks of one
model and of every copy that engines/learned.skeleton makes of it: copies of one block share the tensors that are read.
Layers that were put in the place of a copy's own go with the block, for good: a block that was changed and let go
refuses to run again.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from spectrim.errors import InputError, NumericalError, UsageError
from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.models.extra import give_extra
from spectrim.models.load import (
    Source,
    check_against_config,
    meta_model,
    one_line,
    quantization_of,
    require_unchanged,
)
from spectrim.models.walk import Walk, find_layers, path_in
from spectrim.nn.codecs import StoredLinear
from spectrim.store import TensorInfo
from spectrim.store.pieces import Pieces
from spectrim.store.scratch import read_onto

Read = Callable[[str], Tensor]
"""From the name of a tensor in the model to the tensor, on the device and in the dtype in which it is held."""
_CHANGED = "_spectrim_changed"


class Home:
    """Fills the blocks of a model when they run and empties them when another one does."""

    def __init__(self, blocks: Sequence[str], read: Read) -> None:
        self.blocks, self.read = list(blocks), read
        self.index: int | None = None
        self._held: dict[str, Tensor] = {}  # of the block that is there, shared by its copies
        self._filled: list[nn.Module] = []

    def __deepcopy__(self, _memo: object) -> "Home":
        return self

    def fill(self, block: nn.Module, index: int) -> None:
        """Give block number `index`, or a copy of it, its tensors; another block that is there is let go."""
        if index != self.index:
            self.let_go()
            self.index = index
        if any(own is block for own in self._filled):
            return
        assert not getattr(block, _CHANGED, False), f"{self.blocks[index]} was changed and let go; it cannot run again"
        for path, tensor in tensors_of(block):
            if tensor.is_meta:
                put_tensor(block, path, self._tensor(f"{self.blocks[index]}.{path}", isinstance(tensor, nn.Parameter)))
        for module in block.modules():
            if isinstance(module, StoredLinear):
                module.after_load()
        self._filled.append(block)

    def _tensor(self, name: str, is_parameter: bool) -> Tensor:
        if name not in self._held:
            found = self.read(name)
            self._held[name] = nn.Parameter(found, requires_grad=False) if is_parameter else found
        return self._held[name]

    def let_go(self) -> None:
        """Empty every block that is there."""
        own = {id(tensor) for tensor in self._held.values()}
        for block in self._filled:
            for path, tensor in tensors_of(block):
                if isinstance(tensor, nn.Parameter) and id(tensor) not in own and not tensor.is_meta:
                    setattr(block, _CHANGED, True)
                if id(tensor) in own or isinstance(tensor, nn.Parameter):
                    put_tensor(block, path, _empty(tensor))
        self._held, self._filled, self.index = {}, [], None

    @property
    def bytes_held(self) -> int:
        """Of what was read and is there."""
        return sum(tensor.nbytes for tensor in self._held.values())


def tensors_of(block: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, and buffers that files hold."""
    kept = block.state_dict(keep_vars=True)
    return [(path, tensor) for path, tensor in kept.items() if isinstance(tensor, Tensor)]


def put_tensor(block: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a parameter or a buffer in the place of the one that is there."""
    owner, _, key = path.rpartition(".")
    module = block.get_submodule(owner)
    own = module._parameters if key in module._parameters else module._buffers
    own[key] = tensor  # type: ignore[assignment]  both are dictionaries of tensors


def _empty(tensor: Tensor) -> Tensor:
    hollow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow


@functools.cache
def _streamed_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A block's class that fills the block before it runs.

    Of the class, not of the object: engines that put a `forward` of their own into a block then need no weights.
    """

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        home, index = self.__dict__["_spectrim_home"]
        home.fill(self, index)
        return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def settle_in(model: PreTrainedModel, walk: Walk, home: Home) -> None:
    """Let the blocks of `model` be filled by `home` from now on."""
    for index, name in enumerate(walk.block_names):
        block = model.get_submodule(name)
        if "_spectrim_home" not in block.__dict__:
            block.__class__ = _streamed_kind(type(block))
        block.__dict__["_spectrim_home"] = (home, index)


@dataclass(kw_only=True)
class Streamed:
    """A model with its blocks in their files."""

    model: PreTrainedModel
    walk: Walk
    home: Home
    source: Source
    extra: dict[str, TensorInfo] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def at_hand(self, index: int) -> nn.Module:
        """A block with its tensors."""
        block = self.model.get_submodule(self.walk.block_names[index])
        self.home.fill(block, index)
        return block


def open_streamed(source: Source, device: torch.device, dtype: torch.dtype) -> Streamed:
    """A dense or compressed folder as a model whose floating-point tensors are held in `dtype`, a block at a time.

    InputError as of models/load.py; UsageError where the files name their tensors otherwise than the model does.
    """
    check_against_config(source)
    require_unchanged(source)
    model = _skeleton_of(source, dtype)
    walk = find_layers(meta_model(source.config))  # with what is tied still tied
    if source.is_compressed:
        install_modules(model, SpectrimConfig(**quantization_of(source.config)), source.checkpoint.shards)
    names, missing = _names_in_files(source, model, walk)
    pieces = Pieces(device)

    def read(name: str) -> Tensor:
        found = read_onto(source.checkpoint.tensors[names[name]], pieces)
        return found.to(dtype) if found.is_floating_point() else found

    _fill_outside(source, model, walk, read, names, missing)
    for module in model.modules():  # what is worked out and not stored: positions, masks
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)
    home = Home(walk.block_names, read)
    settle_in(model, walk, home)
    made = Streamed(model=model.eval(), walk=walk, home=home, source=source)
    made.warnings = give_extra(source.checkpoint, model, {"unexpected_keys": _beyond(source, model, names)}, made.extra)
    require_unchanged(source)
    return made


def _skeleton_of(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The dense architecture with parameters on the meta device, and buffers that are worked out."""
    try:
        with init_empty_weights(include_buffers=False):
            config = copy.deepcopy(source.config)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if model.can_generate() and (source.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
    except Exception as error:  # values that no model can have show in as many ways as there are models
        raise InputError(f"config.json: transformers cannot build the model from it ({one_line(error)})") from error
    return model


def _fill_outside(
    source: Source, model: PreTrainedModel, walk: Walk, read: Read, names: Mapping[str, str], missing: Sequence[str]
) -> None:
    """What lies outside the blocks, and their buffers that files hold; tied tensors are those they are tied to."""
    inside = tuple(f"{name}." for name in walk.block_names)
    for path, tensor in tensors_of(model):
        if path in names and not (path.startswith(inside) and tensor.is_meta):
            put_tensor(model, path, nn.Parameter(read(path), requires_grad=False) if tensor.is_meta else read(path))
    if missing:
        model.tie_weights(missing_keys=set(missing), recompute_mapping=True)
    left = [path for path, tensor in tensors_of(model) if tensor.is_meta and not path.startswith(inside)]
    if left:
        raise InputError(
            f"{source.folder}: {len(left)} tensors that the model needs are in no file under their own names, e.g. "
            f"{', '.join(left[:3])}. Download it again, or, if the files are complete and only name them otherwise, "
            "leave --low-memory out"
        )


def _names_in_files(source: Source, model: PreTrainedModel, walk: Walk) -> tuple[dict[str, str], list[str]]:
    """The name in the files of every tensor of the model, and the tensors outside the blocks that have none there."""
    found, missing = {}, []
    for path, _ in tensors_of(model):
        name = path_in(source.checkpoint.tensors, path, model.base_model_prefix)
        if name is not None:
            found[path] = name
        elif not path.endswith(".weight") or not isinstance(_module_of(model, path), StoredLinear):  # the guard
            missing.append(path)
    inside = tuple(f"{name}." for name in walk.block_names)
    tied = model._tied_weights_keys or {}  # may be missing: whether they are tied shows when the others are read
    lost = [path for path in missing if path.startswith(inside) or path not in tied]
    if lost:
        raise UsageError(
            f"{source.name}: {len(lost)} tensors have other names in the files than in the model, e.g. {lost[0]}, or "
            "are not there; such a model cannot be read block by block. Leave --low-memory out"
        )
    return found, missing


def _module_of(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _beyond(source: Source, model: PreTrainedModel, names: Mapping[str, str]) -> list[str]:
    """Tensors in the files that the model has no place for."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    known = {*names.values(), *(path for path, _ in tensors_of(model))}
    return [n for n in source.checkpoint.tensors if n not in known and not any(re.search(p, n) for p in ignored)]


def check_finite(source: Source, device: torch.device) -> None:
    """NumericalError where a tensor of the files holds NaN or Inf; one tensor at a time."""
    pieces = Pieces(device)
    for name, info in source.checkpoint.tensors.items():
        tensor = read_onto(info, pieces)
        bad = tensor.numel() - int(torch.isfinite(tensor).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise NumericalError(
                f"{source.folder}: {name}: {bad} of {tensor.numel():,} values are NaN or Inf; none is allowed. The "
                "checkpoint is damaged or overflowed; download it again, or leave --low-memory out and pass "
                "--allow-nonfinite skip"
            )
