"""Tensors that a run puts on disk because memory is for other things, and reads back while it works.

One file a tensor, in the work folder of the run. Names end in `.new`, as those of unfinished writes do: what a kill
leaves is removed by the next run there and by `spectrim clean` (store/work.py). Nothing is synced: none of it outlives
the run. Plain reads and writes in pieces, so that neither pages of mapped files nor a second copy count as memory of
the process; to and from a GPU by way of one pinned piece.
"""

import math
from io import BufferedRandom, BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from spectrim.errors import InputError, ResourceError
from spectrim.store import disk
from spectrim.store.files import open_regular, read_fully, shown
from spectrim.store.header import TensorInfo
from spectrim.store.tensors import DTYPES

PIECE_BYTES = 64 * 2**20


class Pieces:
    """Moves bytes between files and tensors on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: Tensor | None = None

    def read(self, file: BufferedReader, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor from where the file stands; None if the file ends before it does."""
        found = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=self.device)
        for part in found.split(PIECE_BYTES):
            piece = part if part.device.type == "cpu" else self._piece(len(part))
            if read_fully(file, piece.numpy().data) != len(piece):
                return None
            if piece is not part:
                part.copy_(piece)
        return found.view(dtype).view(shape)

    def write(self, file: BufferedWriter | BufferedRandom, tensor: Tensor) -> None:
        """All bytes of a tensor, from where the file stands."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(PIECE_BYTES):
            piece = part if part.device.type == "cpu" else self._piece(len(part)).copy_(part)
            file.write(piece.numpy().data)

    def _piece(self, nbytes: int) -> Tensor:
        if self._pinned is None:
            self._pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._pinned[:nbytes]


def read_onto(info: TensorInfo, pieces: Pieces) -> Tensor:
    """A tensor of a checked safetensors file, on the device of `pieces`; `InputError` if it cannot be read."""
    if info.dtype not in DTYPES:
        raise InputError(f"{info.file}: tensor {shown(info.name)}: is {info.dtype}; known: {', '.join(DTYPES)}")
    with open_regular(info.file) as (file, _):
        file.seek(info.start)
        found = pieces.read(file, tuple(info.shape), DTYPES[info.dtype])
    if found is None:
        raise InputError(
            f"{info.file}: tensor {shown(info.name)}: the file became shorter while it was read; let nothing write to "
            "it and run again"
        )
    return found


class Stored:
    """One tensor in a file, which goes when nobody holds this any more."""

    def __init__(self, scratch: "Scratch", path: Path) -> None:
        self._scratch, self._path = scratch, path
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.nbytes = 0

    def write(self, tensor: Tensor) -> None:
        """Put it in the place of what was there."""
        self._scratch.leave_if_stopped()
        try:
            with open(self._path, "wb") as file:
                self._scratch.pieces.write(file, tensor)
        except OSError as error:
            raise disk.as_resource_error(error, self._path) from error
        self._scratch.count(tensor.nbytes - self.nbytes)
        self.shape, self.dtype, self.nbytes = tuple(tensor.shape), tensor.dtype, tensor.nbytes

    def read(self) -> Tensor:
        """On the device of the scratch folder."""
        self._scratch.leave_if_stopped()
        try:
            with open(self._path, "rb") as file:
                found = self._scratch.pieces.read(file, self.shape, self.dtype)
        except OSError as error:
            raise disk.as_resource_error(error, self._path) from error
        if found is None:
            raise ResourceError(f"{self._path}: became shorter while the run needed it; let nothing write there")
        return found

    def __del__(self) -> None:
        try:
            self._scratch.count(-self.nbytes)
            disk.remove(self._path)
        except BaseException as stop:  # of a signal: what leaves a `__del__`, Python prints and forgets
            self._scratch.stopped = stop


class Scratch:
    """The scratch files of one run in `folder`."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.pieces = folder, Pieces(device)
        self.nbytes = self.most_bytes = 0
        self.stopped: BaseException | None = None
        """What a signal raised while a file was removed."""
        self._made = 0

    def put(self, tensor: Tensor) -> Stored:
        """A tensor in a new file; `ResourceError` if the disk fails."""
        stored = Stored(self, self.folder / f"scratch-{self._made:06d}.new")
        self._made += 1
        stored.write(tensor)
        return stored

    def count(self, nbytes: int) -> None:
        """So many bytes more, or fewer, lie there."""
        self.nbytes += nbytes
        self.most_bytes = max(self.most_bytes, self.nbytes)

    def leave_if_stopped(self) -> None:
        """Raise what a signal raised where nothing can be raised."""
        stopped, self.stopped = self.stopped, None
        if stopped is not None:
            raise stopped
