"""Accuracy on tasks, and agreement with the dense model item by item.

What is scored is log p(continuation | context), as in lm-evaluation-harness: `acc` takes the choice with the highest
sum, `acc_norm` the highest sum by character (choices only); LAMBADA's word counts when greedy decoding gives all its
tokens; of a BLiMP pair the good sentence must be strictly likelier. The first of equal choices is taken.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.data.tasks import Item, Task, load_tasks
from spectrim.engines.measure import Progress
from spectrim.evaluate.intervals import Interval, effective_items, grouped_mean, paired, wilson
from spectrim.evaluate.kick import retained
from spectrim.evaluate.score import BATCH_TOKENS, Encoded, Score, encode_task, score
from spectrim.models.load import check_vocabulary, context_length

Choose = Callable[[Item, Sequence[Score]], object]
"""What a model picks: an index, or LAMBADA's tokens. Two models agree on an item where these are equal."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The dense model on the same items. `difference` is model minus dense, with a 95 % interval for matched pairs."""

    value: float
    interval: Interval
    difference: float
    difference_interval: Interval
    only_model_right: int
    only_dense_right: int
    agreement: float
    agreement_interval: Interval
    retained: float | None = None
    """Of the items that the dense model has right, the share that the model has right too (evaluate/kick.py)."""
    retained_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """A share of items with its 95 % interval (Wilson)."""

    value: float
    interval: Interval
    dense: Compared | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Figures of one task; `chance` is None where guessing is no measure, `fields` are BLiMP's."""

    task: str
    format: str
    file: str
    sha256: str
    items: int
    items_in_file: int
    seed: int | None
    groups: int
    chance: float | None
    truncated: int
    acc: Accuracy
    acc_norm: Accuracy | None = None
    target_perplexity: float | None = None
    dense_target_perplexity: float | None = None
    fields: dict[str, Accuracy] | None = None


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Path | Sequence[str | Path] | Sequence[Task],
    *,
    dense: PreTrainedModel | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Figures of `model`, and of `dense` beside it, on every task: paths (files or folders) or what `load_tasks` read.

    `limit` and `seed` draw items as `load_tasks` does and apply to paths only. Computed in the models' own dtype under
    the same autocast as perplexity; neither model is changed. Raises InputError for a task that cannot be scored.
    """
    if isinstance(tasks, str | Path) or not all(isinstance(task, Task) for task in tasks):
        tasks = load_tasks(tasks, limit=limit, seed=seed).tasks  # type: ignore[arg-type]
    results: list[TaskResult] = []
    for task in tasks:
        assert isinstance(task, Task)
        limits = [context_length(m.config) for m in (model, dense) if m is not None]
        encoded = encode_task(tokenizer, task, limit=min((n for n in limits if n is not None), default=None))
        found = score_items(model, encoded, batch_tokens=batch_tokens, name=task.name, progress=progress)
        found_dense = None
        if dense is not None:
            name = f"{task.name} (dense)"
            found_dense = score_items(dense, encoded, batch_tokens=batch_tokens, name=name, progress=progress)
        results.append(summarise(task, encoded, found, found_dense))
    return results


def score_items(
    model: PreTrainedModel,
    encoded: list[list[Encoded]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    name: str = "",
    progress: Progress | None = None,
) -> list[list[Score]]:
    """A list of scores for each item, in the shape of `encoded`; progress is told as stage `name`."""
    flat = [one for item in encoded for one in item]
    check_vocabulary(model, torch.tensor([max(max(one.ids) for one in flat)]))
    report = None if progress is None else lambda done, total: progress(name, done, total)
    scores = iter(score(model, flat, batch_tokens=batch_tokens, progress=report))
    return [[next(scores) for _ in item] for item in encoded]


def summarise(
    task: Task, encoded: list[list[Encoded]], scored: list[list[Score]], dense: list[list[Score]] | None
) -> TaskResult:
    """Scores of a model, and of the dense one, on the same encoded items, to figures."""
    word = task.format == "lambada"
    choose = {"lambada": _greedy_tokens, "blimp": _strictly_better}.get(task.format, _likeliest)
    normed = task.format == "choice"
    num_choices = [len(item.queries) for item in task.items]
    return TaskResult(
        task=task.name,
        format=task.format,
        file=task.path,
        sha256=task.sha256,
        items=len(task.items),
        items_in_file=task.total,
        seed=task.seed,
        groups=len({item.group for item in task.items}),
        chance=None if word else sum(1 / n for n in num_choices) / len(num_choices),
        truncated=sum(any(one.truncated for one in item) for item in encoded),
        acc=accuracy(task, scored, dense, choose),
        acc_norm=accuracy(task, scored, dense, _likeliest_by_character) if normed else None,
        target_perplexity=_perplexity(scored) if word else None,
        dense_target_perplexity=_perplexity(dense) if word and dense is not None else None,
        fields=_by_field(task, scored, dense, choose) if task.format == "blimp" else None,
    )


def accuracy(task: Task, scored: list[list[Score]], dense: list[list[Score]] | None, choose: Choose) -> Accuracy:
    """Share of items that `choose` gets right, and the comparison with the dense model."""
    groups = [item.group for item in task.items]
    worth = effective_items(groups)
    chosen = [choose(item, scores) for item, scores in zip(task.items, scored, strict=True)]
    right = [_is_right(*each) for each in zip(task.items, scored, chosen, strict=True)]
    value = grouped_mean(right, groups)
    if dense is None:
        return Accuracy(value=value, interval=wilson(value, worth))
    chosen_dense = [choose(item, scores) for item, scores in zip(task.items, dense, strict=True)]
    right_dense = [_is_right(*each) for each in zip(task.items, dense, chosen_dense, strict=True)]
    won = [a and not b for a, b in zip(right, right_dense, strict=True)]
    lost = [b and not a for a, b in zip(right, right_dense, strict=True)]
    same = grouped_mean([a == b for a, b in zip(chosen, chosen_dense, strict=True)], groups)
    value_dense = grouped_mean(right_dense, groups)
    kept = retained(right, right_dense)
    compared = Compared(
        value=value_dense,
        interval=wilson(value_dense, worth),
        difference=value - value_dense,
        difference_interval=paired(grouped_mean(won, groups), grouped_mean(lost, groups), worth),
        only_model_right=sum(won),
        only_dense_right=sum(lost),
        agreement=same,
        agreement_interval=wilson(same, worth),
        retained=None if kept is None else kept[0],
        retained_interval=None if kept is None else kept[1],
    )
    return Accuracy(value=value, interval=wilson(value, worth), dense=compared)


def _is_right(item: Item, scores: Sequence[Score], chosen: object) -> bool:
    return scores[0].greedy if isinstance(chosen, tuple) else chosen == item.gold


def _likeliest(item: Item, scores: Sequence[Score]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i].log_p)


def _likeliest_by_character(item: Item, scores: Sequence[Score]) -> int:
    return max(range(len(scores)), key=lambda i: scores[i].log_p / item.lengths[i])


def _strictly_better(item: Item, scores: Sequence[Score]) -> int:
    return 0 if scores[0].log_p > scores[1].log_p else 1


def _greedy_tokens(item: Item, scores: Sequence[Score]) -> tuple[int, ...]:
    return scores[0].top


def _perplexity(scored: list[list[Score]]) -> float:
    """exp of the mean -log p of a whole target, the harness's perplexity of LAMBADA."""
    return math.exp(min(-sum(scores[0].log_p for scores in scored) / len(scored), 700.0))


def _by_field(
    task: Task, scored: list[list[Score]], dense: list[list[Score]] | None, choose: Choose
) -> dict[str, Accuracy]:
    found: dict[str, Accuracy] = {}
    for name in sorted({item.field for item in task.items}):
        at = [i for i, item in enumerate(task.items) if item.field == name]
        part = Task(
            name=name, path=task.path, format=task.format, items=tuple(task.items[i] for i in at), total=len(at),
            sha256=task.sha256,
        )  # fmt: skip
        found[name] = accuracy(part, [scored[i] for i in at], [dense[i] for i in at] if dense else None, choose)
    return found
