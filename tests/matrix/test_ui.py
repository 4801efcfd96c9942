"""`spectrim ui` as its user starts it: a program on a free port, its function called by another program, its end.

    tests/matrix/run.sh extras      makes an environment with Gradio and runs this file in it

Skipped where Gradio (extra `ui`) is not installed. What is computed is in tests/unit/test_sizes_page.py, the page in a
browser in tests/browser/test_sizes.py.
"""

import json
import os
import signal
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from command_line import call
from sizes_server import all_sizes, page_of_sizes

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPT, TEXT = "The history of", "A text of some words to be judged by."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_sizes(tmp_path_factory.mktemp("ui"))


def ask(address: str, *given: Any) -> tuple[str, Any]:
    """Gradio's own way of calling: what was the event, and its data."""
    asked = urllib.request.Request(
        f"{address}gradio_api/call/compare", json.dumps({"data": given}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=60) as answer:
        number = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/compare/{number}", timeout=120) as answer:
        lines = answer.read().decode().strip().splitlines()
    return lines[-2].removeprefix("event: "), json.loads(lines[-1].removeprefix("data: "))


def test_the_page_answers_and_ends(folder: Path) -> None:
    with page_of_sizes(folder) as (process, address):
        assert address.startswith("http://127.0.0.1:")
        event, (found,) = ask(address, 0.5, PROMPT, TEXT, 8)
        assert event == "complete"
        figures = {name: (full, small) for name, full, small in found["figures"]}
        assert figures["kept of the decoder's linear layers"][0] == "1.0000"
        assert 0.49 < float(figures["kept of the decoder's linear layers"][1]) <= 0.5
        assert float(figures["perplexity of your text"][1]) > float(figures["perplexity of your text"][0]) > 1
        asked = ("--size", 0.5, "--prompt", PROMPT, "--max-new-tokens", 8, "--device", "cpu", "--json")
        assert found["chosen"] == call("generate", folder, *asked).json["text"]
        event, _ = ask(address, 0.5, "", TEXT, 8)  # an empty prompt: an error on the page, and the program goes on
        assert event == "error"
        assert ask(address, 0.7, PROMPT, "", 2)[0] == "complete"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert "the page is closed" in process.stderr.read()


def test_a_port_in_use_is_said(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with page_of_sizes(folder, "--port", str(port)) as (process, _):
            assert process.wait(120) == 4
            assert process.stderr is not None
            assert f"port {port}" in process.stderr.read()


def test_nothing_is_reported_and_the_environment_says_so(folder: Path) -> None:
    assert os.environ.get("GRADIO_ANALYTICS_ENABLED") is None  # it is spectrim that switches it off
    with page_of_sizes(folder) as (_, address), urllib.request.urlopen(f"{address}config", timeout=60) as answer:
        assert json.load(answer)["analytics_enabled"] is False
