"""What the storage protocol costs: the share of a compression that goes into states, checksums and syncs.

    python benchmarks/storage_cost.py ../shared/models/ref-llama-24m --calib-windows 32

Runs `compress --preset fast` once with a clock around everything that a run without resume, checksums and durability
would not do: fingerprint of source and tokens, lock, records, states and the hashes that tie them together, syncing and
sealing the result, its manifest, tidying up. Writing the result itself is not counted. Prints one JSON object.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from spectrim import job, resume
from spectrim.engines import couple, layerwise, newton, parts, pipeline, propagate
from spectrim.job import Request, run
from spectrim.resume import Resume, ResumeOptions
from spectrim.store import disk, writer
from spectrim.store.work import WorkFolder

COUNTED: tuple[tuple[Any, str], ...] = (
    (Resume, "save"),
    (Resume, "load"),
    (Resume, "forget"),
    (WorkFolder, "claim"),
    (WorkFolder, "record"),
    (WorkFolder, "remove"),
    (resume, "fingerprint"),
    (disk, "seal"),
    (disk, "fsync_folder"),
    (writer, "_remove_replaced"),
    (job, "write_manifest"),
    (job, "preflight"),
    (layerwise, "digest_of"),
    (layerwise, "spectrum_tensors"),
    (couple, "digest_of"),
    (newton, "energies_of"),
    (pipeline, "energies_of"),
    (pipeline, "pack_closed_form"),
    (propagate, "energies_of"),
    (propagate, "spectrum_tensors"),
    (parts, "digest_of"),
)


class Clock:
    """Seconds by name; a call inside a counted call is counted once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.states: list[tuple[str, int, float]] = []
        self._inside = False

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return call(*arguments, **options)
            self._inside, began = True, time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                took = time.perf_counter() - began
                self.seconds[name], self._inside = self.seconds.get(name, 0.0) + took, False
                if name == "Resume.save":
                    self.states.append((arguments[1], parts.size_of(arguments[2].tensors), round(took, 3)))

        return timed


def main(model: str, windows: int, length: int, keep: float) -> dict[str, Any]:
    """One run; seconds of the protocol, of all, and their ratio."""
    clock = Clock()
    request = Request(model=model, keep=keep, preset="fast", calib_windows=windows, calib_length=length, eval_windows=8)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        for owner, name in COUNTED:
            label = f"{getattr(owner, '__name__', owner).rpartition('.')[2]}.{name}"
            stack.enter_context(mock.patch.object(owner, name, clock.around(label, getattr(owner, name))))
        began = time.perf_counter()
        report = run(request, Path(scratch) / "out", options=ResumeOptions(command=("compress",))).report
        total = time.perf_counter() - began
    protocol = sum(clock.seconds.values())
    return {
        "command": f"python benchmarks/storage_cost.py {Path(model).name} --calib-windows {windows}",
        "seconds": round(total, 1),
        "stages": {name: round(value, 1) for name, value in report["seconds"].items()},
        "protocol_seconds": round(protocol, 2),
        "share": round(protocol / total, 4),
        "by_part": {name: round(value, 3) for name, value in sorted(clock.seconds.items(), key=lambda x: -x[1])},
        "states": [{"stage": stage, "bytes": nbytes, "seconds": took} for stage, nbytes, took in clock.states],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calib-windows", type=int, default=32)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--out", type=Path, help="JSON file, as well as stdout")
    arguments = parser.parse_args()
    facts = main(arguments.model, arguments.calib_windows, arguments.calib_length, arguments.keep)
    print(json.dumps(facts, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")
