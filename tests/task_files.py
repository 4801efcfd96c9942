"""A few made-up items of each task format, and how they become files."""

import json
import lzma
from pathlib import Path
from typing import Any

CHOICE: list[dict[str, Any]] = [
    {
        "id": "a",
        "ctx": "Question: What do bees make?\nAnswer:",
        "choices": [" honey", " a long wall", " ice"],
        "gold": 0,
    },
    {"id": "b", "ctx": "Question: Where do fish live?\nAnswer:", "choices": [" in the sky", " in water"], "gold": 1},
    {"id": "c", "ctx": "To open the jar, ", "choices": ["turn the lid", "paint the lid blue and wait"], "gold": 0},
    {"id": 4, "ctx": "", "choices": [" The sun is warm.", " Warm is sun the."], "gold": 0},
    {"id": "e", "ctx": "Ein kühler Tag:", "choices": [" schön", " schön", " nass"], "gold": 1},
]
WINOGRANDE = [
    {"id": "a", "ctxs": ["The box did not fit because the box", "The box did not fit because the bag"],
     "cont": " was too large.", "gold": 0},
    {"id": "b", "ctxs": ["Ann thanked Eve because Ann", "Ann thanked Eve because Eve"],
     "cont": " had helped.", "gold": 1},
]  # fmt: skip
LAMBADA = [
    {"ctx": "He took the key, went to the door and opened the", "target": " door"},
    {"ctx": "She counted: one, two, three, one, two,", "target": " three"},
    {"ctx": "They had never before met an", "target": " hippopotamus"},
]
BLIMP = [
    {"uid": "agreement", "field": "morphology", "term": "t", "good": "The dogs bark.", "bad": "The dogs barks."},
    {"uid": "agreement", "field": "morphology", "term": "t", "good": "A cat sleeps.", "bad": "A cat sleep."},
    {"uid": "agreement", "field": "morphology", "term": "t", "good": "These men run.", "bad": "This men run."},
    {"uid": "islands", "field": "syntax/semantics", "term": "t", "good": "Who did you see?", "bad": "Who you did see?"},
    {"uid": "npi", "field": "syntax_semantics", "term": "t", "good": "No one ever left.", "bad": "One ever left no."},
]
ALL = {"choice": CHOICE, "winogrande": WINOGRANDE, "lambada": LAMBADA, "blimp": BLIMP}


def write_lines(path: Path, rows: list[Any]) -> Path:
    """One JSON object a line, packed when the name ends in .xz; a string is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


def write_all(folder: Path) -> Path:
    """A folder with one file of each format, BLiMP packed."""
    folder.mkdir(exist_ok=True)
    for name, rows in ALL.items():
        write_lines(folder / f"{name}.jsonl{'.xz' if name == 'blimp' else ''}", rows)
    return folder
