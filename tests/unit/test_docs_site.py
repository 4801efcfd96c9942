"""The documents as a whole: links lead somewhere, site and llms.txt know every page, quoted figures are the source's.

`make docs` builds the site itself; what is here needs no mkdocs.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from snippets import PAGES, ROOT

sys.path.insert(0, str(ROOT / "docs"))
import hooks

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
DOCUMENTS = [*PAGES, ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
LLMS = (ROOT / "llms.txt").read_text()
DECIMAL = re.compile(r"(?<![\w.])\d*\.\d{2,}")


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def headings(page: Path) -> set[str]:
    """The anchors that readers of Markdown make of headings."""
    lines = re.sub(r"^ *```.*?^ *```\s*$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", lines, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", DOCUMENTS, ids=relative)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for match in hooks.LINKS.finditer(page.read_text()):
        link = match["target"]
        if link is None or ":" in link:
            continue
        target = hooks.target_of(link, relative(page))
        path = page if target is None else ROOT / target
        assert path.is_file(), f"{link}: no such file"
        anchor = link.partition("#")[2]
        assert not anchor or anchor in headings(path), f"{link}: no such heading"


# ---------- the site


def places(nav: Any) -> Iterator[str]:
    """All pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from places(entry)


def test_the_navigation_has_every_page_once() -> None:
    listed = list(places(SITE["nav"]))
    assert len(listed) == len(set(listed))
    assert {hooks.in_site(relative(page)) for page in DOCUMENTS} == set(listed)
    assert {hooks.in_repository(place) for place in listed} == {relative(page) for page in DOCUMENTS}


def test_links_are_those_of_the_site() -> None:
    text = "[a](../README.md#use) [b](soco.md) [c](../benchmarks/results/x.json) `[d](e.md)` [f](https://g) [h](#i)"
    said = "[a](index.md#use) [b](soco.md) [c](benchmarks/results/x.json) `[d](e.md)` [f](https://g) [h](#i)"
    assert hooks.relinked(text, "docs/start.md") == said
    assert (
        hooks.relinked("[a](../soco.md) [b](0002-any-size.md)", "docs/adr/0001.md")
        == "[a](../soco.md) [b](0002-any-size.md)"
    )
    assert hooks.relinked("[a](../docs/tasks.md)", "benchmarks/README.md") == "[a](../tasks.md)"
    assert hooks.relinked("[a](docs/tasks.md) [b](benchmarks/README.md)", "llms.txt", built=True) == (
        "[a](tasks.html) [b](benchmarks/index.html)"
    )
    block = "```bash\n[a](../README.md)\n```"
    assert hooks.relinked(block, "docs/start.md") == block


def test_figures_that_stand_together_stay_together() -> None:
    assert hooks.held_together("29.47 / 22.51 / .32, a / b") == "29.47\u00a0/\u00a022.51\u00a0/\u00a0.32, a / b"
    assert hooks.held_together("take `--preset fast` or `svd`") == "take `--preset fast`{ .option } or `svd`"
    block = "```text\n1 / 2 `--a`\n```"
    assert hooks.held_together(block) == block


# ---------- llms.txt


def test_llms_txt_has_the_form_of_llmstxt_org() -> None:
    """A title, a summary as a quotation, text without headings, then sections that are lists of links."""
    head, *sections = re.split(r"^## ", LLMS, flags=re.MULTILINE)
    assert re.match(r"# \w+\n\n> \S", head)
    assert head.count("\n# ") == 0
    assert len(sections) >= 3
    for section in sections:
        title, *lines = section.strip().splitlines()
        assert title
        assert lines[0] == ""
        wrong = [line for line in lines[1:] if not re.fullmatch(r"- \[[^\]]+\]\([^)\s]+\)(: .+)?", line)]
        assert wrong == [], title


def test_llms_txt_links_to_what_exists() -> None:
    linked = hooks.targets(LLMS, "llms.txt")
    assert len(linked) > 20
    assert [target for target in linked if not (ROOT / target).is_file()] == []


# ---------- figures that are quoted


def parts(page: Path) -> Iterator[str]:
    """Paragraphs, entries of lists, rows of tables: what a link beside a figure belongs to."""
    for paragraph in page.read_text().split("\n\n"):
        yield from re.split(r"\n(?=\||- )", paragraph)


def test_figures_of_the_page_for_choosing_stand_where_it_links_to() -> None:
    page = ROOT / "docs" / "choose.md"
    seen = 0
    for part in parts(page):
        sources = [ROOT / target for target in sorted(hooks.targets(part, relative(page)))] or [ROOT / "README.md"]
        texts = [source.read_text() for source in sources]
        for figure in DECIMAL.findall(part):
            seen += 1
            assert any(re.search(rf"(?<![\d.]){re.escape(figure)}", text) for text in texts), f"{figure} in: {part}"
        for triple in re.findall(r"[\d.]+ / [\d.]+ / [\d.]+\d", part):
            assert any(triple in text for text in texts), f"{triple} in: {part}"
    assert seen > 50
