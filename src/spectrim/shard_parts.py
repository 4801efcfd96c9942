"""What the tasks of a job array have measured, for the run that adds it up.

    OUT.shard-2-of-8.resume    fingerprint.json, command.json, lock, as of any run           store/work.py
        statistics-0           the sums so far, until the share is measured
        share                  the sums over the whole share; renamed into place, so that it is complete or absent

They are read where a run of its own would look for its first statistics, and removed when the result is there.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.engines.checkpoint import Saved
from spectrim.engines.measure import Progress
from spectrim.engines.run import FIRST_STATISTICS
from spectrim.errors import InputError, SpectrimError, UsageError
from spectrim.given import Taken
from spectrim.linalg.fallback import Fallback
from spectrim.resume import without_fallbacks
from spectrim.shard import SHARE, Shard, shard_target
from spectrim.store.state import read_state
from spectrim.store.target import absolute
from spectrim.store.work import WorkFolder, locked, refuse_foreign, work_path

_log = logging.getLogger(__name__)


class ShardParts:
    """The sums of all tasks of one array, added up in their order: see `given.Given`."""

    def __init__(self, out: Path, of: int, *, take_lock: bool = False, progress: Progress | None = None) -> None:
        self.out, self.of, self.take_lock, self.progress = absolute(out), of, take_lock, progress

    @property
    def shards(self) -> list[Shard]:
        """All tasks, in order."""
        return [Shard(number, self.of) for number in range(1, self.of + 1)]

    def check(self, fields: Mapping[str, Any]) -> None:
        """See `Given`; all that is wrong is told at once."""
        wrong = [f"shard {shard}: {what}" for shard in self.shards if (what := self._wrong(shard, fields)) is not None]
        if wrong:
            listed = "\n  ".join(wrong)
            raise UsageError(
                f"{self.out}: {len(wrong)} of {self.of} shards cannot be added up:\n  {listed}\nrun the same command "
                "with --shard I/N for each of them (where it differs, with --restart; or give this one the one that "
                f"they had), then this one again{self._others()}"
            )

    def load(self, stage: str, fields: Mapping[str, Any]) -> Taken | None:
        """See `Given`: the first statistics."""
        if stage != FIRST_STATISTICS:
            return None
        self.check(fields)
        total: Saved | None = None
        resumed, fallbacks = [], list[Fallback]()
        for shard in self.shards:
            part, told = self._read(shard, fields)
            fallbacks += told
            resumed.append({"stage": f"shard {shard}", "step": part.step})
            total = part if total is None else added(total, part, where=str(self._folder(shard)))
            if self.progress is not None:
                self.progress("add up shards", len(resumed), self.of)
        assert total is not None
        return Taken(total, resumed, fallbacks)

    def remove(self) -> None:
        """See `Given`; what cannot be removed is told."""
        for shard in self.shards:
            gone = False
            with (
                suppress(SpectrimError),  # the result is there: what is left over is no error
                locked(shard_target(self.out, shard), take_lock=self.take_lock) as folder,
            ):
                gone = folder.remove()
            if not gone:
                _log.warning("%s: is left over and could not be removed", self._folder(shard))

    def _folder(self, shard: Shard) -> Path:
        return work_path(shard_target(self.out, shard))

    def _wrong(self, shard: Shard, fields: Mapping[str, Any]) -> str | None:
        """Why a shard cannot be used, None if it can, as far as is known before its sums are read."""
        path = self._folder(shard)
        if not path.is_dir() or path.is_symlink():
            return f"{path} is not there"
        refuse_foreign(path)
        folder = WorkFolder(path)
        if not os.path.lexists(folder.state_path(SHARE)):
            return f"{path} holds no complete sums: it was stopped, or is still at work"
        differing = folder.differing({**fields, "shard": str(shard)})
        return f"{path} is of another run; {'; '.join(differing)}" if differing else None

    def _read(self, shard: Shard, fields: Mapping[str, Any]) -> tuple[Saved, list[Fallback]]:
        """The sums of one, while nobody works on them."""
        with locked(shard_target(self.out, shard), take_lock=self.take_lock) as folder:
            path = folder.state_path(SHARE)
            try:
                return without_fallbacks(path, Saved(*read_state(path)))
            except InputError as error:
                raise InputError(f"{error}; run the same command with --shard {shard}, then this one again") from error

    def _others(self) -> str:
        """Shards of another N, which are easily taken for these."""
        of = {
            p.name.rpartition("-of-")[2].removesuffix(".resume")
            for p in self.out.parent.glob(self.out.name + ".shard-*")
        }
        others = sorted(found for found in of if found.isdecimal() and found != str(self.of))
        return f". There are shards of {', '.join(others)}" if others else ""


def added(total: Saved, part: Saved, *, where: str) -> Saved:
    """Two sums over windows as one, `part` behind `total`, whose tensors are overwritten.

    A statistic that one of them has not (no window of its share gives gradients) counts as zeros there.
    """
    if total.facts["run"] != part.facts["run"]:
        raise InputError(f"{where}: its sums are not of the same windows; measure it again (--restart)")
    tensors: dict[str, Tensor] = {**part.tensors, **total.tensors}
    for name in total.tensors.keys() & part.tensors.keys() - {"generator"}:
        tensors[name] = total.tensors[name].add_(part.tensors[name])
    tensors["generator"] = part.tensors["generator"]
    ours, theirs = total.facts["counts"], part.facts["counts"]
    counts = {name: [a + b for a, b in zip(own, theirs[name], strict=True)] for name, own in ours.items()}
    return Saved(part.step, tensors, {**total.facts, "counts": counts})
