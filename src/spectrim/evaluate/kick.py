"""LLM-KICK's knowledge-intensive protocol (arXiv 2310.01382): what a compressed model still knows of what it knew.

    closed book   question -> greedy answer; right if an accepted answer is contained in it, both normalised
    open book     the same with the evidence before the question, where the file has one
    retained      of the questions that the dense model answers right, the share that the compressed one does
    matching      the strongest compression whose score stays within 5 % (relative) of the dense model's

Perplexity is an average over all tokens, of which few carry a fact: it moves late. `retained` leaves the dense model's
own errors out. The paper's tasks judged by another language model (summaries, following instructions) are left out:
without that judge they cannot be repeated. Multiple choice is in evaluate/tasks.py, with the same `retained`.
"""

import json
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spectrim.errors import InputError, UsageError, did_you_mean
from spectrim.evaluate.code import complete
from spectrim.evaluate.intervals import Interval, wilson
from spectrim.models.load import context_length

TOLERANCE = 0.05
MOST_LINES = 1_000_000
KEYS = ("question", "answers", "evidence")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with all answers that are taken for right, and perhaps a text that tells."""

    question: str
    answers: tuple[str, ...]
    evidence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A share of questions answered right, with Wilson's interval; beside the dense model what was retained."""

    value: float
    interval: Interval
    questions: int
    dense: float | None = None
    retained: float | None = None
    retained_interval: Interval | None = None


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD and TriviaQA compare answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def is_hit(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an accepted answer is in `answer`, as whole words."""
    found = f" {normalised(answer)} "
    return any(f" {normalised(one)} " in found for one in accepted if normalised(one))


def retained(right: Sequence[bool], dense_right: Sequence[bool]) -> tuple[float, Interval] | None:
    """Of the items that the dense model has right, the share that the model has too, with interval; None: no item."""
    kept = [mine for mine, theirs in zip(right, dense_right, strict=True) if theirs]
    if not kept:
        return None
    share = sum(kept) / len(kept)
    return share, wilson(share, len(kept))


def matching_level(
    scores: Sequence[tuple[float, float]], dense: float, *, tolerance: float = TOLERANCE
) -> float | None:
    """From (level, score) the largest level up to which every score stays within `tolerance` of the dense one.

    Levels grow with compression. One that is good again beyond one that failed does not count. None: none is.
    """
    best = None
    for level, score in sorted(scores):
        if score < (1 - tolerance) * dense:
            break
        best = level
    return best


def load_questions(path: str | Path) -> list[Question]:
    """JSONL with `question`, `answers` (a list) and perhaps `evidence`; InputError names the line that is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    found = [_question(line, f"{path}, line {at}") for at, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found or len(found) > MOST_LINES:
        raise InputError(f"{path}: holds {len(found):,} questions; 1 to {MOST_LINES:,} are read")
    return found


def _question(line: str, where: str) -> Question:
    try:
        given = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: is not JSON: {error}") from error
    if not isinstance(given, dict) or not {"question", "answers"} <= set(given):
        unknown = [k for k in given if k not in KEYS] if isinstance(given, dict) else []
        hint = did_you_mean(unknown[0], KEYS) if unknown else ""
        raise InputError(f"{where}: needs the keys question and answers{hint}")
    question, answers, evidence = given["question"], given["answers"], given.get("evidence")
    texts = isinstance(answers, list) and answers and all(isinstance(a, str) and normalised(a) for a in answers)
    if not isinstance(question, str) or not texts or not (evidence is None or isinstance(evidence, str)):
        raise InputError(f"{where}: question and evidence are texts, answers a list of texts that hold a word")
    return Question(question=question, answers=tuple(answers), evidence=evidence)


def prompt_of(question: Question, *, open_book: bool) -> str:
    """What the model goes on from."""
    asked = f"Question: {question.question}\nAnswer:"
    return f"{question.evidence}\n\n{asked}" if open_book else asked


def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, tokens: int = 16
) -> list[str]:
    """Greedy answers, the first line of each."""
    limit = context_length(model.config)
    said = []
    for prompt in prompts:
        length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
        if limit is not None and length + tokens > limit:
            raise UsageError(
                f"a question of {length} tokens and {tokens} to answer pass the {limit} that the model reads"
            )
        said.append(complete(model, tokenizer, prompt, tokens=tokens).strip().split("\n")[0])
    return said


@torch.no_grad()
def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    dense: PreTrainedModel | None = None,
    open_book: bool = False,
) -> Recall | None:
    """Of one model, beside the dense one; open book: of the questions that have evidence (None without any)."""
    asked = [q for q in questions if q.evidence is not None or not open_book]
    if not asked:
        return None
    prompts = [prompt_of(q, open_book=open_book) for q in asked]

    def right(judged: PreTrainedModel) -> list[bool]:
        given = answers_of(judged, tokenizer, prompts)
        return [is_hit(answer, q.answers) for answer, q in zip(given, asked, strict=True)]

    mine = right(model)
    value = sum(mine) / len(mine)
    if dense is None:
        return Recall(value=value, interval=wilson(value, len(mine)), questions=len(mine))
    theirs = right(dense)
    kept = retained(mine, theirs)
    return Recall(
        value=value,
        interval=wilson(value, len(mine)),
        questions=len(mine),
        dense=sum(theirs) / len(theirs),
        retained=None if kept is None else kept[0],
        retained_interval=None if kept is None else kept[1],
    )
