"""Tasks of lm-evaluation-harness (extra `eval`) on models in memory, the dense one beside.

The harness has its own prompts, splits and scoring; this only hands it the model and reads its table. Tasks are named
as the harness names them, or come from a folder of task files of its own format (YAML), whose data may be local files:
then no hub is asked. An interval is the harness's standard error times 1.96, where it gives one; of small tasks near 0
or 1 it is too narrow (our own tasks, docs/tasks.md, have Wilson's).
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.engines.measure import autocast, frozen
from spectrim.errors import InputError, UsageError, without_tokens
from spectrim.evaluate.intervals import Z95
from spectrim.models.walk import device_of

EXTRA = "lm-evaluation-harness is not installed; pip install 'spectrim[eval]' brings it"
BATCH = 8


def require_harness() -> None:
    """UsageError that names the extra, before anything is loaded."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise UsageError(EXTRA) from error


def run_harness(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """`{task: {metric: {model: {value, low, high}}}}` of every model; ends are None without a standard error."""
    require_harness()
    if include is not None and not include.is_dir():
        raise UsageError(
            f"--lm-eval-include {include}: is not a folder; give the one that holds the task files (.yaml)"
        )
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for which, model in models.items():
        for task, metrics in _results(model, tokenizer, tasks, include, limit, seed).items():
            for name, figures in figures_of(metrics).items():
                found.setdefault(task, {}).setdefault(name, {})[which] = figures
    return found


def _results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    include: Path | None,
    limit: int | None,
    seed: int,
) -> Mapping[str, Mapping[str, Any]]:
    """The harness's own `results`; what it raises becomes an InputError with its words."""
    harness = importlib.import_module("lm_eval")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(
        include_path=None if include is None else str(include)
    )
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(f"lm-evaluation-harness knows no task {unknown[0]!r}; --lm-eval-include DIR adds task files")
    wrapped = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=BATCH
    )
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    with frozen(model), autocast(device_of(model)):
        try:
            out = harness.simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, **seeds
            )
        except Exception as error:  # the harness, its task file or the data set it asks for
            said = without_tokens(" ".join(str(error).split()))[:300]
            raise InputError(
                f"lm-evaluation-harness failed on {', '.join(tasks)}: {type(error).__name__}: {said}"
            ) from error
    return out["results"]


def figures_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """`acc,none` and `acc_stderr,none` of the harness as `acc` with its ends; what is no number is left out."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in metrics.items():
        name, _, kind = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or name.endswith("_stderr") or not kind:
            continue
        spread = metrics.get(f"{name}_stderr,{kind}")
        half = Z95 * spread if isinstance(spread, int | float) else None
        shown = name if kind == "none" else f"{name} ({kind})"
        found[shown] = {
            "value": float(value),
            "low": None if half is None else float(value - half),
            "high": None if half is None else float(value + half),
        }
    return found
