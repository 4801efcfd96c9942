"""A GPU of a few megabytes, on a CPU: bytes of live tensors are counted, and asking for more than there are fails.

    python tests/simulated_card.py --depth 32        # every stage of a 7B run with --low-memory, all sizes over 32

Width, MLP, vocabulary and tokens of a batch are those of the large run over `SCALE`, so that weights, states,
statistics, logits and activations are all SCALE^2 times smaller and keep their ratios. Not counted: what a kernel takes
inside (solvers' work space, attention), and holes between blocks of the allocator.
"""

import argparse
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from spectrim import memory
from spectrim.engines import (
    low_memory,
    low_memory_way,
    measure,
    measure_blocks,
    newton,
    newton_blocks,
    propagate,
    shelf,
    stream,
)
from spectrim.engines.low_memory import LowMemoryRun
from spectrim.engines.outcome import Outcome
from spectrim.engines.relay import Relay
from spectrim.evaluate import language, streamed
from spectrim.evaluate.streamed import evaluate_streamed
from spectrim.integrations.streamed_folder import hollow_result, write_streamed
from spectrim.linalg import curvature, divergence
from spectrim.models.load import resolve
from spectrim.models.streamed import check_finite, open_streamed
from spectrim.registry import make_method
from spectrim.store.pieces import MOVED
from spectrim.store.scratch import Scratch

CPU = torch.device("cpu")
SCALE = 32
LIMIT = low_memory_way.GPU_LIMIT // SCALE**2
WIDTH, INNER, VOCABULARY, WINDOWS, GRADIENT_WINDOWS, LENGTH, BATCH = 4096, 11008, 32000, 256, 64, 2048, 4
COMPUTING = (measure, measure_blocks, propagate, newton, newton_blocks, language, streamed)


class Card(TorchDispatchMode):
    """While this is open, tensors that operations make count as lying on a card of `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.live, self.peak = limit, 0, 0
        self.failures = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self._see(leaf.untyped_storage())
        if self.live > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError(f"{self.live:,} bytes on a card of {self.limit:,} ({func})")
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.live -= nbytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


class Stage(NamedTuple):
    """What one stage took at most, and for how long."""

    name: str
    peak: int
    seconds: float
    read: int
    written: int


def scaled(value: int) -> int:
    return value // SCALE


def write_model(folder: Path, depth: int) -> Path:
    """A Llama in bf16 whose sizes are those of 7B over SCALE."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=scaled(WIDTH), intermediate_size=scaled(INNER), num_hidden_layers=depth, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=scaled(VOCABULARY), dtype=torch.bfloat16,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def run_on(
    card: Card, source: Path, work: Path, say: Callable[[Stage], None] = lambda _: None
) -> tuple[list[Stage], LowMemoryRun]:
    """Closed form, writing and judging of `soco --preset fast` at keep 0.8; what each stage took of the card.

    Whatever is known of a stage so far is said when it tells how far it is.
    """
    generator = torch.Generator().manual_seed(0)
    shape, vocabulary = (WINDOWS, LENGTH // SCALE), scaled(VOCABULARY)
    ids = torch.randint(vocabulary, shape, generator=generator)
    method = make_method("soco", preset="fast", options={"coupling": "none"})
    stages: list[Stage] = []
    seen: list[Any] = ["load", time.perf_counter(), MOVED.read, MOVED.written]

    def told(stage: str, done: int = 1, total: int = 1) -> None:
        """What happened until now belongs to the stage that tells of it, or to the one before if it only begins."""
        if stage != seen[0]:
            if done == 0:
                _close(stages, card, seen)
            seen[0] = stage
        _close(stages, card, seen)
        if done == total:
            say(stages[-1])

    (work / "scratch").mkdir()
    (work / "small").mkdir()
    with card_in_place_of_a_gpu(card), card:
        check_finite(resolve(str(source)), CPU)
        dense = open_streamed(resolve(str(source)), CPU, torch.bfloat16)
        run = LowMemoryRun(
            dense.model, method, dense.walk, 0.8, 0, told, {}, GRADIENT_WINDOWS, length=shape[1], streamed=dense,
            scratch=Scratch(work / "scratch", CPU),
        )  # fmt: skip
        run.batch.size = BATCH
        told("load")
        spectra, plan = run.closed_form(ids)
        outcome = Outcome(
            model=hollow_result(run, dense.source, plan, torch.bfloat16), method=method, walk=run.walk, plan=plan,
            placed={},
        )  # fmt: skip
        write_streamed(work / "small", run, spectra, outcome, torch.bfloat16, dense.source, {})
        told("write")
        small = open_streamed(resolve(str(work / "small")), CPU, torch.bfloat16)
        relay = Relay(small.model, small.walk, run.relay.gives_tuple)
        evaluate_streamed(run.relay, relay, ids[:40], hold=run.hold, after=run.streamed.home.let_go)
        told("evaluate")
    return stages, run


def _close(stages: list[Stage], card: Card, seen: list[Any]) -> None:
    now = time.perf_counter()
    name, since, read, written = seen
    this = Stage(name, card.peak, now - since, MOVED.read - read, MOVED.written - written)
    if stages and stages[-1].name == name:
        last = stages.pop()
        moved = last.read + this.read, last.written + this.written
        this = Stage(name, max(last.peak, this.peak), last.seconds + this.seconds, *moved)
    stages.append(this)
    seen[1:], card.peak = [now, MOVED.read, MOVED.written], card.live


def card_in_place_of_a_gpu(card: Card) -> ExitStack:
    """Whatever asks for a GPU's memory is told of the card's; products and autocast go a GPU's way."""
    replaced: list[tuple[Any, str, Any]] = [
        *((module, "total_memory", lambda _: card.limit) for module in (memory, low_memory, low_memory_way)),
        *((module, "limit_of", lambda _: card.limit) for module in (low_memory, low_memory_way)),
        *((module, "memory_in_use", lambda _: card.live) for module in (memory, low_memory)),
        *((module, "autocast", _autocast) for module in COMPUTING),
        *((module, "add_gram", _add_gram) for module in (measure, stream)),
        *((curvature, name, getattr(curvature, name) // SCALE) for name in ("STRIP", "TENSOR_SIDE", "TENSOR_CHUNK")),
        (curvature, "_product_in_float32", _product_in_float32),
        (curvature, "ALIGNED", 2),
        (streamed, "WINDOWS", language.WINDOWS * 512 // LENGTH),
        (divergence, "CHUNK_NUMBERS", divergence.CHUNK_NUMBERS // SCALE**2),
        (shelf, "STRIP", shelf.STRIP // SCALE),
    ]
    stack = ExitStack()
    for module, name, value in replaced:
        stack.enter_context(mock.patch.object(module, name, value))
    return stack


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _add_gram(total: Tensor, rows: Tensor, other: Tensor | None = None, *, upper: bool = False) -> None:
    """On tensor cores."""
    with curvature.full_precision(total.device):
        second = rows if other is None else other.to(rows.dtype)
        curvature._add_gram_of_bf16(total, rows, second, symmetric=other is None, upper=upper)


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Of which only the result counts."""
    made = torch.empty(a.shape[0], b.shape[1])
    with _disable_current_modes():
        return made.copy_(a.float() @ b.float())


def _show(stage: Stage) -> None:
    sizes = [size * SCALE**2 / 1e9 for size in (stage.peak, stage.read, stage.written)]
    print(f"{stage.name:12}{sizes[0]:8.1f}{sizes[1]:8.1f}{sizes[2]:9.1f}{stage.seconds:14.1f}", flush=True)


def main() -> None:
    """A table of the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        card = Card(LIMIT)
        source = write_model(Path(work) / "model", given.depth)
        print(f"{'GB of 7B':12}{'peak':>8}{'read':>8}{'written':>9}{'seconds here':>14}")
        _, run = run_on(card, source, Path(work), _show)
        print(f"scratch files: {run.scratch.most_bytes * SCALE**2 / 1e9:.1f} GB; out of memory {card.failures} times")


if __name__ == "__main__":
    sys.exit(main())
