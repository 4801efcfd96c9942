"""spectrim makes neural networks smaller and faster by acting on their spectrum, and proves what that costs.

    import spectrim
    result = spectrim.compress("builtin:tiny", keep=0.8)
    result.save_pretrained("small")
    model = AutoModelForCausalLM.from_pretrained("small")      # plain transformers

Importing spectrim registers its format with transformers; nothing else happens at import. The command `spectrim` does
so when it loads a model: `--help` does not wait for torch.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from spectrim.version import __version__

__all__ = ["__version__", "compress", "evaluate", "evaluate_tasks", "load", "speed_up"]


def _is_the_command() -> bool:
    """True in `spectrim ...` and `python -m spectrim ...`."""
    return Path(sys.argv[0]).name in ("spectrim", "spectrim.exe") or ("-m", "spectrim") in pairwise(sys.orig_argv)


if TYPE_CHECKING or not _is_the_command():
    from spectrim.api import compress, evaluate, load
    from spectrim.evaluate.tasks import evaluate_tasks
    from spectrim.integrations.few_rows import speed_up
    from spectrim.integrations.transformers import register

    register()
