"""Text to seeded, hashed token windows."""

from spectrim.data.sources import Texts, load_texts
from spectrim.data.tasks import load_tasks
from spectrim.data.windows import (
    Windows,
    calibration_windows,
    evaluation_windows,
    held_out_samples,
    load_tokenizer,
    sample_windows,
)

__all__ = [
    "Texts",
    "Windows",
    "calibration_windows",
    "evaluation_windows",
    "held_out_samples",
    "load_tasks",
    "load_texts",
    "load_tokenizer",
    "sample_windows",
]
