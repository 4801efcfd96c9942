"""Trellis-coded quantisation: a stream of bits of which every window of L bits is one or two weights.

    state_t = (state_{t-1} 2^k + code_t) mod 2^L        code_t: the k bits of step t; the stream starts in state 0
    values of step t = table[state_t]                   (V,), V = 1 or 2 weights: k / V bits a weight

All 2^L values are to be had at any step, but a step can only choose among the 2^k that follow from the bits before it,
so the encoder looks for the path of least error (Viterbi). That is vector quantisation in as many dimensions as the
stream is long, and the decoder needs nothing but a window and a table. For normal weights the squared error is

    bits            1       1.5     2       3       4       5       6
    trellis, L=12   .27     .146    .073    .0206   .0056   .0017   .00057
    best scalar     .363            .1175   .0345   .0095   .0025   .00065    (Lloyd, Max 1960)
    any code        .25     .125    .0625   .0156   .0039   .0010   .00024    (rate-distortion bound 4^-bits)

The table is not stored: quantiles of the normal distribution in an order that a fixed integer hash gives, so that
windows that share bits have unrelated values.

Source: QTIP (Tseng, Sun, Hou, De Sa 2024, arXiv 2406.11235), bitshift trellis; trellis coding is Marcellin and Fischer
1990. Here streams do not bite their tails: they go on from one piece to the next (linalg/trellis_columns.py).
"""

from functools import cache, lru_cache
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

WINDOW = 12
"""L: a table of 4,096 values. 16 bits would gain 5 % of the squared error for 16 times the work."""
WINDOWS = (8, 10, 12, 14, 16)
"""Those that are offered. At 2 bits 8 give a squared error of .092, 10 of .080."""

_MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)


class Rate(NamedTuple):
    """A code: `step_bits` for each `width` weights, which a window of `window` bits decides."""

    step_bits: int
    width: int
    window: int = WINDOW

    @property
    def bits(self) -> float:
        """A weight."""
        return self.step_bits / self.width


RATES = (
    Rate(1, 1), Rate(3, 2), Rate(2, 1), Rate(5, 2), Rate(3, 1), Rate(7, 2), Rate(4, 1), Rate(5, 1), Rate(6, 1),
)  # fmt: skip
"""1 to 4 bits in halves, 5, 6. At 7 a table of 4,096 values is too coarse: 8-bit codes of one grid a row gain more."""


def rate_of(bits: float, window: int = WINDOW) -> Rate:
    """The rate of so many bits a weight; KeyError when it is none of `RATES`."""
    return {rate.bits: rate for rate in RATES}[bits]._replace(window=window)


@cache
def code_table(rate: Rate, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """What the states stand for (2^L, V), of mean square 1, worked out once. Do not change it in place."""
    if (device, dtype) != ("cpu", torch.float32):
        return code_table(rate).to(device, dtype)
    states = torch.arange(1 << rate.window, dtype=torch.int64, device="cpu")
    columns = []
    for column in range(rate.width):
        uniform = (_hashed(states, rate.window, column).double() + 0.5) / (1 << rate.window)
        normal = sqrt(2) * torch.erfinv(2 * uniform - 1)
        columns.append(normal / normal.square().mean().sqrt())
    return torch.stack(columns, dim=1).float()


def _hashed(states: Tensor, window: int, salt: int) -> Tensor:
    """A permutation of the states: odd multipliers and shifts, each of which can be undone."""
    mask = (1 << window) - 1
    mixed = (states + 0x5BD1 * (7 * salt + 1)) & mask
    for multiplier in _MULTIPLIERS:
        mixed = (mixed * (multiplier & mask | 1)) & mask
        mixed = mixed ^ (mixed >> (window // 2))
    return mixed


def states_of(codes: Tensor, rate: Rate) -> Tensor:
    """States (N, T) int32 of whole streams of codes (N, T) uint8."""
    states = codes.int()
    for back in range(1, -(-rate.window // rate.step_bits)):
        earlier = torch.nn.functional.pad(codes, (back, 0))[:, : codes.shape[1]].int()
        states = states | (earlier << (back * rate.step_bits))
    return states & ((1 << rate.window) - 1)


def decode(codes: Tensor, rate: Rate, table: Tensor) -> Tensor:
    """Weights (N, T V) of whole streams of codes (N, T), in the dtype of `table` (2^L, V)."""
    return table[states_of(codes, rate).long()].flatten(1)


class Path(NamedTuple):
    """The least path found."""

    states: Tensor  # (N, T) int64
    cost: Tensor  # (N,) weighted squared error


def viterbi(targets: Tensor, weights: Tensor, start: Tensor, rate: Rate) -> Path:
    """The path of least `sum weights (targets - values)^2` from the states `start` (N,), for each stream by itself.

    `targets` (N, T, V) and `weights` (N, T, V), non-negative, float32. Costs carry the branch that was taken in their
    lowest bits while they are compared, so they are exact to 2^(k-24) of themselves. On a GPU, where few streams are
    thousands of small kernels, these are recorded once for each shape and replayed: the same kernels, the same result.
    """
    streams, length, _ = targets.shape
    if targets.is_cuda and streams << rate.window <= MOST_RECORDED:
        return _recorded(streams, length, rate, targets.device)(targets, weights, start)
    return _search(targets, weights, start, rate)


MOST_RECORDED = 1 << 19
"""States of all streams together up to which kernels are so small that launching them is what takes the time."""
STEPS_AT_ONCE = 16
"""Whose errors are worked out together on a GPU; one by one on a CPU, where they then stay in its cache."""


def _search(targets: Tensor, weights: Tensor, start: Tensor, rate: Rate) -> Path:
    streams, length, width = targets.shape
    step_bits, table = rate.step_bits, code_table(rate, targets.device)
    branches, states = 1 << step_bits, len(table)
    parents = states // branches
    low = branches - 1
    branch = torch.arange(branches, dtype=torch.int32, device=targets.device)[None, :, None]
    cost = torch.full((streams, states), 1e30, dtype=torch.float32, device=targets.device)
    cost.scatter_(1, start[:, None], 0.0)
    back = torch.empty(length, streams, parents, dtype=torch.uint8, device=targets.device)
    values = table.T[None, None]  # (1, 1, V, 2^L)
    at_once = STEPS_AT_ONCE if targets.is_cuda else 1
    for first in range(0, length, at_once):
        part = slice(first, first + at_once)
        errors = (targets[:, part, :, None] - values).square_().mul_(weights[:, part, :, None])
        steps = errors[:, :, 0] if width == 1 else errors.sum(2)
        for t in range(steps.shape[1]):
            marked = (cost.view(torch.int32) & ~low).view(streams, branches, parents) | branch
            best = marked.amin(1)
            back[first + t] = best & low
            step = steps[:, t].view(streams, parents, branches)
            cost = ((best & ~low).view(torch.float32)[:, :, None] + step).flatten(1)
    least, state = cost.min(1)
    found = torch.empty(streams, length, dtype=torch.int64, device=targets.device)
    rows = torch.arange(streams, device=targets.device)
    for t in range(length - 1, -1, -1):
        found[:, t] = state
        parent = state >> step_bits
        state = parent + back[t, rows, parent].long() * parents
    return Path(found, least)


class _Recorded:
    """`_search` for one shape as a CUDA graph."""

    def __init__(self, streams: int, length: int, rate: Rate, device: torch.device) -> None:
        shape = (streams, length, rate.width)
        start = torch.zeros(streams, dtype=torch.int64, device=device)
        self.given = (torch.zeros(shape, device=device), torch.ones(shape, device=device), start)
        side = torch.cuda.Stream(device)  # kernels are loaded, and the table is made, before anything is recorded
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            _search(*self.given, rate)
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # Graphs are replayed one at a time and what they give is copied: they may work in the same memory.
        with torch.cuda.device(device), torch.cuda.graph(self.graph, pool=_pool(device)):
            self.path = _search(*self.given, rate)

    def __call__(self, *given: Tensor) -> Path:
        for own, new in zip(self.given, given, strict=True):
            own.copy_(new)
        self.graph.replay()
        return Path(*(part.clone() for part in self.path))


@cache
def _pool(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return torch.cuda.graph_pool_handle()


@lru_cache(maxsize=64)
def _recorded(streams: int, length: int, rate: Rate, device: torch.device) -> _Recorded:
    return _Recorded(streams, length, rate, device)


@cache
def distortion(rate: Rate) -> float:
    """Mean squared error of standard normal weights at this rate, measured once on a fixed sample."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 256 // rate.width, rate.width)
    sample = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    start = torch.zeros(16, dtype=torch.int64, device="cpu")
    path = viterbi(sample, torch.ones_like(sample), start, rate)
    return float(path.cost.mean()) / 256
