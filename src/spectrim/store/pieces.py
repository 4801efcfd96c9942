"""Bytes between files and tensors, by plain reads and writes in pieces.

Neither pages of mapped files nor a second copy of a tensor count as memory of the process. To and from a GPU bytes go
by way of pinned pieces: two for reading, so that one is filled while the other is copied on, one for writing; each
thread has its own. One thread reads 3 to 6 GB/s of what the page cache holds, so that a piece is read in parts by
several.
"""

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from io import BufferedRandom, BufferedReader, BufferedWriter

import torch
from torch import Tensor

PIECE_BYTES = 64 * 2**20
PART_BYTES = 8 * 2**20
READERS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Threads that read at a time, in all."""


class Moved:
    """Bytes that went from and to files by pieces, of this process."""

    def __init__(self) -> None:
        self.read = self.written = 0
        self._lock = threading.RLock()

    def add(self, *, read: int = 0, written: int = 0) -> None:
        """So many more."""
        with self._lock:
            self.read += read
            self.written += written


MOVED = Moved()


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="pieces")


class Pieces:
    """Moves bytes between files and tensors on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = threading.local()

    def read(self, file: BufferedReader, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor from where the file stands; None if the file ends before it does."""
        found = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=self.device)
        return found.view(dtype).view(shape) if self.read_into(file, found) else None

    def read_into(self, file: BufferedReader, found: Tensor) -> bool:
        """Fill a row of bytes from where the file stands; False if the file ends before."""
        start = file.tell()
        for number, part in enumerate(found.split(PIECE_BYTES)):
            on_host = part.device.type == "cpu"
            piece = part if on_host else self._slot(number % 2, len(part))
            if not _fill(file.fileno(), piece, start):
                return False
            if not on_host:
                part.copy_(piece, non_blocking=True)
                self._own.events[number % 2].record(torch.cuda.current_stream(self.device))
            start += len(part)
        MOVED.add(read=len(found))
        return True

    def write(self, file: BufferedWriter | BufferedRandom, tensor: Tensor) -> None:
        """All bytes of a tensor, from where the file stands."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for part in flat.split(PIECE_BYTES):
            piece = part if part.device.type == "cpu" else self._slot(0, len(part)).copy_(part)
            file.write(piece.numpy().data)
        MOVED.add(written=len(flat))

    def _slot(self, number: int, nbytes: int) -> Tensor:
        """Pinned memory of this thread, when what was in it has been copied on."""
        own = self._own.__dict__
        slots, events = own.setdefault("slots", {}), own.setdefault("events", {})
        if number not in slots:
            slots[number] = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
            events[number] = torch.cuda.Event(blocking=True)
        events[number].synchronize()
        return slots[number][:nbytes]


def _fill(descriptor: int, piece: Tensor, start: int) -> bool:
    """Fill a row of bytes of the host from `start` of a file, by several threads; False if the file ends before."""
    parts = piece.split(PART_BYTES)
    if len(parts) <= 1:
        return all(_fill_part(descriptor, part, start) for part in parts)
    asked = [_readers().submit(_fill_part, descriptor, part, start + i * PART_BYTES) for i, part in enumerate(parts)]
    # All are waited for, whatever one of them says: the piece is the caller's when this returns.
    failed = [error for each in asked if (error := each.exception()) is not None]
    if failed:
        raise failed[0]
    return all(each.result() for each in asked)


def _fill_part(descriptor: int, part: Tensor, start: int) -> bool:
    """However little each read gives (network mounts, signals)."""
    view, done = part.numpy().data, 0
    while done < len(view):
        count = _read_at(descriptor, view[done:], start + done)
        if not count:
            return False
        done += count
    return True


def _read_at(descriptor: int, into: memoryview, start: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], start)
    found = os.pread(descriptor, min(len(into), 2**20), start)  # older macOS: one copy more
    into[: len(found)] = found
    return len(found)
