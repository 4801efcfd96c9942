"""The folder a user gets: an ordinary Hugging Face folder in which the linear layers are low-rank."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectrim import version
from spectrim.engines.any_size import AnySize
from spectrim.engines.learned import skeleton
from spectrim.engines.pipeline import Outcome
from spectrim.errors import NumericalError
from spectrim.integrations.any_size import NESTED, AnySizeFormat
from spectrim.integrations.transformers import FORMAT_VERSION, SpectrimConfig, attach
from spectrim.model_method import ModelMethod
from spectrim.models.load import Source, no_progress_bars, require_unchanged
from spectrim.nn.codecs import StoredLinear
from spectrim.nn.nested import NestedLinear
from spectrim.store import TensorInfo, copy_companions
from spectrim.store.extra import add_shard

MAX_SHARD_SIZE = "5GB"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "LICENSE",
)
"""Files that are copied as bytes from the source; never code."""


@torch.no_grad()
def round_to(model: nn.Module, dtype: torch.dtype, *, allow_nonfinite: bool = False) -> None:
    """Round all weights to what will be stored, still held in their dtype: figures are then about the file.

    Weights that the dense model shares are replaced rather than changed; tied ones stay tied. A number that rounding
    makes Inf is an error; one that was none before is too, unless allowed.
    """
    rounded: dict[nn.Parameter, nn.Parameter] = {}
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in rounded:
            stored = stored_as(path, parameter, dtype, allow_nonfinite=allow_nonfinite).to(parameter.dtype)
            same = torch.equal(stored, parameter)  # never with a NaN, which is then a copy with a NaN
            rounded[parameter] = parameter if same else nn.Parameter(stored, parameter.requires_grad)
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, rounded[parameter])


def stored_as(path: str, tensor: Tensor, dtype: torch.dtype, *, allow_nonfinite: bool = False) -> Tensor:
    """A weight in the dtype that is stored; NumericalError where that makes a number Inf, or it was none before."""
    stored = tensor.to(dtype)
    good = torch.isfinite(stored) | (~torch.isfinite(tensor) if allow_nonfinite else False)
    if not bool(good.all()):
        raise NumericalError(
            f"{path}: its largest value, {float(tensor.abs().max()):.4g}, is Inf or NaN in "
            f"{str(dtype).removeprefix('torch.')}, which holds up to {torch.finfo(dtype).max:.4g}; "
            "use --dtype bfloat16 or float32"
        )
    return stored


def finer_than_held(dense: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """A warning where `dtype` has more digits than what the model was held in while it was compressed, else nothing."""
    held = next(dense.parameters()).dtype
    if torch.finfo(dtype).eps >= torch.finfo(held).eps:
        return []
    asked, had = (str(d).removeprefix("torch.") for d in (dtype, held))
    return [
        f"--dtype {asked}: the model was held in {had}, since its weights in float32 would take too much of the GPU, "
        f"so compressed layers hold numbers that were rounded to {had}; a larger GPU or --device cpu keeps {asked}"
    ]


def finalise(outcome: Outcome, dtype: torch.dtype, *, base_model: str | None) -> PreTrainedModel:
    """A model of its own (nothing shared with the dense one) in the stored dtype, ready for `save_pretrained`."""
    model = copy_in(outcome.model, dtype)
    config = format_config(outcome, base_model)
    if config.modules or not isinstance(outcome.method, ModelMethod):  # else it is a plain model, of another shape
        attach(model, config)
    return model


def copy_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy that shares nothing, its parameters in `dtype`; buffers of the architecture keep theirs, as in loading."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, StoredLinear):
            module.weight = module.weight.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def format_config(outcome: Outcome, base_model: str | None) -> SpectrimConfig:
    """What goes into config.json: codec, rank and bias of every layer that changed, and where it came from."""
    modules = {
        name: module.entry() for name, module in outcome.model.named_modules() if isinstance(module, StoredLinear)
    }
    rounded = outcome.factor_quantization
    return SpectrimConfig(
        modules=modules,
        format_version=FORMAT_VERSION,
        **({} if rounded is None else {"factor_quantization": rounded._asdict()}),
        tool_version=version.__version__,
        base_model=base_model,
        method=outcome.method.to_config(),
    )


def write_folder(
    stage: Path, model: PreTrainedModel, source: Source | None, extra: Mapping[str, TensorInfo] | None = None
) -> None:
    """Model files by transformers' own `save_pretrained`, tokenizer files and `extra` tensors from the source."""
    with no_progress_bars():
        model.save_pretrained(stage, max_shard_size=MAX_SHARD_SIZE)
    if source is None:
        return
    copy_companions(source.folder, stage, COMPANIONS)
    if extra:
        require_unchanged(source)
        add_shard(stage, extra)
        require_unchanged(source)


def write_nested(
    stage: Path,
    sizes: AnySize,
    dtype: torch.dtype,
    size_ratio: float,
    source: Source | None,
    base_model: str | None,
    extra: Mapping[str, TensorInfo] | None = None,
) -> None:
    """One folder that holds every size; `size_ratio` is the one that a load without that argument gives."""
    model = skeleton(sizes.dense)
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for name, nested in sizes.layers.items():
        parts = (nested.left.cpu(), nested.right.cpu(), nested.scores.cpu(), nested.levels.cpu())
        model.set_submodule(name, NestedLinear(*parts, None if nested.bias is None else nested.bias.cpu()))
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter not in cast:
            cast[parameter] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, cast[parameter])
    model.config.dtype = dtype
    model.config.size_ratio = size_ratio
    config = SpectrimConfig(
        modules={
            name: {"codec": NESTED, "rank": len(nested.left), "bias": nested.bias is not None}
            for name, nested in sizes.layers.items()
        },
        any_size=AnySizeFormat(
            storage=sizes.method.alone, anchors=sizes.anchors, adapter_rank=sizes.adapter_rank
        ).to_json(),
        tool_version=version.__version__,
        base_model=base_model,
        method=sizes.method.to_config(),
    )
    attach(model, config)
    write_folder(stage, model, source, extra)
