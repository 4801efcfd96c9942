"""From what the user types to a model in memory: a hub id, a local folder, or `builtin:tiny`.

Everything is checked from headers before any tensor is read; pickles and remote code are never loaded.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from spectrim.errors import InputError, NumericalError, ResourceError, UsageError, did_you_mean, without_tokens
from spectrim.integrations.transformers import register
from spectrim.memory import held_dtype
from spectrim.models.extra import give_extra
from spectrim.models.plain_reads import plain_reads
from spectrim.models.walk import find_layers, weight_of
from spectrim.options import DTYPE_NAMES, check_device, check_dtype
from spectrim.processes import own_device
from spectrim.store import Checkpoint, TensorInfo, open_checkpoint
from spectrim.store.files import Stamp, stamp_of

BUILTIN = {"builtin:tiny": "tiny"}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "merges.txt", "vocab*", "*.jinja", "LICENSE*"]
HUB_FILES += ["README.md"]  # its metadata state the licence


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checked model folder."""

    name: str  # as the user gave it
    folder: Path
    checkpoint: Checkpoint
    config: PretrainedConfig
    dtype: torch.dtype  # of most of its numbers
    stamps: Mapping[Path, Stamp | None]  # of the files that were checked: those must be the ones that are read

    @property
    def revision(self) -> str | None:
        """The commit, where the folder is a snapshot in a Hugging Face cache."""
        real = self.folder.resolve()
        return real.name if real.parent.name == "snapshots" else None

    @property
    def is_compressed(self) -> bool:
        return quantization_of(self.config).get("quant_method") == "spectrim"

    @property
    def any_size(self) -> dict[str, Any] | None:
        """What config.json says of a folder that holds all sizes; None of any other."""
        return quantization_of(self.config).get("any_size") if self.is_compressed else None


def quantization_of(config: PretrainedConfig) -> dict[str, Any]:
    """The `quantization_config` of a model's config as a dict, empty if there is none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    return found if isinstance(found, dict) else found.to_dict()


def resolve(name: str) -> Source:
    """Find and check a model: nothing but headers and JSON is read."""
    register()  # the command does not do so before it needs it
    folder = _folder_of(name)
    before = stamps_in(folder)
    checkpoint = open_checkpoint(folder)
    stamps = {path: before[path] for path in (*checkpoint.shards, folder / "config.json")}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # every model type checks its own fields and raises what it likes
        kind = checkpoint.config["model_type"]
        raise InputError(
            f"{folder}: transformers accepts no config.json with the model type {kind!r} and these values "
            f"({one_line(error)}). Models that need remote code are not supported; for a new type upgrade transformers"
        ) from error
    return Source(
        name=name, folder=folder, checkpoint=checkpoint, config=config, dtype=_main_dtype(checkpoint), stamps=stamps
    )


def stamps_in(folder: Path) -> dict[Path, Stamp | None]:
    """Stamps of what may be opened in `folder`; None of what cannot be looked at: that is refused when it is opened."""
    stamps: dict[Path, Stamp | None] = {}
    for path in (*folder.glob("*.safetensors"), folder / "config.json"):
        with suppress(InputError):
            stamps[path] = None
            stamps[path] = stamp_of(path)
    return stamps


def require_unchanged(source: Source) -> None:
    """`InputError` if a file is no longer the one that was checked: replaced, cut or written to since."""
    for path, stamp in source.stamps.items():
        if stamp_of(path) != stamp:
            raise InputError(f"{path}: changed while the model was being read; let nothing write to it and run again")


def context_length(config: PretrainedConfig) -> int | None:
    """The most tokens the model reads at once, where its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: PreTrainedModel, ids: Tensor) -> None:
    """Every token id has a row in the embedding."""
    rows = len(weight_of(model.get_input_embeddings()))
    if ids.numel() and int(ids.max()) >= rows:
        raise InputError(
            f"the tokenizer gives token {int(ids.max())}, the model knows 0 to {rows - 1}: it belongs to another "
            "model; pass the right one as --tokenizer"
        )


def one_line(error: Exception) -> str:
    """What another library said, short enough for a message of ours, and without the user's token."""
    return f"{type(error).__name__}: {' '.join(without_tokens(str(error)).split())[:300]}"


def _folder_of(name: str) -> Path:
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise UsageError(f"unknown built-in model {name!r}{did_you_mean(name, BUILTIN)}")
        return Path(str(files("spectrim") / "assets" / BUILTIN[name]))
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(f"{name}: no such folder, and not a hub id (owner/name); give a model folder or builtin:tiny")
    return _download(name)


def _download(name: str) -> Path:
    """A hub model's files at one commit; bounded retries are huggingface_hub's."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's client raises its own, requests' and plain OS errors
        raise InputError(
            f"{name}: no such folder here, and the hub gave {one_line(error).rstrip('.')}. "
            "Check the id, the network and your token, or pass a local folder"
        ) from error


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating-point dtype that holds most numbers."""
    totals: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        totals[info.dtype] = totals.get(info.dtype, 0) + info.numel
    known = {k: v for k, v in totals.items() if k in STORED_DTYPES}
    if not known:
        raise InputError(
            f"{checkpoint.folder}: holds {', '.join(sorted(totals))} tensors; "
            f"spectrim reads {', '.join(STORED_DTYPES)} (a model that is already quantised cannot be factorised)"
        )
    return STORED_DTYPES[max(known, key=lambda k: known[k])]


def require_dense(source: Source) -> None:
    """Refuse a model that is already compressed or quantised."""
    found = quantization_of(source.config).get("quant_method")
    if found == "spectrim":
        raise UsageError(
            f"{source.name}: already compressed by spectrim; start from the dense model, "
            "or multiply it back with `spectrim export --to dense`"
        )
    if found is not None:
        raise UsageError(f"{source.name}: quantised with {found}; spectrim starts from 16- or 32-bit weights")


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # values that no model can have show in as many ways as there are models
            raise InputError(
                f"config.json: transformers cannot build a causal language model from it ({one_line(error)}); "
                "use the config.json that belongs to the weights"
            ) from error


def check_against_config(source: Source) -> None:
    """Blocks and (of a dense model) shapes in the files against what config.json asks for, wherever names agree."""
    model = meta_model(source.config)
    _check_blocks(source, model)
    expected = {} if source.is_compressed else {name: tuple(t.shape) for name, t in model.state_dict().items()}
    wrong = [
        f"{name}: file {list(info.shape)}, config {list(expected[name])}"
        for name, info in source.checkpoint.tensors.items()
        if name in expected and expected[name] != info.shape
    ]
    if wrong:
        raise InputError(
            f"{source.folder}: config.json disagrees with the tensors in {len(wrong)} places, e.g. "
            f"{'; '.join(wrong[:3])}. One of the two belongs to another model"
        )


def _check_blocks(source: Source, model: PreTrainedModel) -> None:
    """transformers leaves out blocks that config.json does not count, with no more than a log line."""
    names = find_layers(model).block_names
    decoder = names[0].rpartition(".")[0]
    # The files of a headless model lack the first level of the path.
    paths = "|".join(map(re.escape, (decoder, decoder.removeprefix(model.base_model_prefix + "."))))
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    tensors = [name for name in source.checkpoint.tensors if not any(re.search(p, name) for p in ignored)]
    found = {int(match[1]) for name in tensors if (match := re.match(rf"(?:{paths})\.(\d+)\.", name))}
    if found and found != set(range(len(names))):
        raise InputError(
            f"{source.folder}: config.json asks for {len(names)} blocks ({decoder}.0 to {len(names) - 1}), the files "
            f"hold {len(found)} (up to {max(found)}). One of the two belongs to another model"
        )


def load_dense(
    source: Source,
    device: torch.device,
    *,
    allow_nonfinite: bool = False,
    warnings: list[str] | None = None,
    extra: dict[str, TensorInfo] | None = None,
) -> PreTrainedModel:
    """The dense model on `device`; anything missing from the files is an error, never random numbers.

    In float32; as it is stored where that is bfloat16 and float32 would take too much of a GPU (memory.py).

    So is NaN or Inf anywhere, unless allowed. `extra` is given the tensors that are in the files and have no place in
    the model, for whoever writes a result; `warnings` is told of them.
    """
    require_dense(source)
    check_against_config(source)
    model, info = _from_pretrained(source, dtype=held_dtype(device, source.dtype, source.checkpoint.numel))
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{source.folder}: {len(missing)} tensors that the model needs are in no file, e.g. "
            f"{', '.join(missing[:3])}; config.json and the files disagree, or the download is incomplete"
        )
    said = give_extra(source.checkpoint, model, info, extra)
    if warnings is not None:
        warnings += said
    if not allow_nonfinite:
        _check_finite(source, model)
    nn.Module.to(model, device)  # transformers wraps its own `.to` in a way no type checker reads
    return model.eval()


def _check_finite(source: Source, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        bad = parameter.numel() - int(torch.isfinite(parameter).sum())
        if bad:
            raise NumericalError(
                f"{source.folder}: {name}: {bad} of {parameter.numel():,} values are NaN or Inf; none is allowed. "
                "The checkpoint is damaged or overflowed; download it again, or leave what is not finite as it is with "
                "--allow-nonfinite skip"
            )


def load_model(
    source: Source,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    size: float | None = None,
    extra: dict[str, TensorInfo] | None = None,
) -> PreTrainedModel:
    """A dense or compressed model as it is stored, for evaluation and generation; `size` of a folder with all sizes.

    `extra` as in `load_dense`.
    """
    if size is not None and source.any_size is None:
        raise UsageError(
            f"{source.name}: holds one size only; `spectrim compress --any-size` makes folders that hold all"
        )
    check_against_config(source)
    model, info = _from_pretrained(source, dtype or source.dtype, **({} if size is None else {"size_ratio": size}))
    if info["missing_keys"]:
        raise InputError(
            f"{source.folder}: {len(info['missing_keys'])} tensors that the model needs are in no file, e.g. "
            f"{min(info['missing_keys'])}; copy or download the folder again"
        )
    if extra is not None:
        # Of the dense architecture: layers in codes are no linear ones that could be found.
        give_extra(source.checkpoint, meta_model(source.config), info, extra)
    nn.Module.to(model, device)  # transformers wraps its own `.to` in a way no type checker reads
    return model.eval()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence transformers' own bars: spectrim reports progress itself."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _from_pretrained(source: Source, dtype: torch.dtype, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    try:
        require_unchanged(source)
        with no_progress_bars(), plain_reads(source.checkpoint):
            loaded = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        require_unchanged(source)
        return cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{source.folder}: transformers cannot load it ({one_line(error)})") from error


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, of several processes each one's own, else the CPU; one that is not there is an error."""
    check_device(name)
    if name == "auto":
        return own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ResourceError(f"--device {name}: this machine has no Apple GPU that torch can use; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu")
    return own_device(device)


def pick_dtype(name: str, source_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the stored result; `auto` is the source's."""
    check_dtype(name)
    return source_dtype if name == "auto" else DTYPES[name]
