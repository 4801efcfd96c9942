"""The blocks of code in the documents: found, and what stands in comments before them.

A comment before a block says what is special about it:

    <!-- snippet: file mine.yaml -->        the block is a file of this name, which later blocks of the page read
    <!-- snippet: not run, REASON -->       it is parsed like any other, but no test runs it
"""

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\s*$")
MARK = re.compile(r"^\s*<!-- snippet: (?P<kind>file|not run)(?:,| )\s*(?P<value>.+?) -->\s*$")
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
ASSIGNMENT = re.compile(r"^[A-Z_]+=\S*$")


@dataclass(frozen=True)
class Snippet:
    """A block of code: `line` is that of its fence, `file` and `not_run` are what a comment before it says."""

    page: Path
    line: int
    language: str
    text: str
    file: str | None = None
    not_run: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        """The words of every command of a block of shell, without comments and settings of the environment."""
        joined = self.text.replace("\\\n", " ")
        lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words_after_settings(words) for words in lines if words]


def words_after_settings(words: list[str]) -> list[str]:
    """`OMP_NUM_THREADS=1 spectrim plan` without its first word."""
    start = next(place for place, word in enumerate(words) if not ASSIGNMENT.match(word))
    return words[start:]


def read_snippets(page: Path) -> list[Snippet]:
    """All fenced blocks of a page, in order. A mark with no block after it, or an unknown one, is an error."""
    found: list[Snippet] = []
    mark: re.Match[str] | None = None
    lines = page.read_text(encoding="utf-8").splitlines()
    place = 0
    while place < len(lines):
        line = lines[place]
        fence = FENCE.match(line)
        if fence is None:
            if mark is not None and line.strip():
                raise ValueError(f"{page}:{place + 1}: the mark before this line is not followed by a block")
            if "<!-- snippet" in line:
                mark = MARK.match(line)
                if mark is None:
                    raise ValueError(f"{page}:{place + 1}: unknown mark {line.strip()}")
            place += 1
            continue
        end = next(n for n in range(place + 1, len(lines)) if lines[n].strip() == "```")
        kind, value = (mark["kind"], mark["value"]) if mark else (None, None)
        found.append(
            Snippet(
                page=page,
                line=place + 1,
                language=fence["language"],
                text=textwrap.dedent("\n".join(lines[place + 1 : end])),
                file=value if kind == "file" else None,
                not_run=value if kind == "not run" else None,
            )
        )
        mark, place = None, end + 1
    return found


def inline_code(page: Path) -> list[str]:
    """What stands between single backquotes, outside of blocks."""
    blocks = re.compile(r"^ *```.*?^ *```\s*$", re.MULTILINE | re.DOTALL)
    return INLINE.findall(blocks.sub("", page.read_text(encoding="utf-8")))
