"""spectrim makes neural networks smaller and faster by acting on their spectrum, and proves what that costs.

    import spectrim
    result = spectrim.compress("builtin:tiny", keep=0.8)
    result.save_pretrained("small")
    model = AutoModelForCausalLM.from_pretrained("small")      # plain transformers

Importing spectrim registers its format with transformers; nothing else happens at import.
"""

from spectrim.api import compress, evaluate, load
from spectrim.evaluate.tasks import evaluate_tasks
from spectrim.integrations.transformers import register
from spectrim.version import __version__

register()

__all__ = ["__version__", "compress", "evaluate", "evaluate_tasks", "load"]
