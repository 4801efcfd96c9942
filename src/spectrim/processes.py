"""The processes that work on one run together, one a GPU: who they are, and what they hand to each other.

    torchrun --nproc-per-node 2 -m spectrim compress ...

`present()` is the group of the running job; without a launcher it is a group of one, in which every exchange gives back
what it was given. Sums are formed in the order of the ranks, each partial sum whole, so that they depend on how many
processes there are and not on which of them is faster. Every rank gets the same bits of what is shared.

All ranks must come to the same exchanges in the same order. Hence the rules for whoever uses this: no exchange inside
work that one rank may have to do again with a smaller batch (memory.Batch refuses that), and none that depends on the
clock. How the ranks find each other: meeting.py. When one fails, the others leave too, with its name: peers.py.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]  documented there

from spectrim.errors import ResourceError, SpectrimError, UsageError
from spectrim.meeting import Launcher, sign_in
from spectrim.peers import Member, PeerFailed, Watch, is_signal, own_failure

T = TypeVar("T")

Share = Callable[[int], slice]
"""Which of so many things in a row are one's own."""

EXCHANGE_WITHIN = timedelta(days=7)
"""Ranks wait for each other's work (a decomposition, writing the result); that one is dead is for peers.py to tell."""
HEAR_WITHIN_S = 3.0
"""After an exchange that failed: until it is known who failed."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher (torchrun, accelerate) sets in the environment."""


def share_of(rank: int, world: int) -> Share:
    """The share of one of `world` (`rank` counts from 0): of as many things as any other's, or one more."""
    return lambda count: slice(rank * count // world, (rank + 1) * count // world)


@dataclass
class Group:
    """All processes of one run as one of them sees them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    members: tuple[Member, ...] = ()
    watch: Watch | None = None
    exchanges: int = 0
    """How many there were: work in which this number grew cannot be done again by one rank alone."""

    @property
    def alone(self) -> bool:
        """One process: nothing is exchanged."""
        return self.world == 1

    @property
    def is_first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def share_of(self, count: int) -> slice:
        """Which of `count` things in a row are this rank's."""
        return share_of(self.rank, self.world)(count)

    def objects(self, value: T) -> list[T]:
        """Everybody's value, by rank. Small things: they are pickled by torch, between processes of this run."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with self.exchange():
            dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on every rank; nobody else makes it."""
        if self.alone:
            return make()
        holder = [make()] if self.is_first else [None]
        with self.exchange():
            dist.broadcast_object_list(holder, src=0)
        return holder[0]  # type: ignore[return-value]

    def first_only(self, make: Callable[[], T]) -> T:
        """What only the first rank needs: None on all others, which must not look at it."""
        return make() if self.is_first else None  # type: ignore[return-value]

    def sum_at(self, owner: int, tensor: Tensor) -> Tensor:
        """The sum over ranks at `owner`, in the order of the ranks; elsewhere the rank's own `tensor`, unchanged."""
        if self.alone:
            return tensor
        tensor = tensor.contiguous()
        with self.exchange():
            if self.rank != owner:
                dist.send(tensor, dst=owner)
                return tensor
            total: Tensor | None = None
            part = torch.empty_like(tensor)
            for rank in range(self.world):
                if rank != owner:
                    dist.recv(part, src=rank)
                found = tensor if rank == owner else part
                total = found.clone() if total is None else total.add_(found)
            assert total is not None
            return total

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """The same sum, the same bits, on every rank; `tensor` may be overwritten."""
        if self.alone:
            return tensor
        total = self.sum_at(0, tensor)
        with self.exchange():
            dist.broadcast(total, src=0)
        return total

    def share(self, tensors: Mapping[str, Tensor] | None, holder: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors by name that rank `holder` has, as new ones on everybody's `device`; its own ones stay at it."""
        if self.alone or self.rank == holder:
            assert tensors is not None
            given = {name: tensor.contiguous() for name, tensor in tensors.items()}
        else:
            given = {}
        if self.alone:
            return given
        outline: list[Any] = [[(name, tuple(t.shape), t.dtype) for name, t in given.items()]]
        with self.exchange():
            dist.broadcast_object_list(outline, src=holder)
            for name, shape, dtype in outline[0]:
                if self.rank != holder:
                    given[name] = torch.empty(shape, dtype=dtype, device=device)
                if given[name].numel():
                    dist.broadcast(given[name].detach(), src=holder)
        return given

    def wait(self) -> None:
        """Until all have come here."""
        self.objects(None)

    def refuse_unequal(self, what: str, value: str, advice: str) -> None:
        """UsageError on every rank where a `value` is not that of the first, with the name of the rank that has it."""
        values = self.objects(value)
        for member, other in zip(self.members, values, strict=False):
            if other != values[0]:
                raise UsageError(
                    f"{member} has another {what} than {self.members[0]}: {other} there, {values[0]} here. All "
                    f"processes of a run must have the same; {advice}"
                )

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around every call that waits for other ranks: what fails in it is the failure of whoever failed."""
        self.exchanges += 1
        try:
            if self.watch is not None:
                self.watch.exchange = self.exchanges
                if (failure := self.watch.failure()) is not None:
                    raise PeerFailed(failure)
            yield
        except RuntimeError as error:  # torch's own errors of the network are RuntimeErrors
            raise self._cause(error) from error
        finally:
            if self.watch is not None:
                self.watch.exchange = None

    def _cause(self, error: RuntimeError) -> SpectrimError:
        """Whoever failed, by name; a network that fails by itself says what it says."""
        failure = None if self.watch is None else self.watch.failure(HEAR_WITHIN_S)
        if failure is not None:
            return PeerFailed(failure)
        return ResourceError(
            f"rank {self.rank} could not exchange with the other {self.world - 1}: {' '.join(str(error).split())[:300]}"
        )


_ALONE = Group()
_present: ContextVar[Group | None] = ContextVar("processes", default=None)


def present() -> Group:
    """The group of the running job; one process where none was joined."""
    return _present.get() or _ALONE


def launched() -> int:
    """How many processes the launcher says that there are; 1 without one. UsageError where it says half of it."""
    if not os.environ.get("WORLD_SIZE"):
        return 1
    world = _number("WORLD_SIZE")
    if world > 1:
        missing = [name for name in VARIABLES if not os.environ.get(name)]
        if missing:
            raise UsageError(
                f"WORLD_SIZE is {world} but {', '.join(missing)} is not set; start with torchrun, which sets all of "
                "them, or unset WORLD_SIZE for a single process"
            )
    return world


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}, which is no count; start with torchrun, or unset WORLD_SIZE")
    return int(text)


def environment_of_one() -> dict[str, str]:
    """This process's environment without what a launcher put there, for a program that it starts."""
    names = {*VARIABLES, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    return {k: v for k, v in os.environ.items() if k not in names and not k.startswith("TORCHELASTIC_")}


@contextmanager
def as_one() -> Iterator[None]:
    """Inside, the environment says nothing of a launcher: for a library that would wait for the other processes."""
    launcher = {name: value for name, value in os.environ.items() if name not in environment_of_one()}
    for name in launcher:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(launcher)


def own_device(device: torch.device) -> torch.device:
    """The GPU of this rank where a GPU is meant; ResourceError where there are more processes than GPUs here."""
    group = present()
    if group.alone or device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if device.index is not None:
        raise UsageError(
            f"--device {device} is one GPU, and this run has {group.world} processes, each with its own; use --device "
            "cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    if group.local_rank >= count:
        raise ResourceError(
            f"rank {group.rank} is process {group.local_rank} of this host (counted from 0), which has {count} GPUs; "
            f"start at most so many: torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", group.local_rank)


@contextmanager
def joined(device: str = "auto") -> Iterator[Group]:
    """The group that the launcher started, from here to the end of the block; a group of one without a launcher.

    `device` as on the command line: a run on the CPU needs no GPU to talk. Inside another `joined`, that one's group.
    When the block ends with an error, all other ranks hear of it; when it ends well, all have come to its end.
    """
    world = launched()
    if world == 1 or not present().alone:
        yield present()
        return
    seat = sign_in(launcher(world))
    group = Group(
        rank=seat.own.rank, world=world, local_rank=_number("LOCAL_RANK"), members=seat.members,
        watch=Watch(seat.board, seat.own, seat.members, keeps_store=seat.keeps_store),
    )  # fmt: skip
    with _telling(group):
        _connect(group, device, seat.store)
        token = _present.set(group)
        try:
            yield group
            group.wait()
            assert group.watch is not None
            group.watch.stop()
            group.wait()  # nobody leaves before all have stopped to watch
        finally:
            _present.reset(token)
    dist.destroy_process_group()


def launcher(world: int) -> Launcher:
    """What the environment says of this process and of where all meet."""
    return Launcher(
        rank=_number("RANK"), world=world, address=os.environ["MASTER_ADDR"], port=_number("MASTER_PORT"),
        # Restarted by its launcher, a run must not read what ranks of an earlier attempt wrote.
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        has_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True),
    )  # fmt: skip


def _connect(group: Group, device: str, store: Store) -> None:
    """Gloo and, where a GPU is meant, NCCL: both wait inside a library, so that somebody must watch already."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu and group.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(group.local_rank)
    with group.exchange():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=store, rank=group.rank, world_size=group.world,
            timeout=EXCHANGE_WITHIN,
        )  # fmt: skip


@contextmanager
def _telling(group: Group) -> Iterator[None]:
    """An error inside is told to all others, and becomes that of whoever failed first."""
    assert group.watch is not None
    try:
        yield
    except BaseException as error:
        left = _leave(group, group.watch, error)
        group.watch.stop()  # a thread that asks the store while the program ends would abort it
        group.watch.linger()
        if left is error:
            raise
        raise left from error


def _leave(group: Group, watch: Watch, error: BaseException) -> BaseException:
    """What this rank ends with: its own error, of which the others are told, or the one of whoever failed first."""
    if isinstance(error, PeerFailed):
        return error
    if is_signal(error):
        # A launcher stops all that are left when one has failed: then that is the reason, and not the signal.
        failure = watch.failure(1.0)
        if failure is not None and not failure.by_signal:
            return PeerFailed(failure)
    first = watch.tell(own_failure(group.members[group.rank], error))
    return error if is_signal(error) or first.rank == group.rank else PeerFailed(first)


def spread_by_cost(costs: Sequence[float], world: int) -> list[int]:
    """The rank of each piece of work: the dearest first, each to whoever has least so far. The same on every rank."""
    load, ranks = [0.0] * world, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        ranks[piece] = load.index(min(load))
        load[ranks[piece]] += costs[piece]
    return ranks
