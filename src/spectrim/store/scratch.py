"""Tensors that a run puts on disk because memory is for other things, and reads back while it works.

One file a tensor, in the work folder of the run. Names end in `.new`, as those of unfinished writes do: what a kill
leaves is removed by the next run there and by `spectrim clean` (store/work.py). Nothing is synced: none of it outlives
the run.

Beside a GPU files are written behind by a few threads, since one writes 1 to 2 GB/s into the page cache: the tensor
stays on the device until it is written, at most `ON_THE_WAY` bytes of them. On a CPU, whose memory is what is spared,
writes are finished when `put` returns.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from spectrim.errors import InputError, ResourceError
from spectrim.store import disk
from spectrim.store.files import open_regular, shown
from spectrim.store.header import TensorInfo
from spectrim.store.pieces import Pieces
from spectrim.store.tensors import DTYPES

WRITERS = 4
ON_THE_WAY = 3 * 2**29
"""Bytes that wait on the device to be written, at most: more than that, and the caller waits."""


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


class _File:
    """The file of one tensor, which threads write and whoever lets go of the tensor removes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # Python may let go of a tensor wherever it is, in this very thread too
        self._busy = self._gone = False

    def write(self, pieces: Pieces, tensor: Tensor) -> None:
        """Put a tensor in the place of what was there, where its room is kept if it is as long."""
        with self._lock:
            if self._gone:
                return
            self._busy = True
        try:
            if self.path.exists() and self.path.stat().st_size == tensor.nbytes:
                with open(self.path, "r+b") as file:
                    pieces.write(file, tensor)
            else:
                with open(self.path, "wb") as file:
                    pieces.write(file, tensor)
        except OSError as error:
            raise disk.as_resource_error(error, self.path) from error
        finally:
            with self._lock:
                self._busy = False
                gone = self._gone
            if gone:
                disk.remove(self.path)

    def remove(self) -> None:
        """Now, or when the thread that writes it is done."""
        with self._lock:
            self._gone = True
            busy = self._busy
        if not busy:
            disk.remove(self.path)


class Stored:
    """One tensor in a file, which goes when nobody holds this any more."""

    def __init__(self, scratch: "Scratch", path: Path) -> None:
        self._scratch, self._file = scratch, _File(path)
        self._written: Future[None] | None = None
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.nbytes = 0

    def write(self, tensor: Tensor) -> None:
        """Put it in the place of what was there. Its numbers must stay as they are until they are written."""
        self._scratch.leave_if_stopped()
        self.settled()
        self._written = self._scratch.write(self._file, tensor)
        self._scratch.count(tensor.nbytes - self.nbytes)
        self.shape, self.dtype, self.nbytes = tuple(tensor.shape), tensor.dtype, tensor.nbytes

    def settled(self) -> None:
        """Wait until it is written; `ResourceError` if the disk failed."""
        if self._written is not None:
            self._written.result()

    def read(self) -> Tensor:
        """On the device of the scratch folder."""
        self._scratch.leave_if_stopped()
        return self._fill(self._empty())

    def ahead(self) -> "Future[Tensor] | None":
        """The same in a thread; None where nothing is read ahead."""
        return self._scratch.read_ahead(self._fill, self._empty())

    def _empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self._scratch.pieces.device)

    def _fill(self, found: Tensor) -> Tensor:
        self.settled()
        path = self._file.path
        try:
            with open(path, "rb") as file:
                whole = self._scratch.pieces.read_into(file, found.view(-1).view(torch.uint8))
        except OSError as error:
            raise disk.as_resource_error(error, path) from error
        if not whole:
            raise ResourceError(f"{path}: became shorter while the run needed it; let nothing write there")
        return found

    def __del__(self) -> None:
        try:
            self._scratch.count(-self.nbytes)
            self._file.remove()
        except BaseException as stop:  # of a signal: what leaves a `__del__`, Python prints and forgets
            self._scratch.stopped = stop


class Scratch:
    """The scratch files of one run in `folder`, for tensors on `device`.

    `threads` write behind and read ahead; None: if the device is a GPU.
    """

    def __init__(self, folder: Path, device: torch.device, *, threads: bool | None = None) -> None:
        self.folder, self.pieces, self.device = folder, Pieces(device), device
        self.nbytes = self.most_bytes = 0
        self.stopped: BaseException | None = None
        """What a signal raised while a file was removed."""
        self._made = 0
        self._lock = threading.RLock()
        threads = device.type == "cuda" if threads is None else threads
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="scratch") if threads else None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ahead") if threads else None
        self._under_way: deque[tuple[Future[None], int]] = deque()
        self._own = threading.local()

    def put(self, tensor: Tensor) -> Stored:
        """A tensor in a new file; `ResourceError` if the disk fails."""
        stored = Stored(self, self.folder / f"scratch-{self._made:06d}.new")
        self._made += 1
        stored.write(tensor)
        return stored

    def write(self, file: _File, tensor: Tensor) -> "Future[None] | None":
        """At once, or behind; an error of a write before may be raised here."""
        tensor = tensor.detach()
        if self._writers is None:
            file.write(self.pieces, tensor)
            return None
        nbytes, way = tensor.nbytes, self._under_way
        while way and (way[0][0].done() or nbytes + sum(size for _, size in way) > ON_THE_WAY):
            way.popleft()[0].result()
        done = self._writers.submit(self._behind, file, tensor, self._mark())
        way.append((done, nbytes))
        return done

    def _behind(self, file: _File, tensor: Tensor, ready: "torch.cuda.Event | None") -> None:
        with self._beside(ready):
            file.write(self.pieces, tensor)

    def read_ahead(self, fill: Callable[[Tensor], Tensor], found: Tensor) -> "Future[Tensor] | None":
        """`fill(found)` in a thread. The memory may belong to work that is not finished: the copy waits for that."""
        if self._reader is None:
            return None

        def read(ready: "torch.cuda.Event | None") -> Tensor:
            with self._beside(ready):
                return fill(found)

        return self._reader.submit(read, self._mark())

    def _mark(self) -> "torch.cuda.Event | None":
        """An event at this point of the caller's stream."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def _beside(self, ready: "torch.cuda.Event | None") -> Iterator[None]:
        """A stream of this thread's own, which waits for `ready`; all that was begun in it is done at the end."""
        if ready is None:
            yield
            return
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        stream = self._own.stream
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            yield
            stream.synchronize()

    def close(self) -> None:
        """End the threads; what they have not begun is not written."""
        for pool in (self._writers, self._reader):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def count(self, nbytes: int) -> None:
        """So many bytes more, or fewer, lie there."""
        with self._lock:
            self.nbytes += nbytes
            self.most_bytes = max(self.most_bytes, self.nbytes)

    def leave_if_stopped(self) -> None:
        """Raise what a signal raised where nothing can be raised."""
        stopped, self.stopped = self.stopped, None
        if stopped is not None:
            raise stopped
