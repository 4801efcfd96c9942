"""The spectrim format inside transformers: plain `from_pretrained` loads a compressed folder once we are imported.

`config.json` carries `quantization_config` with `quant_method: "spectrim"` and, per module, its codec and rank.
transformers asks the registered quantizer to put the right modules in place while the model is on the meta device,
then loads the tensors into them as into any other model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from spectrim.errors import InputError
from spectrim.integrations.any_size import NESTED, AnySizeFormat, Slices
from spectrim.models.walk import is_linear, path_in, weight_of
from spectrim.nn.codecs import CODECS, StoredLinear, codec_class
from spectrim.store import read_header

QUANT_METHOD = "spectrim"
FORMAT_VERSION = 1


class SpectrimConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed folder.

    modules: module path -> {"codec": one of nn/codecs.py, "rank": int, "bias": bool, and what the codec adds}; layers
    that stayed dense are not listed. any_size: only in a folder that holds all sizes, whose layers all have the codec
    "nested" (integrations/any_size.py). Other keys (`tool_version`, `base_model`, `method`, ...) are information.
    """

    def __init__(
        self,
        /,  # a key of this name in the file is information like any other
        modules: dict[str, dict[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        any_size: dict[str, Any] | None = None,
        **information: Any,
    ) -> None:
        information.pop("quant_method", None)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types it as its own enum
        self.modules = {} if modules is None else modules
        self.format_version = format_version
        self.information = information
        if type(format_version) is not int or format_version < 1:
            raise InputError(
                f"config.json: quantization_config.format_version is {format_version!r}; expected a whole number from "
                f"1 to {FORMAT_VERSION}"
            )
        if format_version > FORMAT_VERSION:
            raise InputError(
                f"config.json: quantization_config.format_version is {format_version}, this installation of spectrim "
                f"reads up to {FORMAT_VERSION}; upgrade spectrim"
            )
        if not isinstance(self.modules, dict):
            raise InputError(
                f"config.json: quantization_config.modules is a {type(self.modules).__name__}; "
                "expected module path -> codec, rank and bias"
            )
        self.any_size = None if any_size is None else AnySizeFormat.from_json(any_size)
        for path, entry in self.modules.items():
            _check_entry(path, entry, sorted(CODECS) if self.any_size is None else [NESTED])

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            **self.information,
            **({} if self.any_size is None else {"any_size": self.any_size.to_json()}),
            "modules": self.modules,
        }


def _check_entry(path: str, entry: Any, codecs: list[str]) -> None:
    """One line of `modules`; the file is not trusted."""
    ok = (
        isinstance(entry, dict)
        and isinstance(entry.get("codec"), str)
        and entry["codec"] in codecs
        and type(entry.get("rank")) is int
        and entry["rank"] >= 1
        and isinstance(entry.get("bias"), bool)
    )
    if not ok:
        named = isinstance(entry, dict) and isinstance(entry.get("codec"), str) and entry["codec"] not in codecs
        newer = "; a newer spectrim may have written it: upgrade" if named else ""
        raise InputError(
            f"config.json: quantization_config.modules[{path!r}] is {entry!r}; "
            f"expected codec in {codecs}, rank >= 1 and bias true or false{newer}"
        )


class SpectrimHfQuantizer(HfQuantizer):
    """Puts stored layers in place before transformers loads the tensors."""

    requires_calibration = True  # refuses quantization_config= on a dense checkpoint
    quantization_config: SpectrimConfig
    slices: Slices | None = None  # between the two hooks, of a folder that holds all sizes

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_release(transformers.__version__)
        config, files = self.quantization_config, kwargs.get("checkpoint_files")
        if config.any_size is None:
            install_modules(model, config, files)
        else:
            self.slices = Slices(model, config.modules, config.any_size, files or ())
            self.slices.install()
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        if self.slices is not None:
            # What was loaded is one size, and from here on an ordinary compressed model: it saves as one.
            self.slices.fill()
            information = {**self.quantization_config.information, "size_ratio": self.slices.size}
            self.quantization_config = SpectrimConfig(modules=self.slices.modules_now(), **information)
            self.slices = None
            delattr(model.config, "size_ratio")
            model.config.quantization_config = self.quantization_config
        check_installed(model)
        # The tensors are ordinary floats: .half(), .float() and Trainer may treat the model as any other.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return make_dense(model, dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def check_release(release: str) -> None:
    """`InputError` for releases that would load a folder and compute something else."""
    if int(release.partition(".")[0]) < 5:
        raise InputError(
            f"transformers {release} reads the base of rotary positions from rope_theta, folders hold rope_parameters: "
            "it would load most models without a word and compute wrong logits. Install transformers>=5.0,<6"
        )


def install_modules(model: PreTrainedModel, config: SpectrimConfig, files: Iterable[str | Path] | None = None) -> None:
    """Replace each listed linear layer by an empty module of its codec and rank, on the layer's device and dtype.

    `files` are the checkpoint's files; where they are safetensors, each layer's tensors are checked before loading.
    """
    present = dict(model.named_modules())
    stored = stored_shapes(config, files or ())
    found = 0
    for path, entry in config.modules.items():
        name = path_in(present, path, model.base_model_prefix)
        if name is None:
            continue
        module = present[name]
        if not is_linear(module):
            raise InputError(f"config.json lists {path}, which is a {type(module).__name__}, not a linear layer")
        outputs, inputs = weight_of(module).shape
        kwargs = {"device": module.weight.device, "dtype": module.weight.dtype}
        try:
            replacement = codec_class(entry["codec"]).from_entry(inputs, outputs, entry, **kwargs)
        except ValueError as error:
            raise InputError(f"config.json gives {path} {error}") from error
        if stored:
            check_stored(path, entry, replacement, stored.get(path, {}))
        model.set_submodule(name, replacement)
        found += 1
    if config.modules and not found:
        raise InputError(
            f"none of the {len(config.modules)} compressed layers that config.json lists exists in "
            f"{type(model).__name__} (first: {next(iter(config.modules))}); the folder and the class do not match"
        )


def stored_shapes(config: SpectrimConfig, files: Iterable[str | Path]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes in the checkpoint by listed module and key; empty where the files name their tensors otherwise.

    Otherwise: not safetensors, or saved from another class (a headless model has no `model.` level in its names).
    """
    stored: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in files:
        if Path(file).suffix != ".safetensors":
            continue
        for name, info in read_header(Path(file)).items():
            parts = name.split(".")
            for i in range(1, len(parts)):
                owner = ".".join(parts[:i])
                if owner in config.modules:
                    stored.setdefault(owner, {})[".".join(parts[i:])] = info.shape
    return stored


def check_stored(path: str, entry: dict[str, Any], module: nn.Module, found: dict[str, tuple[int, ...]]) -> None:
    """What the files hold of one layer against what `config.json` makes of it.

    transformers fills a tensor that is in no file with random numbers (a bias: with whatever the memory held), skips
    one that no module wants, and mentions both only in a table.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) == found.get(key):
            continue
        holds = f"hold shape {list(found[key])}" if key in found else "do not hold it"
        makes = f"has shape {list(expected[key])}" if key in expected else "does not exist"
        raise InputError(
            f"{path}.{key}: the files {holds}; by config.json ({entry['codec']}, rank {entry['rank']}, "
            f"bias {str(entry['bias']).lower()}) it {makes}. The folder is damaged or was edited"
        )


def check_installed(model: nn.Module) -> None:
    """What was loaded against what the modules say; then each works out what follows from its tensors.

    Integers (codes, masks, places) of another width would be read as other numbers.

    Old versions of transformers skip shape checks for models with a quantizer and would load a wrong rank silently.
    """
    stored = {name: module for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    for name, module in stored.items():
        found = module.state_dict()
        like = type(module).from_entry(module.in_features, module.out_features, module.entry(), device="meta")
        for key, tensor in like.state_dict().items():
            read, made = found[key].dtype, tensor.dtype
            if read != made and not (read.is_floating_point and made.is_floating_point):
                raise InputError(
                    f"{name}.{key}: the file holds {str(read).removeprefix('torch.')}, expected "
                    f"{str(made).removeprefix('torch.')}; the folder is damaged or was edited"
                )
        for key, shape in module.shapes().items():
            holds = tuple(found[key].shape)
            if holds != shape:
                raise InputError(
                    f"{name}.{key}: the file holds shape {holds}, config.json says rank {module.rank}, "
                    f"which makes {shape}; the folder is damaged or was edited"
                )
        with _named(name):
            module.after_load()
    for name, module in stored.items():
        with _named(name):
            module.link(model)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """What a layer finds wrong with its tensors, as an error about the folder."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error


def make_dense(model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Turn every stored layer back into a dense one, in place; the config forgets the compression."""
    from transformers.pytorch_utils import Conv1D

    conv = model.config.model_type in CONV1D_MODELS
    for name, module in list(model.named_modules()):
        if not isinstance(module, StoredLinear):
            continue
        weight = module.dense_weight()
        target = dtype or next(module.parameters()).dtype
        outputs, inputs = weight.shape
        bias = getattr(module, "bias", None)
        dense = Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs, bias=bias is not None)
        dense = dense.to(device=weight.device, dtype=target)
        with torch.no_grad():
            weight_of(dense).copy_(weight)
            if bias is not None:
                dense.bias.copy_(bias)
        model.set_submodule(name, dense.train(module.training))
    detach(model)
    return model


CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose linear layers are transformers' Conv1D, which stores the weight transposed."""


def register() -> None:
    """Make transformers know the format; safe to call again."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(SpectrimConfig)
        register_quantizer(QUANT_METHOD)(SpectrimHfQuantizer)


def attach(model: PreTrainedModel, config: SpectrimConfig) -> None:
    """Let the ordinary `save_pretrained` write the format."""
    model.config.quantization_config = config
    setattr(model, "hf_quantizer", SpectrimHfQuantizer(config))  # noqa: B010  typed as a tensor


def detach(model: PreTrainedModel) -> None:
    """The opposite of `attach`: the model is an ordinary dense one again."""
    setattr(model, "hf_quantizer", None)  # noqa: B010
    for key in ("quantization_config",):
        if hasattr(model.config, key):
            delattr(model.config, key)
