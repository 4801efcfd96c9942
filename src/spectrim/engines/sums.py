"""The running sums of calibration, in float64, and how a checkpoint keeps them between two batches."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.engines.checkpoint import Checkpoint, Saved
from spectrim.engines.parts import Run, load_own
from spectrim.linalg.curvature import mirror
from spectrim.stats import SYMMETRIC_STATS, Stat


def sum_dtype(device: torch.device) -> torch.dtype:
    """Apple's GPUs have no float64; everything else sums in double."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class Sums:
    """Running sums of one shared input, or of one layer's outputs.

    Below the diagonal symmetric ones are only right after `to_means`.
    """

    tokens: int = 0
    gradient_tokens: int = 0
    sequences: int = 0
    totals: dict[Stat, Tensor] = field(default_factory=dict)

    def total(self, stat: Stat, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The float64 sum, created at first use."""
        if stat not in self.totals:
            self.totals[stat] = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        return self.totals[stat]

    def to_means(self) -> None:
        """Divide the sums in place: layers that share an input then share the tensor, not three copies of it."""
        counts = {
            Stat.OUTPUT_GRAD: self.gradient_tokens,
            Stat.SLOPE: self.gradient_tokens,
            Stat.FISHER: self.sequences,
        }
        for stat, total in self.totals.items():
            if stat in SYMMETRIC_STATS:
                mirror(total)
            total /= counts.get(stat, self.tokens)


@dataclass
class KeptSums:
    """The sums in a checkpoint, between two batches."""

    checkpoint: Checkpoint | None
    stage: str
    run: Run
    sums: dict[str, Sums]
    generator: torch.Generator

    def load(self, device: torch.device) -> int:
        """Take up what was summed before; how many windows that were."""
        saved = load_own(self.checkpoint, self.stage, self.run)
        if saved is None:
            return 0
        for name, own in self.sums.items():
            own.tokens, own.gradient_tokens, own.sequences = saved.facts["counts"][name]
            kept = {stat: saved.tensors.get(f"{name}.{stat.value}") for stat in Stat}
            own.totals = {stat: total.to(device) for stat, total in kept.items() if total is not None}
        self.generator.set_state(saved.tensors["generator"])
        return saved.step

    def save(self, windows: int, *, last: bool) -> None:
        """The sums over so many windows, if it is time, or if they are complete and worth it."""
        if self.checkpoint is None:
            return
        size = sum(total.nbytes for own in self.sums.values() for total in own.totals.values())
        if self.checkpoint.due() or (last and self.checkpoint.worth(size)):
            self.checkpoint.save(self.stage, self.saved(windows))

    def saved(self, windows: int) -> Saved:
        """The sums over so many windows, as a state."""
        totals = {f"{name}.{stat.value}": t for name, own in self.sums.items() for stat, t in own.totals.items()}
        counts = {name: [own.tokens, own.gradient_tokens, own.sequences] for name, own in self.sums.items()}
        tensors = {**totals, "generator": self.generator.get_state()}
        return Saved(windows, tensors, {"run": self.run, "counts": counts})
