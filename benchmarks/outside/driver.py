"""What the drivers of this folder share. It runs in the environment of one tool, where spectrim is not installed.

A driver gives `main` two things: how the tool makes (and then saves) a model of few bits, and how it loads what it
saved. Each stage is a process of its own, as it is for a user: `make` writes OUT/facts.json, OUT/dense.safetensors (the
weights that the tool computes with), OUT/logits.safetensors and the tool's own OUT/saved; a stage named after a loader
loads OUT/saved and writes OUT/NAME.json.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import re
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

DECODER_LINEAR = re.compile(r"(^|\.)layers\.\d+\.")
SAME_LOGITS = 1e-3
"""Nats a token between the model in memory and the one loaded: kernels of another order of sums stay far below."""
PROBED_AT_ONCE = 512


@dataclass(frozen=True)
class Job:
    """What is asked of a tool; `ids` (windows, length) is the calibration text."""

    model: Path
    ids: Tensor
    bits: int
    device: str
    saved: Path
    variant: str = ""
    """Another way of the same tool; what there is, its driver says."""

    def load(self, **options: Any) -> nn.Module:
        """The dense model, in the dtype of its folder."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype="auto", device_map=self.device, **options).eval()


@dataclass(frozen=True)
class Made:
    """A model of few bits, and the settings that it was made with, as the tool names them."""

    model: nn.Module
    settings: dict[str, Any]
    save: Callable[[], object]
    """The tool's own way, into `Job.saved`."""
    dense: Mapping[str, Tensor] | None = None
    """Weights by layer, where a layer on its own cannot be asked for them."""


def plain(job: Job) -> nn.Module:
    """How any model is loaded."""
    return AutoModelForCausalLM.from_pretrained(job.saved, dtype="auto", device_map=job.device).eval()


def stand_in_for_datasets() -> None:
    """Modules of the name `datasets` where there are none: some tools always import it, and need it for no windows.

    Whatever is taken from them can be asked for and cannot be called, so nothing is loaded without a word.
    """
    if importlib.util.find_spec("datasets") is not None:
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("datasets is not installed")

    def lookup(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": refuse})

    for name in ("datasets", "datasets.formatting", "datasets.formatting.formatting"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = lookup  # type: ignore[method-assign]  the module-level hook of PEP 562
        sys.modules[name] = module


def decoder_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside the decoder's blocks."""
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and DECODER_LINEAR.search(name)
    ]


@torch.no_grad()
def weight_by_probing(layer: nn.Module, inputs: int, dtype: torch.dtype, device: str) -> Tensor:
    """(outputs, inputs): what the layer makes of each unit vector, less what it makes of zero."""
    offset = layer(torch.zeros(1, 1, inputs, dtype=dtype, device=device))[0]
    columns = [
        layer(rows.unsqueeze(0))[0] - offset
        for rows in torch.eye(inputs, dtype=dtype, device=device).split(PROBED_AT_ONCE)
    ]
    return torch.cat(columns).T.float().cpu().contiguous()


def held_in(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor is made of: tools keep codes and scales in one object that looks dense."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from held_in(getattr(tensor, name))
    else:
        yield tensor


def all_tensors(held: Any) -> Iterator[Tensor]:
    """Tensors in nested dictionaries and lists."""
    if isinstance(held, Tensor):
        yield from held_in(held)
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from all_tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from all_tensors(value)


def bytes_in_memory(model: nn.Module, layers: Iterable[str]) -> int:
    """Of everything that the layers hold; a tensor that two of them share counts once."""
    found: dict[int, int] = {}
    for layer in layers:
        for tensor in all_tensors(model.get_submodule(layer).state_dict()):
            found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def stored_tensors(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and bytes of every tensor in the safetensors files of a folder, from their headers."""
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                yield name, end - start


def bytes_in_folder(folder: Path, layers: Iterable[str]) -> dict[str, int]:
    """Bytes of the layers by kind (weight, scale, ...); empty where the folder names none of them."""
    wanted, found = tuple(layers), dict[str, int]()
    for name, size in stored_tensors(folder):
        owner = next((layer for layer in wanted if name.startswith(f"{layer}.")), None)
        if owner is not None:
            kind = name.removeprefix(f"{owner}.")
            found[kind] = found.get(kind, 0) + size
    return found


@torch.no_grad()
def logits_of(model: nn.Module, job: Job) -> Tensor:
    """(length, vocabulary) of the first calibration window."""
    return model(job.ids[:1].to(job.device)).logits[0].float().cpu()


def compared(memory: Tensor, loaded: Tensor) -> dict[str, Any]:
    """How far the logits of a loaded model are from those before it was saved."""
    log_p, log_q = memory.log_softmax(-1), loaded.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    return {"kl": kl, "largest": (memory - loaded).abs().max().item(), "same": kl < SAME_LOGITS}


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def make(job: Job, out: Path, tool: str, quantise: Callable[[Job], Made]) -> None:
    """First stage; a tool that cannot save still has its weights judged."""
    dense = job.load()
    layers = decoder_linears(dense)
    shapes = {name: tuple(dense.get_submodule(name).weight.shape) for name in layers}
    dtype = dense.dtype
    del dense
    wall, cpu = time.perf_counter(), time.process_time()
    made = quantise(job)
    facts: dict[str, Any] = {
        "version": version(tool), "torch": torch.__version__, "transformers": version("transformers"),
        "bits": job.bits, "settings": made.settings, "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu, "layers": len(layers), "device": job.device,
        "numbers": sum(outputs * inputs for outputs, inputs in shapes.values()),
        "windows": list(job.ids.shape),
    }  # fmt: skip
    weights = dict(made.dense or {})
    for name, shape in shapes.items():
        if name not in weights:
            weights[name] = weight_by_probing(made.model.get_submodule(name), shape[1], dtype, job.device)
        if weights[name].shape != shape:
            raise ValueError(f"{name}: {tuple(weights[name].shape)} where the dense weight is {shape}")
    rounded = {f"{name}.weight": weight.to("cpu", torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(rounded, out / "dense.safetensors")
    save_file({"logits": logits_of(made.model, job)}, out / "logits.safetensors")
    facts["memory_bytes"] = bytes_in_memory(made.model, layers)
    try:
        made.save()
        facts["parts"] = bytes_in_folder(job.saved, layers)
        facts["folder_bytes"] = sum(file.stat().st_size for file in job.saved.rglob("*") if file.is_file())
    except Exception as error:  # that it cannot save is one of the things to find out
        facts["save_error"] = one_line(error)
    (out / "facts.json").write_text(json.dumps(facts, indent=1, default=str))


def reload(job: Job, out: Path, name: str, load: Callable[[Job], nn.Module]) -> None:
    """A later stage: what the tool saved, loaded in a new process."""
    try:
        found = compared(load_file(out / "logits.safetensors")["logits"], logits_of(load(job), job))
    except Exception as error:  # that it cannot load is one of the things to find out
        found = {"error": one_line(error), "same": False}
    (out / f"{name}.json").write_text(json.dumps(found, indent=1))


def main(tool: str, quantise: Callable[[Job], Made], loaders: Mapping[str, Callable[[Job], nn.Module]]) -> None:
    """The command line of a driver; `tool` is the name of its distribution."""
    parser = argparse.ArgumentParser(description=f"{tool}, with its own defaults")
    parser.add_argument("stage", choices=["make", *loaders])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=Path, required=True, help=".npy (windows, length)")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.from_numpy(np.load(args.windows).astype(np.int64))
    job = Job(args.model, ids, args.bits, args.device, args.out / "saved", args.variant)
    if args.stage == "make":
        make(job, args.out, tool, quantise)
    else:
        reload(job, args.out, args.stage, loaders[args.stage])
