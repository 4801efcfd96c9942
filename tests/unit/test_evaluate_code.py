"""The share of completions that parse: prompts, where a completion ends, what is accepted."""

import pytest

from spectrim.data import load_tokenizer
from spectrim.evaluate import code
from spectrim.evaluate.code import complete, function_body, function_prompts, parse_share, parses
from spectrim.models.load import load_model, pick_device, resolve

SOURCE = '''
import os

def plain(a, b=2):
    """What it does.

    In two paragraphs.
    """
    return a + b

def bare(a):
    return a

def only_a_docstring():
    """Nothing else."""

@cached
def decorated():
    "Short."
    return 1

class Kept:
    def method(self):
        """Not at the top level."""
        return 1
'''
PROMPT = 'def f(a):\n    """Doc."""\n'


def test_prompts_are_headers_and_docstrings_of_top_level_functions_with_a_body():
    found = list(function_prompts(SOURCE))
    assert found == [
        'def plain(a, b=2):\n    """What it does.\n\n    In two paragraphs.\n    """\n',
        'def decorated():\n    "Short."\n',
    ]
    assert list(function_prompts("def broken(:\n")) == []


@pytest.mark.parametrize(
    ("completion", "cut_off", "body"),
    [
        ("    return a\n\ndef g():\n    pass\n", False, "    return a\n\n"),
        ("    return a\n    x = (", True, "    return a\n"),
        ("    return a\n    x = 1", False, "    return a\n    x = 1"),
        ("    if a:\n\n        b\n", True, "    if a:\n\n        b\n"),
        ("", True, ""),
        ("no indent\n", False, ""),
    ],
)
def test_a_body_ends_where_the_function_does(completion, cut_off, body):
    assert function_body(completion, cut_off=cut_off) == body


@pytest.mark.parametrize(
    ("completion", "accepted"),
    [
        ("    return a\n", True),
        ("    return a\n    x = (", True),  # the unfinished line is the token limit's doing
        ("    return (a\n", False),
        ("      return a\n", False),  # indented deeper than the docstring
        ("    if a:\n", False),
        ("\n\n", False),
        ("def g():\n    pass\n", False),
        ("    return a\nrubbish rubbish\n", True),  # after the function
    ],
)
def test_what_is_accepted(completion, accepted):
    assert parses(PROMPT, completion, cut_off=True) is accepted


def test_the_share_is_over_all_prompts(monkeypatch):
    answers = iter(["    return a\n", "    return (\n", "    pass\n", ""])
    monkeypatch.setattr(code, "complete", lambda *_a, **_k: next(answers))
    assert parse_share(None, None, [PROMPT] * 4) == 0.5
    with pytest.raises(ValueError, match="at least one prompt"):
        parse_share(None, None, [])


def test_a_real_model_completes_the_same_way_twice():
    source = resolve("builtin:tiny")
    model, tokenizer = load_model(source, pick_device("cpu")), load_tokenizer(source.folder)
    first = complete(model, tokenizer, PROMPT, tokens=6)
    assert first == complete(model, tokenizer, PROMPT, tokens=6)
    assert 1 <= len(tokenizer(first, add_special_tokens=False)["input_ids"]) <= 8
