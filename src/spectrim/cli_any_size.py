"""`spectrim compress --any-size`: one run for all sizes."""

from pathlib import Path
from typing import Any

from spectrim.cli_options import say_written
from spectrim.terminal import emit, print_table, progress_printer


def compress_any_size(request: Any, out: Path, overwrite: bool, options: Any, json_: bool) -> dict[str, Any]:
    """Run, print, and give back the report."""
    from spectrim.any_size_job import run_any_size
    from spectrim.report.any_size import size_header, size_table

    report = run_any_size(request, out, overwrite=overwrite, options=options, progress=progress_printer(json_))

    def show() -> None:
        print_table(f"{request.model}, {report['method']['method']}", size_header(report), size_table(report))
        say_written(out, report, f", size_ratio={request.keep:g}")

    emit(report, json_, show)
    return report
