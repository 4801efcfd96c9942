"""What holds for every test: one thread, seeded property tests, silent libraries, skips with a reason, and results
that are loaded again in the test's own process.
"""

import gc
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by transformers when it is first imported

import pytest
import torch
from hypothesis import settings

from spectrim import reloaded
from spectrim.integrations import reload

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
WITHOUT_SHARED = "the reference models and texts (../shared) are not part of the repository"

# One thread: results do not depend on the machine's cores, and parallel test runs do not fight over them.
torch.set_num_threads(1)

# Started in the background or by nohup, signals are ignored from the start, which spectrim respects: the tests of
# signals, and the programs that they start, need them as a terminal gives them.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

logging.getLogger().addHandler(logging.NullHandler())  # else warnings go to stderr, into what commands say

settings.register_profile("spectrim", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("spectrim")


def pytest_collection_finish() -> None:
    """What is there now stays: the garbage collector need not look at a million objects of libraries again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _reload_here() -> Iterator[None]:
    """A written folder is loaded again by the same code, without a process that imports torch for five seconds."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        code, err = 0, ""
        with mock.patch.object(sys, "argv", command[2:]):
            try:
                reload.main()
            except Exception:  # what ends the real process with a traceback, whatever it is
                code, err = 1, traceback.format_exc()
        return subprocess.CompletedProcess(command, code, "", err)

    with mock.patch.object(reloaded, "subprocess", SimpleNamespace(run=run)):
        yield


@pytest.fixture(autouse=True)
def _reload(request: pytest.FixtureRequest, _reload_here: None) -> Iterator[None]:
    """Tests marked `fresh_process` do what users do."""
    if request.node.get_closest_marker("fresh_process"):
        with mock.patch.object(reloaded, "subprocess", subprocess):
            yield
    else:
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `shared` on machines without the reference material."""
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=WITHOUT_SHARED))
