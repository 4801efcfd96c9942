"""What the page of `spectrim ui` shows, without Gradio: tests/matrix/test_ui.py has the page itself."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from command_line import call, small_model, small_text
from spectrim import any_size_job
from spectrim.data import load_tokenizer
from spectrim.engines.measure import autocast
from spectrim.errors import UsageError
from spectrim.integrations import gradio as our_gradio
from spectrim.integrations.sizes import FULL, Sizes, rows_of
from spectrim.models.load import load_model, resolve

PROMPT, TEXT = "import os", "def read(path):\n    return open(path).read()\n"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All sizes of a small random model."""
    where = tmp_path_factory.mktemp("all")
    with mock.patch.object(any_size_job, "reload_difference", return_value=0.0):
        answer = call(
            *("compress", small_model(where / "model", initializer_range=0.2), "--out", where / "out"),
            *("--any-size", "--method", "svd-llm"),
            *("--keep", "0.8", "--anchors", "0.8,0.5", "--calib", small_text(where / "text.txt"), "--eval", "none"),
            *("--calib-windows", "4", "--calib-length", "32"),
        )
    assert answer.code == 0, answer.err
    return where / "out"


@pytest.fixture(scope="module")
def sizes(folder: Path) -> Sizes:
    return Sizes(resolve(str(folder)), load_tokenizer(folder), CPU)


def test_both_sides_say_what_generate_says(sizes: Sizes, folder: Path) -> None:
    for side, size in zip(sizes.compare(0.6, PROMPT, new_tokens=8), (FULL, 0.6), strict=True):
        asked = ("--size", size, "--prompt", PROMPT, "--max-new-tokens", 8, "--device", "cpu", "--json")
        told = call("generate", folder, *asked)
        assert side.text == told.json["text"]
        assert (side.size, side.quality) == (size, None)


def test_numbers_and_bytes_are_those_of_the_exported_size(sizes: Sizes, folder: Path, tmp_path: Path) -> None:
    full, small = sizes.compare(0.6, PROMPT, new_tokens=1)
    stored = call("export", folder, "--keep", 0.6, "--out", tmp_path / "out", "--json").json["stored"]
    assert (small.numbers, small.bytes, small.keep) == (
        stored["model_numbers"], stored["model_bytes"], stored["keep"],
    )  # fmt: skip
    assert full.keep == 1.0
    assert small.numbers < full.numbers == sizes.at(FULL).num_parameters()


@torch.no_grad()
def test_figures_of_the_text_by_hand(sizes: Sizes, folder: Path) -> None:
    _, small = sizes.compare(0.5, PROMPT, TEXT, new_tokens=1)
    ids = torch.tensor([load_tokenizer(folder).encode(TEXT, add_special_tokens=False)])
    with autocast(CPU):  # as every evaluation
        models = [load_model(resolve(str(folder)), CPU, size=size) for size in (0.5, FULL)]
        log_p, log_q = (model(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in models)
    assert small.quality is not None
    assert small.quality.perplexity == pytest.approx(float((-log_p.gather(-1, ids[0, 1:, None]).mean()).exp()), 1e-5)
    assert small.quality.kl == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()), 1e-4)
    assert small.quality.agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
    assert small.quality.tokens == ids.shape[1] - 1


def test_at_full_size_nothing_differs(sizes: Sizes) -> None:
    full, small = sizes.compare(1, PROMPT, TEXT, new_tokens=4)
    assert (full.text, full.numbers, full.bytes) == (small.text, small.numbers, small.bytes)
    assert full.quality is not None
    assert small.quality is not None
    assert full.quality.perplexity == small.quality.perplexity
    assert (small.quality.kl, small.quality.agreement) == (0.0, 1.0)


def test_two_models_are_held_and_no_more(sizes: Sizes) -> None:
    for size in (0.5, 0.7, FULL, 0.9):
        sizes.compare(size, PROMPT, new_tokens=1)
    assert set(sizes.held) == {FULL, 0.9}
    assert (sizes.smallest, sizes.first) == (0.5, 0.8)


def test_a_program_gets_the_rows_and_the_page_the_same_as_a_table(sizes: Sizes) -> None:
    found = our_gradio.comparison(sizes, 0.5, PROMPT, TEXT, 4.0)
    full, small = sizes.compare(0.5, PROMPT, TEXT, 4)
    assert found == {
        "full": full.text, "chosen": small.text, "figures": [list(row) for row in rows_of(full, small)],
    }  # fmt: skip
    table = our_gradio.table_of([["<b>", "1", "&"]], 0.5)
    assert '<th scope="row">&lt;b&gt;</th><td>1</td><td>&amp;</td>' in table
    assert "size 0.5" in table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0.4, PROMPT, ""), r"size_ratio=0\.4: this folder holds every size from 0\.5 to 1"),
        ((0.5, "", ""), "prompt is empty"),
        ((0.5, "word " * 200, ""), "pass the 128 tokens that the model reads"),
        ((0.5, PROMPT, "a"), "one token; perplexity needs two"),
    ],
)
def test_what_cannot_be_compared(sizes: Sizes, given: tuple[float, str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sizes.compare(*given)


def test_a_folder_of_one_size_is_told_before_a_missing_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(our_gradio, "find_spec", lambda name: None)
    answer = call("ui", folder)
    assert answer.code == 2
    assert "spectrim ui needs gradio: pip install 'spectrim[ui]'" in answer.message
    answer = call("ui", small_model(tmp_path / "model"))
    assert answer.code == 2
    assert "gradio" not in answer.message
    assert "holds one size only" in answer.message
    assert "--any-size" in answer.message
