"""spectrim makes neural networks smaller and faster by acting on their spectrum, and proves what that costs.

    import spectrim
    result = spectrim.compress("builtin:tiny", keep=0.8)
    result.save_pretrained("small")
    model = AutoModelForCausalLM.from_pretrained("small")      # plain transformers

Importing spectrim registers its format with transformers; nothing else happens at import. The command `spectrim` does
so when it loads a model: `--help` does not wait for torch.
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.version import __version__

if TYPE_CHECKING:
    from spectrim.api import compress, evaluate, load
    from spectrim.evaluate.tasks import evaluate_tasks

__all__ = ["__version__", "compress", "evaluate", "evaluate_tasks", "load"]

_PLACES = {
    "compress": "spectrim.api",
    "evaluate": "spectrim.api",
    "load": "spectrim.api",
    "evaluate_tasks": "spectrim.evaluate.tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'spectrim' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


def _is_the_command() -> bool:
    """True in `spectrim ...` and `python -m spectrim ...`."""
    return Path(sys.argv[0]).name in ("spectrim", "spectrim.exe") or ("-m", "spectrim") in pairwise(sys.orig_argv)


if not _is_the_command():
    from spectrim.integrations.transformers import register

    register()
