"""Everything that touches disk or untrusted bytes: strict readers, crash-safe writers, checksums.

Needs neither torch nor transformers, so a refused folder is refused in milliseconds.
"""

from spectrim.store.companions import check_companions, copy_companions
from spectrim.store.manifest import verify_manifest, write_manifest
from spectrim.store.reader import (
    Checkpoint,
    TensorInfo,
    check_shapes,
    count_stored,
    open_checkpoint,
    read_header,
    read_json,
)
from spectrim.store.writer import preflight, staged, write_json, write_text

__all__ = [
    "Checkpoint",
    "TensorInfo",
    "check_companions",
    "check_shapes",
    "copy_companions",
    "count_stored",
    "open_checkpoint",
    "preflight",
    "read_header",
    "read_json",
    "staged",
    "verify_manifest",
    "write_json",
    "write_manifest",
    "write_text",
]
