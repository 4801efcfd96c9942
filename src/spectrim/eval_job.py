"""One evaluation: a model, and the dense one beside it, on the same text, tasks, questions, in one run."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spectrim.data import Windows, evaluation_windows, held_out_samples, load_tasks, load_texts, load_tokenizer
from spectrim.engines.measure import Progress
from spectrim.errors import InputError, UsageError, did_you_mean
from spectrim.evaluate.forgetting import forgetting
from spectrim.evaluate.harness import require_harness, run_harness
from spectrim.evaluate.intervals import Interval
from spectrim.evaluate.kick import load_questions, recall
from spectrim.evaluate.language import evaluate
from spectrim.evaluate.metrics import check_metrics, measure_metrics
from spectrim.evaluate.speed import decode_tokens_per_s, speed_note
from spectrim.evaluate.tasks import TaskResult, evaluate_tasks
from spectrim.models.load import Source, check_vocabulary, context_length, load_model, pick_device, resolve
from spectrim.processes import present
from spectrim.report import tasks as task_table
from spectrim.same_for_all import require_same

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What is asked for; checked when it is made, before anything is loaded."""

    model: str
    size: float | None = None
    against: str | None = None
    text: str = "builtin:stdlib"
    windows: int = 40
    length: int = 512
    speed: bool = True
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    metrics: tuple[str, ...] = ()
    questions: Path | None = None
    gaps: tuple[str, ...] = ()
    harness: tuple[str, ...] = ()
    harness_folder: Path | None = None
    tokenizer: str | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_metrics(self.metrics)
        if "kick" in self.metrics and self.questions is None and not self.tasks:
            raise UsageError("metric kick needs --questions FILE (question, answers) or --tasks (multiple choice)")
        if self.questions is not None and "kick" not in self.metrics:
            raise UsageError("--questions is read by the metric kick; add --metrics kick")
        if ("forgetting" in self.metrics) != bool(self.gaps):
            raise UsageError("the metric forgetting and --gap TASK:SHIFTED go together; give both, with --tasks")
        if self.gaps and self.against is None:
            raise UsageError("the metric forgetting compares two models; name the dense one with --against")
        if self.harness_folder is not None and not self.harness:
            raise UsageError("--lm-eval-include says where tasks are; name them with --lm-eval")
        if self.harness:
            require_harness()

    @property
    def wants_tokenizer(self) -> bool:
        """Whether anything but samples of the dense model is read."""
        return self.text != "self" or bool(self.tasks or self.questions or self.harness)


def run_eval(request: EvalRequest, *, progress: Progress | None = None) -> tuple[dict[str, Any], list[TaskResult]]:
    """All figures as one JSON-ready dict, and the results of `tasks` for a table.

    Several processes (processes.joined) share the windows of the text; all else is for one, and is refused.
    """
    refuse_unspread(request)
    asked = load_tasks(list(request.tasks), limit=request.task_limit, seed=request.seed) if request.tasks else None
    pairs = gaps_of(request, [] if asked is None else [task.name for task in asked.tasks])
    questions = None if request.questions is None else load_questions(request.questions)
    where, sources = pick_device(request.device), {"model": resolve(request.model)}
    if request.against is not None:
        sources["dense"] = resolve(request.against)
    for source in sources.values():
        require_same(request, source)
    refuse_other_vocabulary(sources)
    first_only = present().first_only
    words = first_only(lambda: _tokenizer(request.tokenizer, sources["model"])) if request.wants_tokenizer else None
    length = min(request.length, *(context_length(source.config) or request.length for source in sources.values()))
    read = None if request.text == "self" else present().from_first(lambda: _read(request, words, length))
    models = {
        name: load_model(source, where, torch.float32, size=request.size if name == "model" else None)
        for name, source in sources.items()
    }
    count, seed = request.windows, request.seed
    tokens = read or held_out_samples(models["dense"], length=length, count=count, seed=seed)
    facts = text_facts(request, tokens) | on_text(models, tokens)
    facts |= {"metrics": measure_metrics(request.metrics, models, tokens.ids)} if request.metrics else {}
    results: list[TaskResult] = []
    if asked is not None and words is not None:
        results = evaluate_tasks(models["model"], words, asked.tasks, dense=models.get("dense"), progress=progress)
        facts |= {"tasks": [task_table.facts(result) for result in results], "tasks_skipped": asked.skipped}
    if "kick" in request.metrics:
        facts["metrics"]["kick"] = kick_facts(models, words, questions, results)
    if pairs:
        facts["metrics"]["forgetting"] = {f"{a}:{b}": forgetting_facts(results, a, b) for a, b in pairs}
    if request.harness and words is not None:
        given = {"include": request.harness_folder, "limit": request.task_limit, "seed": seed}
        facts["lm_eval"] = run_harness(models, words, request.harness, **given)
    if request.speed and present().is_first:
        for name, model in models.items():
            nn.Module.to(model, sources[name].dtype)  # in place; transformers' own `to` has no usable type
            facts[name]["decode_tokens_per_s"] = decode_tokens_per_s(model)
        if "dense" in models:
            facts["speed_note"] = speed_note(*(facts[name]["decode_tokens_per_s"] for name in ("model", "dense")))
    facts["notes"] = notes_on_room(models, facts)
    return facts, results


def refuse_other_vocabulary(sources: Mapping[str, Source]) -> None:
    """InputError where --against cannot be the dense model of this one: it knows another number of tokens."""
    known = {name: source.config.get_text_config().vocab_size for name, source in sources.items()}
    if len(set(known.values())) > 1:
        raise InputError(
            f"{sources['model'].name} knows {known['model']} tokens, --against {sources['dense'].name} "
            f"{known['dense']}: they cannot be compared; name the model that the folder was made from"
        )


def refuse_unspread(request: EvalRequest) -> None:
    """UsageError where several processes would each do what one does."""
    world = present().world
    alone = {
        "--text self": request.text == "self",
        "--tasks": request.tasks,
        "--metrics": request.metrics,
        "--lm-eval": request.harness,
    }
    asked = [name for name, wanted in alone.items() if wanted]
    if world > 1 and asked:
        raise UsageError(
            f"eval {', '.join(asked)}: of an evaluation only that on a text is spread over several processes, and "
            f"there are {world}; leave it out, or run it as one process (without torchrun)"
        )


def text_facts(request: EvalRequest, tokens: Windows) -> dict[str, Any]:
    """Which text it was."""
    return {
        "text": tokens.source, "note": tokens.note, "sha256": tokens.sha256, "size": request.size,
        "windows": len(tokens.ids), "length": int(tokens.ids.shape[1]),
    }  # fmt: skip


def on_text(models: dict[str, PreTrainedModel], tokens: Windows) -> dict[str, Any]:
    """Perplexity of each model; of the first KL, agreement and excess beside the dense one; intervals {low, high}."""
    facts: dict[str, Any] = {}
    for name, model in models.items():
        check_vocabulary(model, tokens.ids)
        quality = evaluate(model, tokens.ids, dense=models.get("dense") if name == "model" else None)
        facts[name] = named(dataclasses.asdict(quality))
    return facts


def notes_on_room(models: Mapping[str, PreTrainedModel], facts: Mapping[str, Any]) -> list[str]:
    """What was not measured because a model's context has no room for a continuation."""
    notes = []
    for name, model in models.items():
        asked = {"decode_tokens_per_s": facts[name].get("decode_tokens_per_s", 0)}
        asked["repetition"] = facts.get("metrics", {}).get("repetition", {}).get(name, 0)
        left = [what for what, value in asked.items() if value is None]
        if left:
            room = f"its context of {context_length(model.config)} tokens has no room for a continuation"
            notes.append(f"{name}: no {' and '.join(left)}: {room}")
    return notes


def named(facts: dict[str, Any]) -> dict[str, Any]:
    """Intervals as {low, high}."""
    return {key: value._asdict() if isinstance(value, Interval) else value for key, value in facts.items()}


def kick_facts(
    models: dict[str, PreTrainedModel], words: Any, questions: Any, results: list[TaskResult]
) -> dict[str, Any]:
    """Closed and open book, and what tasks retain of what the dense model has right."""
    facts: dict[str, Any] = {}
    for name, open_book in (("closed_book", False), ("open_book", True)) if questions else ():
        given = {"dense": models.get("dense"), "open_book": open_book}
        found = recall(models["model"], words, questions, **given)
        facts[name] = None if found is None else named(dataclasses.asdict(found))
    facts["tasks"] = {
        result.task: {"retained": own.retained, "interval": _ends(own.retained_interval)}
        for result in results
        if (own := result.acc.dense) is not None
    }
    return facts


def forgetting_facts(results: list[TaskResult], first: str, shifted: str) -> dict[str, Any]:
    """From the accuracies of two tasks."""
    one, two = ({result.task: result for result in results}[name] for name in (first, shifted))
    assert one.acc.dense is not None
    assert two.acc.dense is not None
    given = (one.acc.value, two.acc.value), (one.acc.dense.value, two.acc.dense.value), (one.items, two.items)
    return named(dataclasses.asdict(forgetting(*given)))


def gaps_of(request: EvalRequest, tasks: list[str]) -> list[tuple[str, str]]:
    """Pairs of task names; UsageError for one that is not among the tasks."""
    pairs = []
    for text in request.gaps:
        first, colon, shifted = text.partition(":")
        if not colon:
            raise UsageError(f"--gap {text}: expected TASK:SHIFTED, e.g. arc_easy:arc_challenge")
        for name in (first, shifted):
            if name not in tasks:
                raise UsageError(f"--gap {text}: {name!r} is none of --tasks{did_you_mean(name, tasks or ['(none)'])}")
        pairs.append((first, shifted))
    return pairs


def _ends(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def _tokenizer(given: str | None, source: Source) -> "PreTrainedTokenizerBase":
    try:
        return load_tokenizer(given or source.folder)
    except InputError as error:
        raise InputError(f"{error}, or --text self --against DENSE, which needs no tokenizer") from error


def _read(request: EvalRequest, words: "PreTrainedTokenizerBase | None", length: int) -> Windows:
    assert words is not None
    return evaluation_windows(load_texts(request.text, split="evaluation"), words, length=length, count=request.windows)
