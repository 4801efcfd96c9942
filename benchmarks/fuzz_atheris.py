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

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Fuzz one target until libFuzzer stops."""
    import atheris

    if len(sys.argv) < 2 or sys.argv[1] not in ("header", "json"):
        sys.exit("usage: python benchmarks/fuzz_atheris.py header|json [libFuzzer options]")
    package = types.ModuleType("spectrim")  # not its __init__, which imports transformers
    package.__path__ = [str(ROOT / "src" / "spectrim")]
    sys.modules["spectrim"] = package
    with atheris.instrument_imports(include=["spectrim.store"]):
        from spectrim.errors import InputError
        from spectrim.store.header import read_header
        from spectrim.store.strict_json import parse_object

    scratch = tempfile.TemporaryDirectory()
    path = Path(scratch.name) / "fuzz.safetensors"

    def header(data: bytes) -> None:
        """A file of these bytes; and one whose length prefix fits them, so that the JSON is reached."""
        for raw in (data, len(data).to_bytes(8, "little") + data):
            path.write_bytes(raw)
            try:
                read_header(path)
            except InputError:
                continue

    def strict_json(data: bytes) -> None:
        """The parser itself."""
        try:
            parse_object(data, where="fuzz")
        except InputError:
            return

    atheris.Setup([sys.argv[0], *sys.argv[2:]], {"header": header, "json": strict_json}[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
