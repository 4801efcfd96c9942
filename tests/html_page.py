"""A page of HTML taken apart: elements, attributes, texts; what is not well formed is an AssertionError."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input", "base", "source", "embed", "col", "area", "track", "wbr"}
LOADS = {
    "script",
    "img",
    "link",
    "iframe",
    "frame",
    "object",
    "embed",
    "audio",
    "video",
    "source",
    "base",
    "form",
    "use",
}
"""Elements that load or run something, or change where things are loaded from."""


class Page(HTMLParser):
    """Every element with its attributes, all texts, all values of <data>."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.elements.append((tag, given))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> where <{self.open[-1]}> is open, line {self.getpos()[0]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        """All text of the body and head, in order."""
        return "".join(self.texts)

    @property
    def attributes(self) -> list[tuple[str, str, str]]:
        """(element, name, value) of all."""
        return [(tag, name, value or "") for tag, given in self.elements for name, value in given.items()]

    def numbers(self) -> set[float]:
        """The exact values of all <data>."""
        return {float(given["value"] or "nan") for tag, given in self.elements if tag == "data"}


def assert_safe_and_whole(page: Page) -> None:
    """Nothing is loaded or run; headings, figures and tables say what they are; links lead to places in the page."""
    assert page.source.startswith("<!DOCTYPE html>")
    assert not {tag for tag, _ in page.elements} & LOADS
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        if name in ("src", "href", "srcset", "xlink:href", "action", "data"):
            assert value.startswith("#"), (tag, name, value)
            assert value[1:] in page.ids
        if name == "style":
            assert "url(" not in value
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    for word in ("@import", "url(", "@font-face", "http"):
        assert word not in style
    assert any(given.get("http-equiv") == "Content-Security-Policy" for _, given in page.elements)
    assert any(given.get("lang") for tag, given in page.elements if tag == "html")
    assert len(page.ids) == len(set(page.ids))
    assert sum(tag == "h1" for tag, _ in page.elements) == 1
    for tag, given in page.elements:
        if tag == "svg":
            assert given.get("role") == "img"
            assert given.get("aria-label")
    captions = sum(tag == "caption" for tag, _ in page.elements)
    assert captions == sum(tag == "table" for tag, _ in page.elements)
