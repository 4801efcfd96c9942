"""Reading task files: what each format becomes, how a part is drawn, and what is refused with file and line."""

import json
import lzma
from collections import Counter
from pathlib import Path

import pytest

from spectrim.data import tasks as reader
from spectrim.data.tasks import Query, load_tasks, read_task, sample
from spectrim.errors import InputError, UsageError
from task_files import ALL, BLIMP, CHOICE, LAMBADA, WINOGRANDE, write_all, write_lines


def test_a_folder_with_every_format(tmp_path: Path) -> None:
    loaded = load_tasks(write_all(tmp_path / "tasks"))
    assert loaded.skipped == []
    assert [(t.name, t.format, len(t.items), t.total, t.seed) for t in loaded.tasks] == [
        (name, name, len(ALL[name]), len(ALL[name]), None) for name in ("blimp", "choice", "lambada", "winogrande")
    ]


def test_what_the_formats_become(tmp_path: Path) -> None:
    tasks = {task.name: task.items for task in load_tasks(write_all(tmp_path / "tasks")).tasks}
    first = tasks["choice"][0]
    assert first.queries[1] == Query(CHOICE[0]["ctx"], " a long wall")
    assert (first.gold, first.lengths) == (0, (5, 11, 3))  # without the leading space, as the harness counts
    assert tasks["choice"][2].lengths == (12, 27)
    assert tasks["winogrande"][1].queries[1] == Query(WINOGRANDE[1]["ctxs"][1], " had helped.")
    assert tasks["lambada"][0].queries == (Query(LAMBADA[0]["ctx"], " door"),)
    assert tasks["blimp"][0].queries == (Query("", " The dogs bark."), Query("", " The dogs barks."))
    assert [item.field for item in tasks["blimp"]][-2:] == ["syntax_semantics"] * 2
    assert [item.line for item in tasks["blimp"]] == [1, 2, 3, 4, 5]


def test_blank_lines_count_as_lines_and_packing_changes_nothing(tmp_path: Path) -> None:
    task = read_task(write_lines(tmp_path / "x.jsonl", [CHOICE[0], "", "  ", CHOICE[1]]))
    assert [item.line for item in task.items] == [1, 4]
    plain = read_task(write_lines(tmp_path / "y.jsonl", BLIMP))
    packed = read_task(write_lines(tmp_path / "y.jsonl.xz", BLIMP))
    assert (plain.name, plain.items, plain.sha256) == (packed.name, packed.items, packed.sha256)


def test_a_drawn_part_is_even_over_groups_in_order_and_seeded(tmp_path: Path) -> None:
    rows = [{**BLIMP[0], "uid": f"u{i % 7}", "good": f"Number {i}."} for i in range(210)]
    task = read_task(write_lines(tmp_path / "blimp.jsonl", rows))
    part = sample(task, 17, 3)
    assert sorted(Counter(item.group for item in part.items).values()) == [2, 2, 2, 2, 3, 3, 3]
    lines = [item.line for item in part.items]
    assert lines == sorted(set(lines))
    assert (part.total, part.seed) == (210, 3)
    assert sample(task, 17, 3) == part
    assert sample(task, 17, 4).items != part.items
    assert len({item.group for item in sample(task, 5, 0).items}) == 5
    assert sample(task, 210, 0) is task


def test_the_drawn_part_reaches_the_whole_file(tmp_path: Path) -> None:
    rows = [{**LAMBADA[0], "ctx": f"{i} and"} for i in range(50)]
    task = read_task(write_lines(tmp_path / "x.jsonl", rows))
    drawn = Counter(item.line for seed in range(60) for item in sample(task, 10, seed).items)
    assert set(drawn) == set(range(1, 51))
    assert max(drawn.values()) < 30  # 12 expected


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not valid JSON"),
        ("[1]", "holds list, not an object"),
        ('{"id": "a", "id": "b"}', "duplicate key 'id'"),
        ({"id": "x", "ctx": "c", "choices": [" a", " b"]}, "no field 'gold', which every line of a choice file"),
        ({**CHOICE[0], "choices": []}, "'choices' is a list of 0; it must be a list of 2 to 64 strings"),
        ({**CHOICE[0], "choices": [" a"]}, "'choices' is a list of 1"),
        ({**CHOICE[0], "choices": [" a"] * 65}, "'choices' is a list of 65"),
        ({**CHOICE[0], "choices": "ab"}, "'choices' is str"),
        ({**CHOICE[0], "choices": [" a", 3, " b"]}, "choices[1] is int, it must be a string"),
        ({**CHOICE[0], "choices": [" a", " "]}, "choices[1] is empty"),
        ({**CHOICE[0], "ctx": None}, "'ctx' is NoneType"),
        ({**CHOICE[0], "gold": 3}, "'gold' is 3; it must be a whole number from 0 to 2"),
        ({**CHOICE[0], "gold": -1}, "'gold' is -1"),
        ({**CHOICE[0], "gold": True}, "'gold' is True"),
        ({**CHOICE[0], "gold": "0"}, "'gold' is '0'"),
        ({**CHOICE[0], "gold": 1.0}, "'gold' is 1.0"),
    ],
    ids=str,
)
def test_a_bad_line_is_named(line: object, says: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [CHOICE[0], CHOICE[1], line])
    with pytest.raises(InputError) as caught:
        load_tasks(path)
    assert f"{path}, line 3: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**WINOGRANDE[0], "cont": ""}, "'cont' is empty"),
        ({**WINOGRANDE[0], "ctxs": ["a"]}, "'ctxs' is a list of 1"),
        ({**WINOGRANDE[0], "gold": 2}, "'gold' is 2"),
        ({**LAMBADA[0], "target": " "}, "'target' is empty"),
        ({**LAMBADA[0], "ctx": 3}, "'ctx' is int"),
        ({**BLIMP[0], "bad": ""}, "'bad' is empty"),
        ({**BLIMP[0], "uid": None}, "'uid' is NoneType"),
    ],
    ids=str,
)
def test_bad_values_of_the_other_formats(row: object, says: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [row])
    with pytest.raises(InputError, match="line 1: ") as caught:
        load_tasks(path)
    assert says in str(caught.value)


def test_an_unknown_format_is_an_error_for_a_file_and_said_for_a_folder(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = write_lines(tmp_path / "gsm.jsonl", [{"question": "1+1?", "answer": "2"}])
    with pytest.raises(InputError, match=r"gsm\.jsonl, line 1: the keys 'question', 'answer' are of no known format"):
        load_tasks(path)
    loaded = load_tasks(tmp_path)
    assert len(loaded.tasks) == 4
    assert [(s["file"], "of no known format" in s["why"]) for s in loaded.skipped] == [(str(path), True)]
    for name in ("blimp.jsonl.xz", *(f"{name}.jsonl" for name in ("choice", "lambada", "winogrande"))):
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match="no task in"):
        load_tasks(tmp_path)


def test_a_bad_line_in_a_folder_is_never_skipped(tmp_path: Path) -> None:
    path = write_lines(write_all(tmp_path / "t") / "z.jsonl", [CHOICE[0], "{}"])
    with pytest.raises(InputError, match="line 2: no field 'ctx'") as caught:
        load_tasks(tmp_path / "t")
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file or folder"):
        load_tasks(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(InputError, match=r"x\.csv: not a task file by its name"):
        load_tasks(tmp_path / "x.csv")
    with pytest.raises(InputError, match="no task file in this folder"):
        load_tasks(tmp_path)
    with pytest.raises(InputError, match="no items in it"):
        load_tasks(write_lines(tmp_path / "empty.jsonl", []))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.jsonl, line 1: not valid JSON: not UTF-8"):
        load_tasks(tmp_path / "binary.jsonl")
    whole = lzma.compress(json.dumps(CHOICE[0]).encode() * 50)
    for damaged in (whole[: len(whole) // 2], b"not xz at all\n"):
        (tmp_path / "d.jsonl.xz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"d\.jsonl\.xz: damaged or not \.xz data after line 0"):
            load_tasks(tmp_path / "d.jsonl.xz")


@pytest.mark.fault(12, 69)
def test_limits_hold_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "x.jsonl.xz", [CHOICE[0]] * 20)
    monkeypatch.setattr(reader, "FILE_BYTES_MAX", 500)
    with pytest.raises(InputError, match=r"line 5: more than 500 bytes of text"):
        load_tasks(path)
    monkeypatch.undo()
    monkeypatch.setattr(reader, "LINE_BYTES_MAX", 60)
    with pytest.raises(InputError, match="line 1: longer than the 60 bytes"):
        load_tasks(path)
    monkeypatch.undo()
    monkeypatch.setattr(reader, "ITEMS_MAX", 19)
    with pytest.raises(InputError, match="line 20: more than 19 items"):
        load_tasks(path)


def test_wrong_use(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", CHOICE)
    with pytest.raises(UsageError, match="task limit is 0"):
        load_tasks(path, limit=0)
    with pytest.raises(UsageError, match="x given more than once"):
        load_tasks([path, path])
