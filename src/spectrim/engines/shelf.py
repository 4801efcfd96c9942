"""Statistics and spectra of models too large to keep them on the device: in float32, on the host where room ends.

A shelf reads like the dict it stands for: one layer's tensors come to the device in float64 when they are asked for.
What layers share is kept once. Where a tensor lies is chosen by the memory at hand when it is put there (memory.py).

    statistics of a 7B model   (inputs^2 + outputs^2) of every layer, 64 GB in float32
    spectra of a 7B model      K (O + I) numbers of every layer, 41 GB in float32; 22 GB once cut to keep 0.8
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import Future

import torch
from torch import Tensor

from spectrim.engines.ferry import Coming, Ferry, ferry_of
from spectrim.linalg.factor import Spectrum
from spectrim.memory import has_room
from spectrim.stats import SYMMETRIC_STATS, Stat, Stats

Owned = tuple[str, Stat]
"""Whose measurement, and of what."""


class Shelf:
    """Tensors by key, in float32, on the device while it has room (never, if they are to be `on_host`), else there.

    A GPU's tensors go to the host and come back while it computes (ferry.py): those there are complete once `settled`.
    """

    def __init__(self, device: torch.device, *, on_host: bool = False) -> None:
        self.device, self.on_host = device, on_host
        self.kept: MutableMapping[object, Tensor] = {}
        self.ferry: Ferry | None = None
        self.leaving: dict[object, Future[None]] = {}
        self.coming: dict[object, Coming] = {}

    def put(self, key: object, tensor: Tensor) -> None:
        """Keep it, in the place of what had this key: where that lies, if its shape is the same."""
        narrow, old = tensor.detach().float(), self.kept.get(key)
        if old is not None and old.shape != narrow.shape:
            self.drop(key)
            old = None
        if old is None:
            here = not self.on_host and has_room(self.device, narrow.nbytes)
            old = self.kept[key] = torch.empty(narrow.shape, device=self.device if here else "cpu")
            if not here and self.device.type == "cuda":
                self.ferry = ferry_of(self.device)
        # A copy in every case: a view would keep the tensor it looks at alive.
        if self.ferry is None or old.device.type != "cpu":
            old.copy_(narrow)
            return
        self.settled(key)
        own = narrow.data_ptr() != tensor.data_ptr()  # else the caller may write to it
        self.leaving[key] = self.ferry.away(narrow.contiguous() if own else narrow.clone(), old)

    def settled(self, key: object) -> Tensor:
        """What is kept, where it lies, once nothing is on its way to or from there: it may be written to."""
        leaving, coming = self.leaving.pop(key, None), self.coming.pop(key, None)
        if leaving is not None:
            leaving.result()
        if coming is not None:
            coming.done.result()
        return self.kept[key]

    def ahead(self, key: object) -> None:
        """Begin to bring a tensor of the host to the device, where it is soon needed."""
        if self.ferry is not None and key not in self.coming and self.kept[key].device.type == "cpu":
            self.coming[key] = self.ferry.ahead(self.settled(key))

    def fetch(self, key: object) -> Tensor:
        """On the device, as it is kept; not to be written to."""
        self.ahead(key)
        coming = self.coming.pop(key, None)
        if coming is None or self.ferry is None:
            return self.kept[key].to(self.device)
        return self.ferry.take(coming)

    def get(self, key: object) -> Tensor:
        """On the device, in float64."""
        return self.fetch(key).double()

    def drop(self, key: object) -> None:
        """Keep it no longer."""
        for where in (self.leaving, self.coming, self.kept):
            where.pop(key, None)

    def shape_of(self, key: object) -> tuple[int, ...]:
        """Of what has this key."""
        return tuple(self.kept[key].shape)


STRIP = 1024
"""Rows in one strip of a packed symmetric matrix."""


def pack_symmetric(matrix: Tensor) -> Tensor:
    """Strips of a symmetric matrix (n, n) from the diagonal on, as one row: little more than half of its numbers."""
    lows = range(0, len(matrix), STRIP)
    return torch.cat([matrix[low : low + STRIP, low:].reshape(-1) for low in lows])


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """The matrix (n, n) again."""
    matrix = packed.new_empty(n, n)
    start = 0
    for low in range(0, n, STRIP):
        high = min(low + STRIP, n)
        strip = packed[start : start + (high - low) * (n - low)].view(high - low, n - low)
        matrix[low:high, low:] = strip
        matrix[high:, low:high] = strip[:, high - low :].mT
        start += strip.numel()
    return matrix


def packed_numbers(n: int) -> int:
    """How many numbers `pack_symmetric` keeps of a matrix (n, n)."""
    return sum(min(STRIP, n - low) * (n - low) for low in range(0, n, STRIP))


class StatsShelf(Mapping[str, Stats]):
    """Statistics of every layer; layers that read the same share what was measured of it."""

    def __init__(self, device: torch.device, shelf: Shelf | None = None) -> None:
        self.shelf = Shelf(device, on_host=True) if shelf is None else shelf
        self.tokens: dict[str, dict[int, int]] = {}
        self.owners: dict[str, dict[Stat, str]] = {}
        self.rounds: dict[Owned, int] = {}
        self.sides: dict[Owned, int] = {}
        self.sizes: dict[Owned, Tensor] = {}
        self.recent: dict[Owned, Tensor] = {}

    def add(self, owner: str, stat: Stat, value: Tensor, *, share: float, again: int) -> None:
        """What round `again` measured: `share` of the mean with what is there. Twice in one round counts once."""
        key = (owner, stat)
        if self.rounds.get(key, -1) >= again:
            return
        mean = value if key not in self.rounds else self._get(key).mul_(1 - share).add_(value, alpha=share)
        self.sides[key] = len(value)
        if stat in (Stat.GRAM, Stat.MEAN_ABS):
            self.sizes[key] = mean.diagonal().clone() if stat == Stat.GRAM else mean
        self.shelf.put(key, pack_symmetric(mean.float()) if stat in SYMMETRIC_STATS else mean)
        self.rounds[key] = again
        self.recent = {}

    def _get(self, key: Owned) -> Tensor:
        """In float64 on the device."""
        packed = self.shelf.fetch(key)
        return (unpack_symmetric(packed, self.sides[key]) if key[1] in SYMMETRIC_STATS else packed).double()

    def expect(self, owners: Iterable[str], stats: Iterable[Stat], *, again: int) -> None:
        """Round `again` is about to add to these: what is there of them begins to come to the device."""
        for key in ((owner, stat) for owner in owners for stat in stats):
            if self.rounds.get(key, again) < again:
                self.shelf.ahead(key)

    def describe(self, name: str, tokens: int, owners: Mapping[Stat, str], *, again: int) -> None:
        """Which measurements make up the statistics of a layer, and over how many tokens in round `again`."""
        self.tokens.setdefault(name, {})[again] = tokens
        self.owners[name] = dict(owners)

    def forget(self, names: Collection[str]) -> None:
        """Remove what was measured of these layers; they stay in the list of layers, but are not `in` it any more."""
        self.recent = {}
        for key in [key for key in self.shelf.kept if isinstance(key, tuple) and key[0] in names]:
            self.shelf.drop(key)

    def __contains__(self, name: object) -> bool:
        """Whether its statistics are there."""
        owners = self.owners.get(str(name))
        return owners is not None and all((owner, stat) in self.shelf.kept for stat, owner in owners.items())

    def input_sizes(self) -> dict[str, Stats]:
        """Of every layer only what says which inputs never fire, from where it lies."""
        found = {}
        for name, owners in self.owners.items():
            stat = next((s for s in (Stat.GRAM, Stat.MEAN_ABS) if s in owners), None)
            sizes = None if stat is None else self.sizes[owners[stat], stat]
            found[name] = Stats(tokens=sum(self.tokens[name].values()), mean_abs=sizes)
        return found

    def __getitem__(self, name: str) -> Stats:
        wanted: dict[Owned, Tensor] = {}
        for stat, owner in self.owners[name].items():
            key = (owner, stat)
            held = self.recent.get(key)  # q, k and v come one after the other
            wanted[key] = self._get(key) if held is None else held
        self.recent = wanted
        for key in self._keys_after(name):
            if key not in wanted:
                self.shelf.ahead(key)
        found = {stat.value: value for (_, stat), value in wanted.items()}
        return Stats(tokens=sum(self.tokens[name].values()), **found)

    def _keys_after(self, name: str) -> list[Owned]:
        """What the next layer needs: layers are asked for in running order."""
        names = [*self.owners]
        following = names.index(name) + 1
        return [] if following == len(names) else [(owner, s) for s, owner in self.owners[names[following]].items()]

    def __iter__(self) -> Iterator[str]:
        return iter(self.owners)

    def __len__(self) -> int:
        return len(self.owners)


class SpectraShelf(MutableMapping[str, Spectrum]):
    """Spectra of every layer; energies in float64, always at hand.

    `keep` says how many components of a layer are needed from now on; energies are kept of all.
    """

    def __init__(
        self,
        device: torch.device,
        keep: Callable[[str], int | None] = lambda _: None,
        *,
        on_host: bool = False,
        shelf: Shelf | None = None,
    ) -> None:
        self.shelf = Shelf(device, on_host=on_host) if shelf is None else shelf
        self.energies: dict[str, Tensor] = {}
        self.keep = keep

    def __setitem__(self, name: str, spectrum: Spectrum) -> None:
        count = self.keep(name)
        self.shelf.put((name, "left"), spectrum.left[:, :count])
        self.shelf.put((name, "right"), spectrum.right[:count])
        self.energies[name] = spectrum.energy

    def __getitem__(self, name: str) -> Spectrum:
        left, right = (self.shelf.get((name, part)) for part in ("left", "right"))
        return Spectrum(left, right, self.energies[name])

    def as_kept(self, name: str) -> Spectrum:
        """In float32, without a copy where it lies on the device; energies of the components that are there."""
        left, right = (self.shelf.fetch((name, part)) for part in ("left", "right"))
        return Spectrum(left, right, self.energies[name][: left.shape[1]])

    def count(self, name: str) -> int:
        """How many components of a layer are there."""
        return self.shelf.shape_of((name, "left"))[1]

    def __delitem__(self, name: str) -> None:
        del self.energies[name]
        for part in ("left", "right"):
            self.shelf.drop((name, part))

    def __iter__(self) -> Iterator[str]:
        return iter(self.energies)

    def __len__(self) -> int:
        return len(self.energies)


def energies_in(spectra: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """The energies (K,) of every layer, without moving its components."""
    return spectra.energies if isinstance(spectra, SpectraShelf) else {n: s.energy for n, s in spectra.items()}


def outlines_of(spectra: Mapping[str, Spectrum]) -> dict[str, Tensor]:
    """The energies (K,) of the components that are there, of every layer, without moving components."""
    if not isinstance(spectra, SpectraShelf):
        return {name: spectrum.energy for name, spectrum in spectra.items()}
    return {name: energy[: spectra.count(name)] for name, energy in spectra.energies.items()}


def components_of(spectra: Mapping[str, Spectrum], name: str) -> Spectrum:
    """One spectrum for learning, in whatever precision it is kept."""
    return spectra.as_kept(name) if isinstance(spectra, SpectraShelf) else spectra[name]


def scale(spectra: MutableMapping[str, Spectrum], name: str, scores: Tensor) -> None:
    """Scores (float64, of the components that are there) folded into the left factor and the energies, in place."""
    if isinstance(spectra, SpectraShelf):
        left = spectra.shelf.settled((name, "left"))
        left *= scores.to(left)
        spectra.shelf.kept[name, "left"] = left  # where it lies in a file, it was read from there
        energy = spectra.energies[name].clone()
        energy[: len(scores)] *= scores.square()
        spectra.energies[name] = energy
    else:
        own = spectra[name]
        spectra[name] = Spectrum(own.left * scores, own.right, own.energy * scores.square())


def bytes_of(spectra: Mapping[str, Spectrum]) -> int:
    """What all components take as they are kept."""
    if isinstance(spectra, SpectraShelf):
        return sum(tensor.nbytes for tensor in spectra.shelf.kept.values())
    return sum(part.nbytes for spectrum in spectra.values() for part in spectrum)
