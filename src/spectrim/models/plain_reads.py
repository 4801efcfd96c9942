"""transformers loads a checked folder by plain reads instead of mapping its files.

A file that is cut while it is mapped (a network mount, a download that starts anew) ends the process by SIGBUS, with no
message and no chance to tidy up. Read tensor by tensor, as transformers asks for them, it is an error that names the
file; memory is that of the tensor at hand, as with mapped files.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import modeling_utils

from spectrim.store import Checkpoint, TensorInfo
from spectrim.store.tensors import read_tensor

_log = logging.getLogger(__name__)
OPENS = "safe_open"
"""The name under which transformers' loader knows safetensors' reader, in 5.0 as in 5.23."""


class LazyTensor:
    """A tensor that is read when it is indexed, as a slice of safetensors is."""

    def __init__(self, info: TensorInfo) -> None:
        self.info = info

    def __getitem__(self, index: Any) -> Tensor:
        return read_tensor(self.info)[index]

    def get_shape(self) -> list[int]:
        """As safetensors gives it."""
        return list(self.info.shape)

    def get_dtype(self) -> str:
        """As safetensors names it."""
        return self.info.dtype


class PlainFile:
    """One checked file in the place of `safetensors.safe_open`."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held open."""

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.tensors)

    def metadata(self) -> dict[str, str]:
        """What transformers looks for there; the header was checked before."""
        return {"format": "pt"}

    def get_slice(self, name: str) -> LazyTensor:
        """A tensor that is not read yet."""
        return LazyTensor(self.tensors[name])

    def get_tensor(self, name: str) -> Tensor:
        """A tensor."""
        return read_tensor(self.tensors[name])


@contextmanager
def plain_reads(checkpoint: Checkpoint) -> Iterator[None]:
    """While this is open, transformers reads the files of `checkpoint` plainly, and maps all others as ever."""
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        files.setdefault(os.path.realpath(info.file), {})[name] = info
    mapped = getattr(modeling_utils, OPENS, None)
    if mapped is None:
        _log.warning("this version of transformers maps files: one that is cut while it is read ends the process")
        yield
        return

    def open_plainly(path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        tensors = files.get(os.path.realpath(path))
        return mapped(path, *args, **kwargs) if tensors is None else PlainFile(tensors)

    setattr(modeling_utils, OPENS, open_plainly)
    try:
        yield
    finally:
        setattr(modeling_utils, OPENS, mapped)
