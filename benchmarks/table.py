"""Markdown table of a results file: `python benchmarks/table.py benchmarks/results/reference-h200.json`."""

import json
import sys
from pathlib import Path

TEXTS = ("wikitext2", "valid.wiki", "novels")


def main() -> None:
    """One line a row: perplexities, KL on the last text, counted keep, seconds."""
    data = json.loads(Path(sys.argv[1]).read_text())
    hardware = data["environment"]
    print(
        f"{data['model']}; GPU {hardware['gpu']}, torch {hardware['torch']}, transformers {hardware['transformers']}\n"
    )
    print("| method | keep | wikitext2 / valid.wiki / novels | KL, agreement (novels) | counted keep | seconds |")
    print("|---|---|---|---|---|---|")
    for row in sorted(data["rows"], key=lambda r: -r["keep"]):
        figures = " / ".join(f"{row[name]:.2f}" for name in TEXTS)
        kl = f"{row['novels.kl']:.4f}, {row['novels.agreement']:.3f}" if row.get("novels.kl") is not None else ""
        cells = [row["label"], f"{row['keep']:g}", figures, kl, f"{row['counted']:.5f}", f"{row['seconds']:.1f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
