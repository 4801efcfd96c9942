"""What one of several processes does in the tests: `python several_worker.py OUT CASE`, started by test_several.py."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from memory_checkpoint import MemoryCheckpoint
from spectrim.engines import measure as measuring
from spectrim.engines import recompute, way
from spectrim.engines.couple import couple
from spectrim.engines.measure import measure
from spectrim.engines.pipeline import compress_model
from spectrim.engines.shared_checkpoint import shared
from spectrim.errors import NumericalError, SpectrimError
from spectrim.evaluate.language import evaluate
from spectrim.models.walk import find_layers
from spectrim.nn import scored
from spectrim.processes import joined, present
from spectrim.registry import make_method
from spectrim.stats import Coupling, Stat
from tiny_models import tiny, token_ids

METHODS = {
    "svd": {},
    "asvd": {},
    "svd-llm": {},
    "afm": {},
    "two-sided": {"coupling": "sequence"},
    "soco": {"coupling": "none", "newton": 1, "steps": 0, "distil_steps": 0},
    "soco balanced": {"steps": 6, "batch_size": 3, "project_every": 2, "coupling": "none", "explore": 0.3},
}
"""Methods of the comparison with one process, and their options."""
LARGE = {
    "svd-llm": {},
    "asvd": {},
    "two-sided": {"coupling": "none", "propagate": 0.0},
    "soco": {"coupling": "none", "newton": 1, "steps": 0, "distil_steps": 0},
    "soco whole": METHODS["soco balanced"] | {"newton": 1},
    "soco sharded": METHODS["soco balanced"] | {"newton": 1},
}
"""The same as models that are too large to be measured at once; of the last one frozen weights are in parts."""
KEEP = 0.6
WINDOWS, GRADIENT_WINDOWS = 16, 8
"""Shares of both are whole batches of four, so that each batch is computed as by one process."""
UNEVEN = 9, 5


def free_port() -> int:
    """A port of this host that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def architecture(method: str) -> str:
    return "llama-gqa-bias" if method == "soco" else "llama"


def ids() -> Tensor:
    return token_ids(WINDOWS, 16)


def compressed(method: str, options: dict[str, Any] | None = None, **more: Any) -> PreTrainedModel:
    """What a method makes of a tiny model."""
    options = METHODS[method] if options is None else options
    made = compress_model(
        tiny(architecture(method)), make_method(method.split()[0], None, dict(options)), KEEP, ids(),
        gradient_windows=GRADIENT_WINDOWS, **more,
    )  # fmt: skip
    return made.model


def compressed_as_large(method: str, **more: Any) -> PreTrainedModel:
    """The same by the way that large models go: as if no memory sufficed. Components are held in float32, so that what
    differs from one process is not the rounding of 16 bits.
    """
    kept = {module: module.fits_whole for module in (way, recompute)}
    narrow, scored.NARROW = scored.NARROW, torch.float32
    for module in kept:
        module.fits_whole = lambda *_: False  # type: ignore[assignment]
    try:
        in_parts = method.endswith("sharded") and not present().alone
        return compressed(method, LARGE[method], shard_weights=in_parts, **more)
    finally:
        scored.NARROW = narrow
        for module, own in kept.items():
            module.fits_whole = own


def statistics() -> dict[str, Tensor]:
    """All that calibration measures, of all layers."""
    model = tiny("llama")
    walk = find_layers(model)
    needs = frozenset(Stat) - {Stat.SLOPE}
    windows, gradient_windows = UNEVEN
    seen = ids()[:windows]
    stats = measure(model, walk, seen, needs, batch_size=2, gradient_windows=gradient_windows, owned=True)
    stats = couple(model, walk, seen[:gradient_windows], stats, Coupling(0.01, 0.2), batch_size=2)
    return {f"{name}.{stat}": value for name, own in stats.items() for stat, value in own.measured().items()}


def quality(model: PreTrainedModel) -> dict[str, Tensor]:
    """Figures of a compressed model beside the dense one."""
    found = evaluate(model, token_ids(5, 16, seed=7), dense=tiny("llama"), batch_size=2)
    assert found.kl is not None
    assert found.kl_interval is not None
    return {
        "quality": torch.tensor([found.perplexity, found.kl, *found.kl_interval, found.tokens], dtype=torch.float64)
    }


def save(out: Path, name: str, tensors: dict[str, Tensor]) -> None:
    save_file({key: t.detach().contiguous().clone() for key, t in tensors.items()}, out / f"{name}.safetensors")


def compare(out: Path) -> None:
    """Everything that is compared with one process; each rank saves its own."""
    rank = present().rank
    save(out, f"statistics {rank}", statistics())
    for method in METHODS:
        model = compressed(method)
        save(out, f"{method} {rank}", dict(model.state_dict()))
        if method == "svd-llm":
            save(out, f"quality {rank}", quality(model))
    in_parts(out)


def in_parts(out: Path) -> None:
    """The last of LARGE, with states of which the first rank keeps all; and gone on with from them."""
    own = MemoryCheckpoint(every=4) if present().is_first else None
    for name in ("soco sharded", "gone on"):
        model = compressed_as_large("soco sharded", checkpoint=shared(own))
        save(out, f"{name} {present().rank}", dict(model.state_dict()))
        if own is not None and name == "soco sharded":
            assert own.log[0][0] == "closed form"
            del own.states["scores"]  # as if it had been killed before the first step


def large(out: Path) -> None:
    """What is compared of large models."""
    for method in LARGE:
        save(out, f"{method} {present().rank}", dict(compressed_as_large(method).state_dict()))


def killed(_out: Path) -> None:
    """The second rank is killed while the first waits for it."""
    present().wait()
    if present().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    present().wait()


def deaf(_out: Path) -> None:
    """The second rank is told to stop while it waits for the first one inside a library, which does not come back."""
    present().wait()
    if present().is_first:
        time.sleep(300)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))  # would run if Python did
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    present().wait()


def stuck(_out: Path) -> None:
    """The second rank fails while the first is in something that no error ends, as a GPU's collectives are."""
    present().wait()
    if present().rank == 1:
        raise NumericalError("blocks.3: the inputs are not finite")
    time.sleep(300)


def fails(_out: Path) -> None:
    """The second rank finds a number that is not finite in the windows that only it sees."""
    model, walk = tiny("llama"), find_layers(tiny("llama"))
    if present().rank == 1:
        with torch.no_grad():
            model.get_input_embeddings().weight[ids()[-1, -1]] = torch.inf
    measure(model, walk, ids(), frozenset({Stat.GRAM}), owned=True)


CASES: dict[str, Callable[[Path], None]] = {
    case.__name__: case for case in (compare, large, killed, deaf, stuck, fails)
}


def main() -> int:
    torch.set_num_threads(1)
    measuring.cpu_has_bf16 = lambda: False  # as in the test: products of bfloat16 round by 1e-3
    out, case = Path(sys.argv[1]), CASES[sys.argv[2]]
    try:
        with joined("cpu"):
            case(out)
    except SpectrimError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
