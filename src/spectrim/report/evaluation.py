"""What `spectrim eval` shows to people."""

from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.evaluate.tasks import TaskResult
from spectrim.report import tasks as task_table
from spectrim.terminal import print_table, stdout

COLUMNS = {
    "perplexity": "perplexity",
    "excess": "log perplexity - dense",
    "kl": "KL (nats)",
    "agreement": "agreement",
    "decode_tokens_per_s": "decode tokens/s",
}


def show_evaluation(facts: Mapping[str, Any], results: Sequence[TaskResult]) -> None:
    """Tables of text, tasks, further metrics and the harness, 95 % intervals in brackets."""
    models = [name for name in ("model", "dense") if name in facts]
    rows = [[name, *(_with_interval(facts[name], key) for key in COLUMNS)] for name in models]
    title = f"{facts['text']}: {facts['windows']} windows of {facts['length']} tokens, no overlap"
    print_table(title, ["", *COLUMNS.values()], rows)
    if facts.get("speed_note"):
        stdout.print(f"note: {facts['speed_note']}", soft_wrap=True)
    for note in facts.get("notes", ()):
        stdout.print(f"note: {note}", soft_wrap=True)
    if "tasks" in facts:
        task_table.show(results, facts["tasks_skipped"])
    for name, found in facts.get("metrics", {}).items():
        for which, figures in found.items():
            if figures:
                stdout.print(f"{name}, {which}: {_line(figures)}", soft_wrap=True)
    for task, metrics in facts.get("lm_eval", {}).items():
        shown = [[name, *(_ends(own.get(which)) for which in models)] for name, own in metrics.items()]
        print_table(f"lm-evaluation-harness, {task}", ["", *models], shown)


def _with_interval(figures: Mapping[str, Any], key: str) -> str:
    value, interval = figures.get(key), figures.get(f"{key}_interval")
    if value is None:
        return ""
    ends = "" if interval is None else f" [{interval['low']:.4f}, {interval['high']:.4f}]"
    return f"{value:.4f}{ends}"


def _ends(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return ""
    value, low, high = figure["value"], figure["low"], figure["high"]
    return f"{value:.4f}" if low is None else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _line(figures: Any) -> str:
    if not isinstance(figures, Mapping):
        return str(figures)
    return ", ".join(f"{key} {_plain(value)}" for key, value in figures.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, Mapping):
        return "[" + ", ".join(_plain(own) for own in value.values()) + "]"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value)
