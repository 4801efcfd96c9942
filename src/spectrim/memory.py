"""Out of memory: the same work in smaller batches, said and counted; the result does not depend on the batch size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

from spectrim.errors import ResourceError
from spectrim.linalg.fallback import Fallback, tell
from spectrim.processes import present

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """A GPU's own error, Python's, or the one of torch's allocator on the CPU, which has no type."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


@dataclass
class Batch:
    """How many windows are worked on at a time: halved when memory runs out, and not raised again."""

    size: int
    give_way: Callable[[], str | None] = lambda: None
    """What is given up before batches shrink, which it says; None where there is nothing left to give up."""

    def run(self, stage: str, work: Callable[[int], T], *, most: int | None = None) -> T:
        """`work(size)`, from its beginning with half the size as often as memory runs out.

        `work` must give the same result for every size and leave nothing behind when it fails, or go on with what it
        left. `most` is how many windows there are, where that may be fewer. One of several processes cannot begin anew
        where it has exchanged something with the others: it then fails.
        """
        exchanges = present().exchanges
        while True:
            size = self.size if most is None else min(self.size, most)
            try:
                return work(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = short(error)
                other = self.give_way()
                if size == 1 and other is None:
                    raise out_of_memory(stage, "one window", said) from error
                if present().exchanges != exchanges:
                    raise out_of_memory(stage, f"{size} windows in one of several processes", said) from error
            # Only here: the error's traceback held the tensors of the failed try.
            self.size = size
            if other is None:
                self.halve(stage, said)
            else:
                tell(Fallback(stage, f"{size} windows", other, said))
                release()

    def halve(self, stage: str, said: str) -> None:
        """Half the size from now on; OutOfMemory where it is one window."""
        if self.size == 1:
            raise out_of_memory(stage, "one window", said)
        before, self.size = self.size, self.size // 2
        tell(Fallback(stage, f"{before} windows", f"batches of {self.size}", said))
        release()


class OutOfMemory(ResourceError):
    """Nothing smaller is left to try; `said` by the allocator."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


def out_of_memory(stage: str, least: str, said: str) -> OutOfMemory:
    """What to say when nothing smaller is left to try."""
    message = (
        f"{stage}: out of memory with {least} at a time ({said}); use shorter windows (--calib-length), another "
        "device (--device cpu), or a machine with more memory"
    )
    return OutOfMemory(message, said)


def short(error: BaseException) -> str:
    """The first words of what an allocator says."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def release() -> None:
    """Give cached blocks of a GPU back, so that larger ones can be formed of them."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


SHELF_SHARE = 0.34
"""Of a GPU's memory, all that is allocated counted, up to which large results stay there; the rest is for work."""
WHOLE_SHARE = 0.3
"""Of a GPU's memory that the statistics of all layers at once may take; above, models are measured block by block."""
MOST_SHARE = 0.8
"""The same for methods that cannot be had block by block, rounds and couplings counted; the rest is for work."""


_ceiling: ContextVar[int | None] = ContextVar("ceiling", default=None)


@contextmanager
def memory_capped(nbytes: int | None) -> Iterator[None]:
    """Inside, a GPU counts as one of at most so many bytes, in all that is decided by its size; None: of all it has."""
    token = _ceiling.set(nbytes)
    try:
        yield
    finally:
        _ceiling.reset(token)


def total_memory(device: torch.device) -> int | None:
    """Bytes of a GPU that count; None of what has no memory of its own, or is not there."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    total, cap = torch.cuda.get_device_properties(device).total_memory, _ceiling.get()
    return total if cap is None else min(total, cap)


def memory_in_use(device: torch.device) -> int:
    """Bytes of a GPU that tensors take."""
    return torch.cuda.memory_allocated(device)


def room_left(device: torch.device) -> int | None:
    """Bytes that large results may still take of a GPU; None of what has no memory of its own."""
    total = total_memory(device)
    return None if total is None else int(SHELF_SHARE * total) - memory_in_use(device)


def has_room(device: torch.device, nbytes: int) -> bool:
    """Whether a result of so many bytes stays on the device."""
    left = room_left(device)
    return left is None or nbytes <= left


def fits_whole(device: torch.device, nbytes: int, share: float = WHOLE_SHARE) -> bool:
    """Whether statistics of so many bytes are held at once, in this share of a GPU's memory."""
    total = total_memory(device)
    return total is None or nbytes <= share * total


WIDE_SHARE = 1 / 6
"""Of a GPU's memory that weights in float32 may take; above, they stay as they are stored."""


def holds_wide(device: torch.device, numbers: int) -> bool:
    """Whether a model of so many numbers is held in float32."""
    total = total_memory(device)
    return total is None or 4 * numbers <= WIDE_SHARE * total


def held_dtype(device: torch.device, stored: torch.dtype, numbers: int) -> torch.dtype:
    """The dtype in which a dense model is worked on: float32, or bfloat16 as it is `stored` where that is too large."""
    return stored if stored == torch.bfloat16 and not holds_wide(device, numbers) else torch.float32
