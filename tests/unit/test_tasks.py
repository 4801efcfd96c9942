"""Scores against a slow oracle (one pair at a time, full float64 log-softmax), figures against counting by hand."""

import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import spectrim
from command_line import TINY, call, small_model
from spectrim.data import load_tasks, load_tokenizer
from spectrim.data.tasks import Item, Query, Task
from spectrim.engines import measure
from spectrim.errors import InputError, NumericalError
from spectrim.evaluate.intervals import effective_items, grouped_mean, paired, wilson
from spectrim.evaluate.score import Encoded, Score, batches, encode_task, move_spaces, score
from spectrim.evaluate.tasks import TaskResult, evaluate_tasks, summarise
from spectrim.models.load import load_model, resolve
from task_files import ALL, BLIMP, LAMBADA, write_all, write_lines


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    """The oracle and 1e-4 need float32 on every machine; bf16 is the autocast of some CPUs."""
    with mock.patch.object(measure, "cpu_has_bf16", return_value=False):
        yield


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    return load_model(resolve("builtin:tiny"), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = small_model(tmp_path_factory.mktemp("other") / "model", vocab_size=8192)
    return load_model(resolve(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    return load_tasks(write_all(tmp_path / "tasks")).tasks


@torch.no_grad()
def oracle(model: PreTrainedModel, words: Any, context: str, continuation: str) -> tuple[float, bool]:
    """As lm-evaluation-harness describes it: the whole encoded, the context's number of tokens taken off."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    head = words.encode(context, add_special_tokens=False)
    tail = words.encode(context + continuation, add_special_tokens=False)[len(head) :]
    ids = (head or [words.bos_token_id]) + tail
    log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(len(ids) - len(tail) - 1, len(ids) - 1)
    total = sum(float(log_p[t, ids[t + 1]]) for t in places)
    return total, all(int(log_p[t].argmax()) == ids[t + 1] for t in places)


# ---------- scores


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_scores_are_those_of_the_oracle(
    batch_tokens: int, embedded: PreTrainedModel, words: Any, tasks: list[Task]
) -> None:
    for task in tasks:
        encoded = encode_task(words, task, limit=None)
        flat = [one for item in encoded for one in item]
        scores = score(embedded, flat, batch_tokens=batch_tokens)
        queries = [query for item in task.items for query in item.queries]
        for one, query in zip(scores, queries, strict=True):
            log_p, greedy = oracle(embedded, words, *query)
            assert one.log_p == pytest.approx(log_p, abs=1e-4), query
            assert one.greedy == greedy, query


def test_figures_are_those_of_the_oracle(embedded: PreTrainedModel, words: Any, tmp_path: Path) -> None:
    results = {r.task: r for r in evaluate_tasks(embedded, words, write_all(tmp_path / "tasks"))}

    def log_p(context: str, continuation: str) -> float:
        return oracle(embedded, words, context, continuation)[0]

    right = normed = 0
    for row in ALL["choice"]:
        sums = [log_p(row["ctx"], choice) for choice in row["choices"]]
        lengths = [len(choice) - choice.startswith(" ") for choice in row["choices"]]
        right += sums.index(max(sums)) == row["gold"]
        rates = [s / n for s, n in zip(sums, lengths, strict=True)]
        normed += rates.index(max(rates)) == row["gold"]
    assert results["choice"].acc.value == pytest.approx(right / 5)
    assert results["choice"].acc_norm is not None
    assert results["choice"].acc_norm.value == pytest.approx(normed / 5)
    assert results["choice"].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 2 + 1 / 2 + 1 / 3) / 5)

    right = sum(
        (log_p(row["ctxs"][1], row["cont"]) > log_p(row["ctxs"][0], row["cont"])) == row["gold"]
        for row in ALL["winogrande"]
    )
    assert results["winogrande"].acc.value == right / 2

    words_right = [oracle(embedded, words, row["ctx"], row["target"]) for row in LAMBADA]
    assert results["lambada"].acc.value == pytest.approx(sum(g for _, g in words_right) / 3)
    assert results["lambada"].target_perplexity == pytest.approx(
        math.exp(-sum(s for s, _ in words_right) / 3), rel=1e-4
    )
    assert results["lambada"].chance is None

    good = [log_p("", f" {row['good']}") > log_p("", f" {row['bad']}") for row in BLIMP]
    blimp = results["blimp"]
    assert blimp.acc.value == pytest.approx((sum(good[:3]) / 3 + good[3] + good[4]) / 3)  # three uids, equal weight
    assert blimp.groups == 3
    assert blimp.fields is not None
    assert blimp.fields["morphology"].value == pytest.approx(sum(good[:3]) / 3)
    assert blimp.fields["syntax_semantics"].value == pytest.approx((good[3] + good[4]) / 2)


def test_a_model_agrees_with_itself_and_says_how_it_differs_from_another(
    embedded: PreTrainedModel, other: PreTrainedModel, words: Any, tasks: list[Task]
) -> None:
    for result in evaluate_tasks(embedded, words, tasks, dense=embedded):
        for figure in (result.acc, result.acc_norm, *(result.fields or {}).values()):
            if figure is None:
                continue
            assert figure.dense is not None
            assert (figure.dense.agreement, figure.dense.difference) == (1.0, 0.0)
            assert (figure.dense.only_model_right, figure.dense.only_dense_right) == (0, 0)
            assert figure.dense.difference_interval.low < 0 < figure.dense.difference_interval.high
        assert result.target_perplexity == result.dense_target_perplexity
    forth = evaluate_tasks(embedded, words, tasks, dense=other)
    back = evaluate_tasks(other, words, tasks, dense=embedded)
    for a, b in zip(forth, back, strict=True):
        assert a.acc.dense is not None
        assert b.acc.dense is not None
        assert (a.acc.value, a.acc.dense.value) == (b.acc.dense.value, b.acc.value)
        assert a.acc.dense.difference == pytest.approx(a.acc.value - b.acc.value)
        assert a.acc.dense.agreement == b.acc.dense.agreement
    assert any(a.acc.dense is not None and a.acc.dense.agreement < 1 for a in forth)


# ---------- tokens


def test_spaces_move_to_the_continuation() -> None:
    assert move_spaces(Query("a: \n", "b")) == Query("a:", " \nb")
    assert move_spaces(Query("a:", " b")) == Query("a:", " b")
    assert move_spaces(Query("  ", "b")) == Query("", "  b")


def one_item(*queries: Query) -> Task:
    item = Item(line=7, queries=queries, gold=0, lengths=(1,) * len(queries))
    return Task(name="t", path="t.jsonl", format="choice", items=(item,), total=1, sha256="")


def test_long_contexts_lose_their_left_and_are_counted(other: PreTrainedModel, words: Any) -> None:
    task = one_item(Query("one two three four " * 100, " five"), Query("short", " five"))
    assert other.config.max_position_embeddings == 128
    long, short = encode_task(words, task, limit=128)[0]
    whole = encode_task(words, task, limit=None)[0][0]
    assert len(long.ids) == 129  # the last token is predicted, not read
    assert long.ids == whole.ids[-129:]
    assert (long.truncated, short.truncated, whole.truncated) == (True, False, False)
    exact = encode_task(words, task, limit=len(whole.ids) - 1)[0][0]
    assert (exact.ids, exact.truncated) == (whole.ids, False)
    assert evaluate_tasks(other, words, [task])[0].truncated == 1


def test_the_shorter_context_of_the_two_models_counts_for_both(
    embedded: PreTrainedModel, other: PreTrainedModel, words: Any
) -> None:
    task = one_item(Query("one two three four " * 100, " five"), Query("short", " five"))
    assert evaluate_tasks(embedded, words, [task])[0].truncated == 0
    assert evaluate_tasks(embedded, words, [task], dense=other)[0].truncated == 1


def test_what_cannot_be_scored_is_named(words: Any) -> None:
    with pytest.raises(InputError, match=r"t\.jsonl, line 7: .* tokens, the model reads 3"):
        encode_task(words, one_item(Query("a", " continuation of quite some tokens")), limit=3)
    with pytest.raises(InputError, match=r"t\.jsonl, line 7: '' adds no token"):
        encode_task(words, one_item(Query("a", "")), limit=None)
    bare = mock.Mock(side_effect=words, bos_token_id=None, eos_token_id=None)
    with pytest.raises(InputError, match=r"t\.jsonl: .*neither a BOS nor an EOS token"):
        encode_task(bare, one_item(Query("", " a")), limit=None)
    ending = mock.Mock(side_effect=words, bos_token_id=None, eos_token_id=9)
    assert encode_task(ending, one_item(Query(" ", "a")), limit=None)[0][0].ids[0] == 9


def test_a_tokenizer_of_another_model_is_refused(words: Any, tasks: list[Task], tmp_path: Path) -> None:
    few = load_model(resolve(str(small_model(tmp_path / "few", vocab_size=64))), torch.device("cpu"))
    with pytest.raises(InputError, match="it belongs to another model"):
        evaluate_tasks(few, words, tasks)


def test_logits_that_are_not_finite_are_an_error(other: PreTrainedModel) -> None:
    norm = other.get_submodule("model.norm")
    with mock.patch.object(norm, "forward", lambda hidden: hidden * float("nan")), pytest.raises(NumericalError):
        score(other, [Encoded((1, 2, 3), 1, False)])


def test_batches_hold_each_item_once_and_keep_to_the_size() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(200)]
    found = batches(lengths, 100)
    assert sorted(i for batch in found for i in batch) == list(range(200))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100 for batch in found)
    assert len(found) < 80
    assert batches([500, 3], 100) == [[0], [1]]


# ---------- figures


def result_of(sums: list[list[float]], dense: list[list[float]] | None = None, **item: Any) -> TaskResult:
    items = [
        Item(line=i + 1, queries=(Query("", "x"),) * len(row), gold=0, **{"lengths": (1,) * len(row)} | item)
        for i, row in enumerate(sums)
    ]
    kind = "blimp" if item.get("field") else "choice"
    task = Task(name="t", path="t", format=kind, items=tuple(items), total=len(items), sha256="")

    def scores(rows: list[list[float]]) -> list[list[Score]]:
        return [[Score(one, (), False) for one in row] for row in rows]

    return summarise(task, [], scores(sums), None if dense is None else scores(dense))


def test_equal_choices_first_one_wins_but_not_in_blimp() -> None:
    assert result_of([[-1.0, -1.0]]).acc.value == 1.0
    assert result_of([[-1.0, -1.0]], field="syntax", group="u").acc.value == 0.0


def test_acc_norm_divides_by_characters() -> None:
    result = result_of([[-6.0, -4.0]], lengths=(10, 2))
    assert result.acc_norm is not None
    assert (result.acc.value, result.acc_norm.value) == (0.0, 1.0)


def test_pairs_are_counted() -> None:
    model = [[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]
    dense = [[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0], [1.0, 0, 0]]
    figure = result_of(model, dense).acc
    assert figure.dense is not None
    assert (figure.value, figure.dense.value) == (0.4, 0.6)
    assert (figure.dense.only_model_right, figure.dense.only_dense_right) == (1, 2)
    assert figure.dense.agreement == 0.2  # both wrong with different choices is no agreement


def test_lambada_agrees_on_the_tokens_not_on_being_wrong() -> None:
    task = Task(
        name="t", path="t", format="lambada", items=(one_item(Query("a", " b")).items[0],) * 2, total=2, sha256=""
    )
    a, b = Score(-1.0, (4, 5), False), Score(-1.0, (4, 6), False)
    figure = summarise(task, [], [[a], [a]], [[a], [b]]).acc
    assert figure.dense is not None
    assert (figure.value, figure.dense.agreement) == (0.0, 0.5)


# ---------- intervals


def test_wilson_is_the_set_of_shares_that_a_z_test_accepts() -> None:
    for right, n in ((0, 5), (3, 10), (50, 100), (10, 10), (670, 1000)):
        low, high = wilson(right / n, n)
        for p, inside in ((low - 1e-6, False), (low + 1e-6, True), (high - 1e-6, True), (high + 1e-6, False)):
            if 0 < p < 1:
                accepted = abs(right / n - p) <= 1.959963984540054 * math.sqrt(p * (1 - p) / n)
                assert accepted == inside, (right, n, p)
        assert 0 <= low <= right / n <= high <= 1


def test_the_paired_interval_is_near_a_bootstrap() -> None:
    generator = torch.Generator().manual_seed(0)
    n, won, lost = 400, 40, 70
    differences = torch.tensor([1.0] * won + [-1.0] * lost + [0.0] * (n - won - lost))
    drawn = torch.randint(0, n, (4000, n), generator=generator)
    ends = differences[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]))
    found = paired(won / n, lost / n, n)
    assert list(found) == pytest.approx(ends.tolist(), abs=0.006)


@pytest.mark.parametrize(("p_won", "p_lost"), [(0.1, 0.1), (0.02, 0.08), (0.3, 0.1)])
def test_the_paired_interval_covers_the_truth(p_won: float, p_lost: float) -> None:
    generator = torch.Generator().manual_seed(1)
    n, runs = 100, 2000
    cells = torch.multinomial(torch.tensor([p_won, p_lost, 1 - p_won - p_lost]), n * runs, True, generator=generator)
    cells = cells.view(runs, n)
    won, lost = (cells == 0).sum(1) / n, (cells == 1).sum(1) / n
    ends = [paired(float(w), float(x), n) for w, x in zip(won, lost, strict=True)]
    covered = sum(e.low <= p_won - p_lost <= e.high for e in ends) / runs
    assert 0.935 < covered < 0.985


def test_the_paired_interval_at_its_ends() -> None:
    assert list(paired(0, 0, 98)) == pytest.approx([-1.959963984540054 / 100, 1.959963984540054 / 100])
    assert list(paired(0.3, 0.1, 50)) == pytest.approx([-end for end in paired(0.1, 0.3, 50)][::-1])
    low, high = paired(1, 0, 20)
    assert 0 < low < 1 == high


def test_groups_weigh_the_same() -> None:
    assert grouped_mean([1, 0, 0, 0, 1], ["a", "b", "b", "b", "b"]) == pytest.approx((1 + 0.25) / 2)
    assert effective_items(["a"] * 5 + ["b"] * 5) == pytest.approx(10)
    assert effective_items(["a"] * 1 + ["b"] * 9) == pytest.approx(4 / (1 + 1 / 9))


# ---------- the command


def test_eval_with_tasks(tmp_path: Path) -> None:
    folder, dense = small_model(tmp_path / "m"), small_model(tmp_path / "d", seed=1)
    files = write_all(tmp_path / "tasks")
    write_lines(files / "other.jsonl", [{"question": "?"}])
    text = tmp_path / "text.txt"
    text.write_text("words and words " * 200)
    command = ("eval", folder, "--against", dense, "--no-speed", "--text", text, "--windows", "1", "--length", "32")
    answer = call(*command, "--tasks", files, "--task-limit", "3", "--json")
    assert answer.code == 0, answer.err
    found = answer.json
    assert [(t["task"], t["items"], t["items_in_file"]) for t in found["tasks"]] == [
        ("blimp", 3, 5), ("choice", 3, 5), ("lambada", 3, 3), ("winogrande", 2, 2),
    ]  # fmt: skip
    assert set(found["tasks"][0]["acc"]["interval"]) == {"low", "high"}
    assert found["tasks"][0]["acc"]["dense"]["agreement_interval"]["high"] <= 1
    assert found["tasks_skipped"][0]["file"].endswith("other.jsonl")
    words = load_tokenizer(folder)
    models = [load_model(resolve(str(f)), torch.device("cpu"), torch.float32) for f in (folder, dense)]
    again = spectrim.evaluate_tasks(models[0], words, files, dense=models[1], limit=3)
    assert [r.acc.value for r in again] == [t["acc"]["value"] for t in found["tasks"]]
    assert json.loads(json.dumps(dataclasses.asdict(again[0])))["seed"] == 0

    table = call(*command, "--tasks", f"{files / 'choice.jsonl'},{files / 'blimp.jsonl.xz'}", "--task-limit", "4")
    assert table.code == 0, table.err
    for part in ("acc_norm", "acc, morphology", "choice: 4 of 5 items, drawn with seed 0", "agreement"):
        assert part in table.out


def test_eval_refuses_bad_tasks_before_it_loads_a_model(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [ALL["choice"][0], {**ALL["choice"][1], "gold": 9}])
    answer = call("eval", "/nowhere/model", "--tasks", path)
    assert (answer.code, answer.out) == (3, "")
    assert "x.jsonl, line 2: 'gold' is 9; it must be a whole number from 0 to 1" in answer.message
    answer = call("eval", "/nowhere/model", "--tasks", tmp_path / "none.jsonl")
    assert (answer.code, "none.jsonl: no such file or folder" in answer.message) == (3, True)
    answer = call("eval", "/nowhere/model", "--task-limit", "5")
    assert (answer.code, "--task-limit applies to --tasks" in answer.message) == (2, True)
    answer = call("eval", "/nowhere/model", "--tasks", path, "--task-limit", "0")
    assert answer.code == 2
