"""What this machine can do: looked at and measured, for `spectrim doctor`.

A thing is *broken* where spectrim cannot work at all (a package missing, a product that is wrong, a disk that cannot be
written); what only limits it (no GPU, no compiler, no hub) is said with what follows from it.
"""

import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from spectrim.engines.measure import computing_dtype, cpu_has_bf16
from spectrim.integrations.exporters import missing_packages
from spectrim.machine import measure_rates

EXTRAS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "hub": (("datasets",), "data sets of the hub as --calib and --eval text"),
    "ilp": (("scipy",), "allocation by integer programming (lq-lora needs it, trellis gains by it)"),
    "eval": (("lm_eval",), "tasks of lm-evaluation-harness (spectrim eval --lm-eval)"),
    "track": (("tensorboard",), "curves of a run in TensorBoard (--track tensorboard)"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "graphs for ONNX Runtime (spectrim export --to onnx)"),
    "executorch": (("executorch",), "programs for ExecuTorch (spectrim export --to executorch)"),
    "peft": (("peft",), "LoRA on compressed layers"),
    "torchao": (("torchao",), "torchao's quantisation of compressed layers"),
    "ui": (("gradio",), "a page with a slider for the size (spectrim ui)"),
}
"""Extras of pyproject.toml (but dev and docs): the modules they bring, and what each is for."""
THROUGH_EXPORTERS = ("onnx", "executorch")
"""Extras that also ask for a newer transformers than the base install does."""
HUB_SECONDS = 2.0
LEAST_DISK = 2**30
"""Free bytes below which a result of a model of any size hardly fits."""


def examine(folder: Path, *, hub: bool = True) -> dict[str, Any]:
    """All of it as one dict; `broken` names what spectrim cannot work without, `limits` what it does without."""
    broken: list[str] = []
    limits: list[str] = []
    packages = look_at_packages(broken)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "packages": packages,
        "extras": look_at_extras(),
        "cpu": look_at_cpu(),
        "memory": look_at_memory(),
        "gpus": look_at_gpus(),
        "compile": look_at_compilers(),
        "computing": {"device": str(device), "dtype": computing_dtype(device)},
        "rates": {"cpu": asdict(measure_rates(torch.device("cpu")))},
        "disk": look_at_disk(folder, broken, limits),
        "hub": look_at_hub() if hub else {"looked": False},
    }
    if device.type == "cuda":
        found["rates"]["cuda"] = asdict(measure_rates(device))
    check_product(device, broken)
    if not found["gpus"]:
        limits.append("no GPU: take --preset fast; learned presets are for small models here")
    if hub and not found["hub"]["reachable"]:
        limits.append("the hub cannot be reached: local folders, builtin:tiny and builtin:stdlib work")
    return {**found, "broken": broken, "limits": limits}


def look_at_packages(broken: list[str]) -> dict[str, str | None]:
    """Version of everything that the base install needs; None where it is missing."""
    found: dict[str, str | None] = {}
    for name in needed_packages():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            broken.append(f"package {name} is missing: pip install spectrim brings it")
    return found


def needed_packages() -> list[str]:
    """Names of the dependencies, from the package's own metadata where it is installed."""
    try:
        given = [line for line in requires("spectrim") or () if "extra ==" not in line]
    except PackageNotFoundError:  # run from a clone without an install
        given = []
    names = [re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in given]
    return names or ["torch", "transformers", "accelerate", "safetensors", "typer", "rich", "pydantic", "pyyaml"]


def look_at_extras() -> dict[str, dict[str, Any]]:
    """Which extras are there, what each would add, and what is missing for it, in the words of `pip install`."""
    found = {}
    for name, (modules, what) in EXTRAS.items():
        if name in THROUGH_EXPORTERS:
            missing = missing_packages(*modules)
        else:
            missing = [module for module in modules if importlib.util.find_spec(module) is None]
        found[name] = {"present": not missing, "missing": missing, "for": what}
    return found


def look_at_cpu() -> dict[str, Any]:
    """Cores that this process may use, threads that torch does, and what they compute in."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": os.cpu_count(), "allowed": allowed, "threads": torch.get_num_threads(), "bf16": cpu_has_bf16()}


def look_at_memory() -> dict[str, int | None]:
    """Bytes of main memory, and those that are free to take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        told = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return {"total": told["MemTotal"], "available": told["MemAvailable"]}
    except (OSError, ValueError, KeyError, IndexError):
        pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        return {"total": pages * os.sysconf("SC_PAGE_SIZE") if pages else None, "available": None}


def look_at_gpus() -> list[dict[str, Any]]:
    """Every CUDA device: name, memory in all and free, capability, bf16."""
    found = []
    for index in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        facts = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported()
        found.append(
            {
                "index": index, "name": facts.name, "capability": f"{facts.major}.{facts.minor}", "bytes": total,
                "free": free, "bf16": bf16,
            }
        )  # fmt: skip
    return found


def look_at_compilers() -> dict[str, Any]:
    """What torch.compile and own kernels would need; spectrim works without."""
    return {
        "c_compiler": shutil.which(os.environ.get("CXX", "c++")) is not None or shutil.which("gcc") is not None,
        "triton": importlib.util.find_spec("triton") is not None,
        "cuda_of_torch": torch.version.cuda,
    }


def look_at_disk(folder: Path, broken: list[str], limits: list[str]) -> dict[str, Any]:
    """Free bytes where results would be written, and whether a file can be written there at all."""
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"spectrim")
            probe.flush()
    except OSError as error:
        broken.append(f"{folder}: cannot be written to ({error.strerror}); run in another folder, or take --folder")
        return {"folder": str(folder.absolute()), "free": None, "writable": False}
    if free < LEAST_DISK:
        limits.append(f"{folder}: {free / 2**20:.0f} MiB are free, hardly enough for a result")
    return {"folder": str(folder.absolute()), "free": free, "writable": True}


def look_at_hub() -> dict[str, Any]:
    """Whether a connection to the hub opens within two seconds; nothing is asked of it."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return {"looked": True, "reachable": False, "why": "HF_HUB_OFFLINE is set"}
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((host, port), timeout=HUB_SECONDS).close()
    except OSError as error:
        return {"looked": True, "reachable": False, "why": f"offline: {error}"}
    return {"looked": True, "reachable": True, "why": f"{host} answers"}


def check_product(device: torch.device, broken: list[str]) -> None:
    """A small product and a decomposition whose answers are known."""
    try:
        a = torch.arange(12.0, device=device).reshape(3, 4)
        right = torch.equal((a @ a.mT).cpu(), torch.tensor([[14.0, 38, 62], [38, 126, 214], [62, 214, 366]]))
        values = torch.linalg.eigvalsh(torch.diag(torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)))
        if not right or not torch.allclose(values, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)):
            broken.append(f"torch computes a wrong product or wrong eigenvalues on {device}; install torch again")
    except RuntimeError as error:
        broken.append(f"torch cannot compute on {device}: {' '.join(str(error).split())[:200]}")


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for people, one line a thing."""
    cpu, memory, disk, hub = found["cpu"], found["memory"], found["disk"], found["hub"]
    said = [
        f"python {found['python']} on {found['platform']} ({sys.executable})",
        "packages: " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in found["packages"].items()),
        f"cpu: {cpu['allowed']} of {cpu['cores']} cores, {cpu['threads']} threads, bf16 {_yes(cpu['bf16'])}",
        f"memory: {_gib(memory['available'])} available of {_gib(memory['total'])}",
    ]
    said += [
        f"gpu {gpu['index']}: {gpu['name']}, {_gib(gpu['free'])} free of {_gib(gpu['bytes'])}, capability "
        f"{gpu['capability']}, bf16 {_yes(gpu['bf16'])}"
        for gpu in found["gpus"]
    ] or ["gpu: none"]
    said.append(f"forward passes: {found['computing']['dtype']} on {found['computing']['device']}")
    for device, rates in found["rates"].items():
        said.append(
            f"measured on {device}: {rates['products'] / 1e9:,.0f} Gflop/s in {rates['computing_dtype']}, "
            f"{rates['full_products'] / 1e9:,.0f} in float32, copies {rates['copied'] / 1e9:,.1f} GB/s"
        )
    compilers = found["compile"]
    said.append(
        f"compilers: C {_yes(compilers['c_compiler'])}, triton {_yes(compilers['triton'])}, "
        f"torch's CUDA {compilers['cuda_of_torch'] or 'none'}"
    )
    said.append(f"disk: {_gib(disk['free'])} free in {disk['folder']}")
    said.append(f"hub: {'not looked at' if not hub['looked'] else hub['why']}")
    for name, extra in found["extras"].items():
        lacks = ", ".join(extra["missing"])
        state = "present" if extra["present"] else f"{lacks} missing (pip install 'spectrim[{name}]')"
        said.append(f"extra {name}: {state}; for {extra['for']}")
    said += [f"limit: {text}" for text in found["limits"]]
    said += [f"BROKEN: {text}" for text in found["broken"]] or ["nothing that is needed is broken"]
    return said


def _yes(given: bool) -> str:
    return "yes" if given else "no"


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
