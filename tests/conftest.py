"""What holds for every test: one thread, seeded property tests, silent libraries, skips with a reason."""

import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by transformers when it is first imported

import pytest
import torch
from hypothesis import settings

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

settings.register_profile("spectrim", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("spectrim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `shared` on machines without the reference material."""
    if SHARED.is_dir():
        return
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=WITHOUT_SHARED))
