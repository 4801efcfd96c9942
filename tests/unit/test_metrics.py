"""Figures beyond perplexity: each pure function beside a slow oracle, and what they say through `spectrim eval`."""

import importlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from command_line import call, small_model, small_text
from spectrim.errors import InputError, UsageError
from spectrim.evaluate import language
from spectrim.evaluate.forgetting import forgetting, gap_interval
from spectrim.evaluate.harness import figures_of
from spectrim.evaluate.intervals import Interval, of_mean, student95
from spectrim.evaluate.kick import is_hit, load_questions, matching_level, normalised, recall, retained
from spectrim.evaluate.language import evaluate
from spectrim.evaluate.matrix_entropy import entropy_of, matrix_entropy
from spectrim.evaluate.metrics import last_hidden
from spectrim.evaluate.nuclear_norm import exact_norm, nuclear_norm, proxy_norm
from spectrim.evaluate.repetition import repeated_share, repetition
from task_files import CHOICE
from tiny_models import tiny, token_ids

# ---- intervals


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (39, 2.0227), (1000, 1.9623)],
)
def test_students_t_is_that_of_the_tables(freedom: int, wanted: float) -> None:
    assert student95(freedom) == pytest.approx(wanted, rel=2e-3)


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    draw, covered = random.Random(0), 0
    for _ in range(2000):
        found = of_mean([draw.gauss(3, 2) for _ in range(8)])
        assert found is not None
        covered += found.low <= 3 <= found.high
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)
    assert of_mean([1.0]) is None


def test_the_interval_of_a_share_stays_between_0_and_1() -> None:
    assert of_mean([0.0, 0.82]) == pytest.approx((0.41 - 12.7062 * 0.41, 0.41 + 12.7062 * 0.41), rel=1e-5)
    assert of_mean([0.0, 0.82], least=0, most=1) == (0, 1)
    assert of_mean([0.5, 0.52, 0.51], least=0, most=1) == of_mean([0.5, 0.52, 0.51])
    assert of_mean([1 + 1e-15, 1 + 1e-15], least=0, most=1) == (1 + 1e-15, 1 + 1e-15)  # its own mean is inside


def test_the_intervals_of_quality_and_repetition_stay_where_the_figures_can_be(monkeypatch) -> None:
    sums = torch.tensor([[3.0, 9.0], [-3.0, 3.0], [0.0, 2.0], [0.0, 3.0]], dtype=torch.float64)
    found = language.quality_from(sums, 4)  # two windows: an interval of 12.7 standard errors to each side
    assert found.perplexity_interval is not None
    assert found.perplexity_interval.low == 1.0
    assert found.excess_interval == pytest.approx((-12.7062, 12.7062), rel=1e-5)
    assert found.kl_interval == pytest.approx((0, 1 / 3 + 12.7062 / 3), rel=1e-5)
    assert found.agreement_interval == (0.0, 1.0)
    shares = iter([0.0, 0.82])
    module = importlib.import_module("spectrim.evaluate.repetition")
    monkeypatch.setattr(module, "repeated_share", lambda _: next(shares))
    repeated = repetition(tiny("llama"), token_ids(2, 4), tokens=8)
    assert repeated is not None
    assert repeated.interval == (0.0, 1.0)


def test_quality_over_windows_is_that_of_a_loop_over_tokens() -> None:
    dense, model = tiny("llama", seed=0), tiny("llama", seed=1)
    ids = token_ids(5, 12)
    found = evaluate(model, ids, dense=dense, batch_size=2)
    losses, excess, agreed = [], [], []
    for row in ids:
        own, others, same = [], [], []
        for at in range(11):
            with torch.no_grad():
                log_p = model(row[None, : at + 1]).logits[0, -1].double().log_softmax(-1)
                log_q = dense(row[None, : at + 1]).logits[0, -1].double().log_softmax(-1)
            own.append(-float(log_p[row[at + 1]]))
            others.append(float(log_q[row[at + 1]] - log_p[row[at + 1]]))
            same.append(float(log_p.argmax() == log_q.argmax()))
        losses.append(sum(own) / 11)
        excess.append(sum(others) / 11)
        agreed.append(sum(same) / 11)
    low, high = of_mean(excess)  # type: ignore[misc]
    assert math.log(found.perplexity) == pytest.approx(sum(losses) / 5, abs=2e-2)
    assert found.excess == pytest.approx(sum(excess) / 5, abs=2e-2)
    assert found.excess_interval is not None
    assert found.excess_interval.low == pytest.approx(low, abs=2e-2)
    assert found.excess_interval.high == pytest.approx(high, abs=2e-2)
    assert found.perplexity_interval is not None
    assert found.perplexity_interval.low < found.perplexity < found.perplexity_interval.high
    alone = evaluate(model, ids, batch_size=5)
    assert alone.perplexity == pytest.approx(found.perplexity, rel=1e-3)
    assert (alone.kl, alone.excess, alone.kl_interval) == (None, None, None)


# ---- repetition


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 5))
def test_repeated_share_is_that_of_a_search(ids: list[int], n: int) -> None:
    starts = range(len(ids) - n + 1)
    again = sum(any(ids[i : i + n] == ids[j : j + n] for j in range(i)) for i in starts)
    assert repeated_share(ids, n) == pytest.approx(again / len(starts) if len(starts) else 0.0)


def test_a_model_that_says_one_word_repeats_itself() -> None:
    model = tiny("llama", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all logits equal: the first token for ever
    model.generation_config.eos_token_id = None
    found = repetition(model, token_ids(3, 4), tokens=20)
    assert found is not None
    assert found.share == pytest.approx(16 / 17)
    assert (found.continuations, found.tokens) == (3, 20)
    with pytest.raises(UsageError, match="at least 4"):
        repetition(model, token_ids(1, 4), tokens=3)


def test_what_follows_the_end_token_does_not_count() -> None:
    model = tiny("llama", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.generation_config.eos_token_id = 0
    found = repetition(model, token_ids(2, 4), tokens=20)
    assert found is not None
    assert found.share == 0.0


# ---- nuclear norm and entropy


def slow_rows(hidden: Tensor) -> list[list[float]]:
    """Centred and normalised, number by number."""
    rows = [[float(x) for x in row] for row in hidden]
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    centred = [[x - mean for x, mean in zip(row, means, strict=True)] for row in rows]
    lengths = [math.sqrt(sum(x * x for x in row)) or 1.0 for row in centred]
    return [[x / length for x in row] for row, length in zip(centred, lengths, strict=True)]


@pytest.mark.parametrize("shape", [(2, 3), (3, 7), (7, 3), (5, 5), (12, 4)])
def test_norms_and_entropy_are_those_of_the_oracle(shape: tuple[int, int]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    rows = torch.tensor(slow_rows(hidden), dtype=torch.float64)
    columns = sorted((math.sqrt(sum(float(x) ** 2 for x in column)) for column in rows.T), reverse=True)
    assert proxy_norm(hidden) == pytest.approx(sum(columns[: min(shape)]) / shape[0])
    values = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0)
    assert exact_norm(hidden) == pytest.approx(float(values.sqrt().sum()) / shape[0], abs=1e-6)
    shares = [float(v) / float(values.sum()) for v in values if v > 1e-14]
    wanted = -sum(p * math.log(p) for p in shares) / math.log(shape[1])
    assert entropy_of(hidden) == pytest.approx(wanted, abs=1e-8)
    assert entropy_of(hidden) <= matrix_entropy([hidden]).reachable + 1e-9


@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 1000))
def test_with_all_columns_the_proxy_bounds_the_norm(m: int, d: int, seed: int) -> None:
    hidden = torch.randn(max(m, d), d, generator=torch.Generator().manual_seed(seed))
    assert proxy_norm(hidden) >= exact_norm(hidden) - 1e-9


def test_a_rotation_changes_the_proxy_and_not_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 8, generator=generator) * torch.tensor([8.0, 4, 2, 1, 0.5, 0.2, 0.1, 0.05])
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert exact_norm(hidden @ rotation) == pytest.approx(exact_norm(hidden), rel=1e-5)
    assert entropy_of(hidden @ rotation) == pytest.approx(entropy_of(hidden), rel=1e-5)
    assert proxy_norm(hidden @ rotation) > 1.1 * proxy_norm(hidden)


def test_tokens_that_are_all_alike_have_no_nan() -> None:
    same = torch.ones(4, 3)
    assert (proxy_norm(same), exact_norm(same), entropy_of(same)) == (0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match="two tokens"):
        proxy_norm(torch.ones(1, 3))
    with pytest.raises(UsageError, match="one length"):
        nuclear_norm([torch.randn(4, 3), torch.randn(5, 3)])


def test_last_hidden_states_are_what_the_head_reads() -> None:
    model, ids = tiny("llama", seed=0), token_ids(3, 6)
    head = model.get_output_embeddings()
    with torch.no_grad():
        logits = torch.stack([head(hidden) for hidden in last_hidden(model, ids, batch_size=2)])
        torch.testing.assert_close(logits, model(ids).logits.float(), atol=3e-2, rtol=3e-2)


# ---- knowledge


def test_answers_are_compared_as_words() -> None:
    assert normalised("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert is_hit(" It was Marie Curie.", ["Pierre", "marie curie"])
    assert not is_hit("He is Cuban", ["Cub"])
    assert not is_hit("anything", ["the"])  # nothing is left of it


def test_retained_leaves_the_dense_models_errors_out() -> None:
    found = retained([True, False, True, False], [True, True, False, False])
    assert found is not None
    assert found[0] == 0.5
    assert found[1].low < 0.5 < found[1].high
    assert retained([True], [False]) is None


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [([(0.1, 0.8), (0.2, 0.77), (0.3, 0.5)], 0.2), ([(0.3, 0.8), (0.1, 0.1)], None), ([(0.1, 0.76)], 0.1), ([], None)],
)
def test_the_matching_level_is_the_last_before_the_first_failure(scores: list[Any], wanted: float | None) -> None:
    assert matching_level(scores, 0.8) == wanted


def test_questions_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "q", "answers": ["a b"]}\n\n{"question": "q", "answers": ["c"], "evidence": "e"}\n')
    assert [q.evidence for q in load_questions(path)] == [None, "e"]
    for line, says in [
        ("{", "line 1: is not JSON"),
        ('{"question": "q", "answer": ["a"]}', "did you mean 'answers'"),
        ('{"question": "q", "answers": []}', "answers a list"),
        ('{"question": "q", "answers": ["the"]}', "hold a word"),
        ("", "holds 0 questions"),
    ]:
        path.write_text(line)
        with pytest.raises(InputError, match=says):
            load_questions(path)


def test_recall_of_a_model_beside_itself_is_retained(tmp_path: Path) -> None:
    from spectrim.data import load_tokenizer
    from spectrim.evaluate.kick import Question, answers_of

    folder = small_model(tmp_path / "model")
    words, model = load_tokenizer(folder), tiny("llama", seed=0, vocab_size=8192)
    said = answers_of(model, words, ["Question: Who?\nAnswer:"])[0]
    known = [w for w in said.split() if normalised(w)]
    questions = [
        Question(question="Who?", answers=(known[0] if known else "x",)),
        Question(question="Who?", answers=("qqq",)),
    ]
    found = recall(model, words, questions, dense=model)
    assert found is not None
    assert found.value == (0.5 if known else 0.0)
    assert found.retained == (1.0 if known else None)
    assert recall(model, words, questions, open_book=True) is None


# ---- forgetting


def test_the_relative_bias_is_the_ratio_of_the_gaps() -> None:
    found = forgetting((0.8, 0.4), (0.9, 0.7), (1000, 1000))
    assert found.gap == pytest.approx(0.4)
    assert found.relative_bias == pytest.approx(2.0)
    assert found.gap_interval.low < 0.4 < found.gap_interval.high


def test_no_ratio_where_the_dense_model_has_no_gap() -> None:
    assert forgetting((0.8, 0.4), (0.7, 0.69), (200, 200)).relative_bias is None


def test_the_interval_of_a_gap_covers_it() -> None:
    draw, covered = random.Random(1), 0
    for _ in range(1000):
        p = sum(draw.random() < 0.9 for _ in range(60)) / 60
        q = sum(draw.random() < 0.6 for _ in range(40)) / 40
        found = gap_interval(p, q, 60, 40)
        covered += found.low <= 0.3 <= found.high
    assert covered / 1000 >= 0.93


# ---- the harness


def test_the_harness_table_is_read() -> None:
    table = {"alias": "x", "acc,none": 0.25, "acc_stderr,none": 0.1, "f1,none": 0.5, "f1_stderr,none": "N/A"}
    found = figures_of(table | {"acc_norm,strict": 0.3, "sample_len": 4})
    assert set(found) == {"acc", "f1", "acc_norm (strict)"}
    assert found["acc"]["high"] == pytest.approx(0.446, abs=1e-3)
    assert found["f1"] == {"value": 0.5, "low": None, "high": None}


# ---- through the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("eval") / "model")


def test_eval_with_every_metric(folder: Path, tmp_path: Path) -> None:
    easy, hard, questions = (tmp_path / name for name in ("easy.jsonl", "hard.jsonl", "questions.jsonl"))
    for path in (easy, hard):
        path.write_text("\n".join(json.dumps(item) for item in CHOICE))
    questions.write_text('{"question": "Who?", "answers": ["I"], "evidence": "I did."}\n')
    text = small_text(tmp_path / "text.txt")
    other = small_model(tmp_path / "other", seed=1)
    words = ("eval", folder, "--against", other, "--text", text, "--windows", "3", "--length", "40", "--no-speed")
    more = ("--tasks", easy, "--tasks", hard, "--questions", questions, "--gap", "easy:hard")
    answer = call(
        *words, *more, "--metrics", "repetition,nuclear-norm,entropy", "--metrics", "kick,forgetting", "--json"
    )
    assert answer.code == 0, answer.err
    facts = answer.json
    assert set(facts["metrics"]) == {"repetition", "nuclear-norm", "entropy", "kick", "forgetting"}
    for name in ("repetition", "nuclear-norm", "entropy"):
        assert set(facts["metrics"][name]) == {"model", "dense"}
    assert facts["metrics"]["forgetting"]["easy:hard"]["gap"] == 0.0
    assert facts["metrics"]["kick"]["open_book"]["questions"] == 1
    assert facts["metrics"]["kick"]["tasks"]["easy"]["retained"] == facts["tasks"][0]["acc"]["dense"]["retained"]
    ends = facts["model"]["excess_interval"]
    assert ends["low"] < facts["model"]["excess"] < ends["high"]
    shown = call(*words, "--metrics", "entropy")
    assert shown.code == 0
    assert "entropy, dense: entropy 0." in shown.out
    assert "log perplexity - dense" in shown.out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--metrics", "entrop"), "did you mean 'entropy'"),
        (("--metrics", "kick"), "needs --questions"),
        (("--gap", "a:b"), "go together"),
        (("--metrics", "forgetting", "--gap", "a:b"), "--against"),
        (("--lm-eval-include", "x"), "--lm-eval"),
    ],
)
def test_eval_refuses_what_does_not_fit(words: tuple[str, ...], says: str) -> None:
    answer = call("eval", "/nowhere/model", *words)
    assert answer.code == 2
    assert says in answer.message


def test_a_gap_names_tasks_that_are_there(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "easy.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in CHOICE))
    words = ("eval", folder, "--against", folder, "--tasks", path, "--metrics", "forgetting", "--gap", "easy:haard")
    assert "is none of --tasks" in call(*words).message


def test_intervals_are_json(folder: Path) -> None:
    assert Interval(0.0, 1.0)._asdict() == {"low": 0.0, "high": 1.0}
