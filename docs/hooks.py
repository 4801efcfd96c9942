"""What mkdocs does not do by itself: pages and files outside of docs/ that pages link to come along.

The site is the repository with docs/ lifted to its top: README.md is the home page, benchmarks/README.md stays at its
place, and a link to any other file of the repository takes that file along. So links in the sources are those that a
reader of the repository follows, and the site needs no address of a repository.
"""

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"
PAGES = (HOME, "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
"""Pages outside of docs/."""
FENCE = r"^(?P<fence> *```.*?^ *```\s*$)"
LINKS = re.compile(FENCE + r"|(?P<code>`[^`\n]*`)|\]\((?P<target>[^)\s]+)\)", re.DOTALL | re.MULTILINE)
TOGETHER = re.compile(FENCE + r"|(?P<option>(?<!`)`--[^`\n]{1,28}`(?!`))|(?<=\d) / (?=\.?\d)", re.DOTALL | re.MULTILINE)


def in_site(path: str) -> str:
    """The place in the site of a file of the repository."""
    return "index.md" if path == HOME else path.removeprefix("docs/")


def in_repository(path: str) -> str:
    """The other way."""
    if path == "index.md":
        return HOME
    return path if (ROOT / path).exists() else f"docs/{path}"


def target_of(link: str, page: str) -> str | None:
    """The file of the repository that a link on a page of the repository leads to; None for addresses and anchors."""
    path = link.partition("#")[0]
    if not path or ":" in path:
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def targets(text: str, page: str) -> set[str]:
    """All of them."""
    found = (target_of(match["target"], page) for match in LINKS.finditer(text) if match["target"])
    return {target for target in found if target is not None}


def relinked(text: str, page: str, *, built: bool = False) -> str:
    """The text with links as they are between the places of the site, or between its `built` pages."""
    start = posixpath.dirname(in_site(page))

    def place(match: re.Match[str]) -> str:
        target = target_of(match["target"], page) if match["target"] else None
        if target is None:
            return match[0]
        path = posixpath.relpath(in_site(target), start or ".")
        if built:
            path = re.sub(r"[.]md$", ".html", path.replace("README.md", "index.md"))
        anchor = match["target"].partition("#")[1:]
        return f"]({path}{''.join(anchor)})"

    return LINKS.sub(place, text)


def on_files(files: "Files", config: Any) -> "Files":
    """Add the pages outside of docs/, llms.txt, and every other file that some page links to."""
    from mkdocs.structure.files import File  # tests of the links have no mkdocs

    sources = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    linked = {target for page in sources for target in targets((ROOT / page).read_text(encoding="utf-8"), page)}
    outside = {target for target in linked if not target.startswith("docs/")} - set(PAGES)
    for path in (*PAGES, *sorted(outside)):
        if (ROOT / path).is_file():  # a link to what is not there is left to the check of links
            files.append(File.generated(config, in_site(path), abs_src_path=str(ROOT / path)))
    index = relinked((ROOT / "llms.txt").read_text(encoding="utf-8"), "llms.txt", built=True)
    files.append(File.generated(config, "llms.txt", content=index))
    return files


def held_together(text: str) -> str:
    """No line break inside of `29.47 / 22.51 / 32.19` and of short options (site.css): narrow tables scroll instead."""

    def join(match: re.Match[str]) -> str:
        if match["fence"]:
            return match[0]
        return f"{match[0]}{{ .option }}" if match["option"] else "\u00a0/\u00a0"

    return TOGETHER.sub(join, text)


def on_post_build(config: Any, **_: Any) -> None:
    """mkdocs looks at links of pages only."""
    site = Path(config["site_dir"])
    missing = [
        path for path in targets((site / "llms.txt").read_text(encoding="utf-8"), "") if not (site / path).is_file()
    ]
    if missing:
        raise FileNotFoundError(f"llms.txt of the site links to {', '.join(sorted(missing))}")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A page with links as the site has them, and figures in one piece."""
    return held_together(relinked(markdown, in_repository(page.file.src_uri)))
