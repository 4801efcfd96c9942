"""Coverage-guided fuzzing of the safetensors header and of strict JSON with atheris (libFuzzer).

    python benchmarks/fuzz_atheris.py header -max_total_time=300
    python benchmarks/fuzz_atheris.py json -max_total_time=300

Needs `pip install atheris`; everything after the target goes to libFuzzer. The readers under test import neither torch
nor transformers, so an environment with atheris alone is enough.
"""

import sys
import tempfile
import types
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[1]
package = types.ModuleType("spectrim")  # not its __init__, which imports transformers
package.__path__ = [str(ROOT / "src" / "spectrim")]
sys.modules["spectrim"] = package

with atheris.instrument_imports(include=["spectrim.store"]):
    from spectrim.errors import InputError
    from spectrim.store.header import read_header
    from spectrim.store.strict_json import parse_object

FILE = Path(tempfile.gettempdir()) / f"fuzz-{id(atheris)}.safetensors"


def header(data: bytes) -> None:
    """A file of these bytes; and one whose length prefix fits them, so that the JSON is reached."""
    for raw in (data, len(data).to_bytes(8, "little") + data):
        FILE.write_bytes(raw)
        try:
            read_header(FILE)
        except InputError:
            continue


def strict_json(data: bytes) -> None:
    """The parser itself."""
    try:
        parse_object(data, where="fuzz")
    except InputError:
        return


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], {"header": header, "json": strict_json}[sys.argv[1]])
    try:
        atheris.Fuzz()
    finally:
        FILE.unlink(missing_ok=True)
