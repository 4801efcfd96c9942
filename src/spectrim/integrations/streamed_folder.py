"""The folder of folder.py, written block by block: no more of the result than one block is ever in memory.

The shapes of all tensors follow from the ranks, so that the headers of the files are written first (store/shards.py)
and each tensor goes to its place when its layer has been encoded. The files are those that `save_pretrained` would
write, byte for byte.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim.engines.layerwise import encode_layer, solver_errors_of, swap
from spectrim.engines.learned import skeleton
from spectrim.engines.low_memory import LowMemoryRun
from spectrim.engines.outcome import Outcome
from spectrim.engines.ranks import Plan
from spectrim.engines.relay import Relay
from spectrim.integrations.folder import COMPANIONS, MAX_SHARD_SIZE, format_config, stored_as
from spectrim.integrations.transformers import attach
from spectrim.linalg.factor import Spectrum
from spectrim.models.load import Source, meta_model, require_unchanged
from spectrim.models.streamed import put_tensor, tensors_of
from spectrim.models.walk import Layer, linear_at
from spectrim.nn.linears import LINEARS
from spectrim.reloaded import few_tokens
from spectrim.replacement import Replacement, Target, dense_replacement
from spectrim.store import TensorInfo, copy_companions
from spectrim.store.extra import add_shard
from spectrim.store.pieces import Pieces
from spectrim.store.reader import INDEX
from spectrim.store.shards import Shards


def hollow_result(run: LowMemoryRun, source: Source, plan: Plan, dtype: torch.dtype) -> PreTrainedModel:
    """The compressed model without weights, every tensor in the shape and dtype of the file."""
    model = meta_model(copy.deepcopy(source.config))
    for layer in run.walk.layers:
        target = plan.targets[layer.name]
        if target.codec != "dense":
            bias = layer.has_bias or layer.name in run.means
            kind = LINEARS[target.codec]
            made = kind(layer.inputs, layer.outputs, target.rank, bias=bias, device="meta", dtype=dtype)
            model.set_submodule(layer.name, made)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.generation_config = run.dense.generation_config
    return model.eval()


def write_streamed(
    stage: Path,
    run: LowMemoryRun,
    spectra: Mapping[str, Spectrum],
    outcome: Outcome,
    dtype: torch.dtype,
    source: Source,
    extra: Mapping[str, TensorInfo],
) -> tuple[dict[str, Replacement], Tensor]:
    """Encode every layer of `run` by the plan of `outcome` and write the folder that its hollow model stands for.

    Returns what each layer became, on the meta device, and logits (1, S, V) of a few tokens in the stored dtype.
    """
    model = outcome.model
    attach(model, format_config(outcome, source.name))
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.save_pretrained(stage)
    if model.can_generate():
        model.generation_config.save_pretrained(stage)
    shards = _open_shards(stage, model, run.device)
    writer = _Writer(run, spectra, outcome, dtype, shards)
    logits = writer.write()
    shards.finish()
    copy_companions(source.folder, stage, COMPANIONS)
    require_unchanged(source)
    if extra:
        add_shard(stage, extra)
        require_unchanged(source)
    return writer.placed, logits


def _open_shards(stage: Path, model: PreTrainedModel, device: torch.device) -> Shards:
    """The files and their index, with room for every tensor."""
    elsewhere = _written_elsewhere(model)
    kept = {name: tensor for name, tensor in tensors_of(model) if name not in elsewhere}
    split = split_torch_state_dict_into_shards(
        kept, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_SIZE
    )
    file_of = dict(split.tensor_to_filename)
    # Tensors without numbers have one address, so that transformers takes them for one and keeps them together.
    empty = [name for name, tensor in kept.items() if not tensor.numel()]
    file_of |= {name: file_of[empty[0]] for name in empty}
    if split.is_sharded:
        facts = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": facts, "weight_map": file_of}
        (stage / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    files: dict[Path, dict[str, Tensor]] = {stage / file: {} for file in split.filename_to_tensors}
    for name, tensor in kept.items():
        files[stage / file_of[name]][name] = tensor
    return Shards(files, Pieces(device))


def _written_elsewhere(model: PreTrainedModel) -> set[str]:
    """Names of tensors that are tied to another, and of those that transformers never writes."""
    first: dict[int, str] = {}
    dropped = set(model._keys_to_ignore_on_save or ())
    tied = model.all_tied_weights_keys
    for name, tensor in tensors_of(model):
        other = first.setdefault(id(tensor), name)
        if other != name:
            dropped.add(name if name in tied else other)
    return dropped


class _Writer:
    """One pass over the blocks."""

    def __init__(
        self, run: LowMemoryRun, spectra: Mapping[str, Spectrum], outcome: Outcome, dtype: torch.dtype, shards: Shards
    ) -> None:
        self.run, self.spectra, self.plan, self.dtype, self.shards = run, spectra, outcome.plan, dtype, shards
        run.streamed.home.let_go()
        self.student = skeleton(run.dense)
        self.relay = Relay(self.student, run.walk, run.relay.gives_tuple)
        self.placed: dict[str, Replacement] = {}
        self.names = {name for own in shards.files.values() for name in own}

    @torch.no_grad()
    def write(self) -> Tensor:
        """Everything; returns the logits of a few tokens."""
        inside = tuple(f"{name}." for name in self.run.walk.block_names)
        outside = [(path, tensor) for path, tensor in tensors_of(self.student) if not path.startswith(inside)]
        cast: dict[int, Tensor] = {}
        for path, tensor in outside:
            stored = cast.setdefault(id(tensor), self._stored(path, tensor))
            put_tensor(self.student, path, stored)
            self._put(path, stored)
        few = few_tokens(self.student).to(self.run.device)
        hidden, calls = self.relay.enter(few)
        for index, name in enumerate(self.run.walk.block_names):
            self.run.streamed.at_hand(index)
            block = self.student.get_submodule(name)
            self.run.streamed.home.fill(block, index)
            for layer in [la for la in self.run.walk.layers if la.block == index]:
                self._place(layer)
            for path, tensor in tensors_of(block):
                stored = self._stored(f"{name}.{path}", tensor)
                put_tensor(block, path, stored)
                self._put(f"{name}.{path}", stored)
            hidden = self.relay.run(index, hidden, calls[index])
            self.run.say("write", index + 1, len(self.run.walk.block_names))
        logits = self.relay.leave(few, hidden).float().cpu()
        self.run.streamed.home.let_go()
        return logits

    def _stored(self, path: str, tensor: Tensor) -> Tensor:
        """As the file holds it: parameters in the stored dtype, buffers as they are."""
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(stored_as(path, tensor, self.dtype), requires_grad=False)
        return tensor.to(self.dtype) if tensor.numel() == 0 else tensor  # a guard has no numbers, but a dtype

    def _put(self, path: str, tensor: Tensor) -> None:
        if path in self.names:
            self.shards.put(path, tensor)

    def _place(self, layer: Layer) -> None:
        """The layer in its target codec, in the student's block."""
        module, target = linear_at(self.run.dense, layer.name), self.plan.targets[layer.name]
        placed = self._encoded(layer, module, target)
        swap(self.student, layer.name, placed)
        hollow = {key: tensor.to("meta") for key, tensor in placed.tensors.items()}
        bias = None if placed.bias is None else placed.bias.to("meta")
        self.placed[layer.name] = dataclasses.replace(placed, tensors=hollow, bias=bias)

    def _encoded(self, layer: Layer, module: nn.Linear, target: Target) -> Replacement:
        changes = self.run.changes
        if target.codec == "dense" and not changes:
            bias = None if module.bias is None else module.bias.detach()
            return dense_replacement(self.run.weight(layer), bias)
        with solver_errors_of(layer.name, "its factors"):
            mean = self.run.means.get(layer.name)
            return encode_layer(module, self.spectra[layer.name], target, learned=changes, mean=mean)
