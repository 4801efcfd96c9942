"""Whether a folder is what was published, and whether its files belong together: everything that is wrong at once."""

from pathlib import Path

import torch

from spectrim.errors import InputError, SpectrimError
from spectrim.integrations.transformers import SpectrimConfig, install_modules
from spectrim.models.load import Source, check_against_config, load_model, meta_model, quantization_of, resolve
from spectrim.store.manifest import differences


def find_problems(folder: Path) -> list[str]:
    """Empty for a sound folder. Checksums of all files, headers against the index, headers against config.json."""
    if not folder.is_dir():
        return ["no such folder"]
    problems = []
    try:
        problems += differences(folder)
    except InputError as error:
        problems.append(str(error))
    try:
        source = resolve(str(folder))
        check_against_config(source)
        problems += _misfits(source)
    except SpectrimError as error:
        problems.append(str(error))
    return problems


def _misfits(source: Source) -> list[str]:
    """Tensors that are not as config.json says, by name."""
    if source.any_size is not None:
        load_model(source, torch.device("cpu"))  # its layers are cut out of what is stored; nothing less tells
        return []
    model = meta_model(source.config)
    if source.is_compressed:
        config = SpectrimConfig(**quantization_of(source.config))
        install_modules(model, config, [str(shard) for shard in source.checkpoint.shards])
    stored = source.checkpoint.tensors
    tied = {name for names in _ties(model) for name in names}
    problems = []
    for name, tensor in model.state_dict().items():
        if name not in stored and name not in tied:
            problems.append(f"missing: tensor {name} of shape {list(tensor.shape)}")
        elif name in stored and stored[name].shape != tuple(tensor.shape):
            problems.append(
                f"tensor {name}: {list(stored[name].shape)} in {stored[name].file.name}, config.json asks for "
                f"{list(tensor.shape)}"
            )
    return problems


def _ties(model: torch.nn.Module) -> list[list[str]]:
    """Names that share one tensor, of which a file holds one."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [found for found in names.values() if len(found) > 1]
