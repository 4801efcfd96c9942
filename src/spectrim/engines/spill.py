"""Hidden states, statistics and spectra of a run with little memory, in scratch files.

States       hidden states between two blocks: on the device while there is room, else in files
FileShelf    statistics and spectra (shelf.py): in files, read as the shelf in memory is
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping, MutableSequence
from concurrent.futures import Future
from typing import overload

import torch
from torch import Tensor

from spectrim.engines.shelf import Shelf
from spectrim.store.scratch import Scratch, Stored

HasRoom = Callable[[int], bool]
"""Whether so many bytes more may stay on the device."""


class States(MutableSequence[Tensor]):
    """Tensors in a row, each where there was room when it was put there."""

    def __init__(self, scratch: Scratch, has_room: HasRoom, tensors: Iterable[Tensor] = ()) -> None:
        self.scratch, self.has_room = scratch, has_room
        self._places: list[Tensor | Stored] = []
        for tensor in tensors:
            self.append(tensor)

    def _place(self, tensor: Tensor) -> Tensor | Stored:
        tensor = tensor.detach()
        return tensor if self.has_room(tensor.nbytes) else self.scratch.put(tensor)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "States": ...
    def __getitem__(self, index: int | slice) -> "Tensor | States":
        if isinstance(index, slice):
            return States(self.scratch, self.has_room, (self[i] for i in range(*index.indices(len(self)))))
        place = self._places[index]
        return place.read() if isinstance(place, Stored) else place

    def __setitem__(self, index: object, tensor: object) -> None:
        assert isinstance(index, int)
        assert isinstance(tensor, Tensor)
        place = self._places[index]
        if isinstance(place, Stored):
            place.write(tensor)
        else:
            self._places[index] = tensor.detach()

    def __delitem__(self, index: int | slice) -> None:
        del self._places[index]

    def insert(self, index: int, value: Tensor) -> None:
        """Put one more in."""
        self._places.insert(index, self._place(value))

    def __len__(self) -> int:
        return len(self._places)


class _Files(MutableMapping[object, Tensor]):
    """Tensors by key in scratch files."""

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self.stored: dict[object, Stored] = {}

    def __getitem__(self, key: object) -> Tensor:
        return self.stored[key].read()

    def __setitem__(self, key: object, tensor: Tensor) -> None:
        if key in self.stored:
            self.stored[key].write(tensor)
        else:
            self.stored[key] = self.scratch.put(tensor)

    def __delitem__(self, key: object) -> None:
        del self.stored[key]

    def __contains__(self, key: object) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[object]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class FileShelf(Shelf):
    """A shelf whose tensors lie in scratch files, in float32."""

    def __init__(self, device: torch.device, scratch: Scratch) -> None:
        super().__init__(device, on_host=True)
        self.kept = self.files = _Files(scratch)
        self.read: dict[object, Future[Tensor]] = {}

    def put(self, key: object, tensor: Tensor) -> None:
        """Keep it, in the place of what had this key."""
        self.read.pop(key, None)
        narrow = tensor.detach().float()
        # It may be written behind, and the caller may write to what is its own.
        self.kept[key] = narrow.clone() if narrow.data_ptr() == tensor.data_ptr() else narrow

    def settled(self, key: object) -> Tensor:
        """What is kept, read for this: it may be written to."""
        self.read.pop(key, None)
        return self.kept[key]

    def ahead(self, key: object) -> None:
        """Begin to read what is soon needed, where that is done beside other work."""
        if key not in self.read and key in self.files:
            coming = self.files.stored[key].ahead()
            if coming is not None:
                self.read[key] = coming

    def fetch(self, key: object) -> Tensor:
        """On the device, as it is kept."""
        coming = self.read.pop(key, None)
        return self.kept[key] if coming is None else coming.result()

    def drop(self, key: object) -> None:
        """Keep it no longer."""
        self.read.pop(key, None)
        self.files.stored.pop(key, None)

    def shape_of(self, key: object) -> tuple[int, ...]:
        """Of what has this key, which is not read for that."""
        return self.files.stored[key].shape
