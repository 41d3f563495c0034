"""A page as a reader of HTML finds it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "link", "img", "br", "hr", "input")


class Page(HTMLParser):
    """What a test asks of a page.

    Attributes:
        headings: (level, words) in order.
        sections: all words of each section, by its heading.
        figures: of each figure, which of svg, figcaption and table it has.
        addresses: of links, pictures and the like.
        cells: words of each cell of each table.
        labels: of what is announced by name.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.sections: dict[str, str] = {}
        self.figures: list[set[str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.cells: list[str] = []
        self.scripts = ""
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    @classmethod
    def of(cls, path: Path) -> Page:
        """Read a file."""
        return cls(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "action", "poster"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag in ("h1", "h2", "h3"):
            self.headings.append((int(tag[1]), ""))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "figure":
            self.figures.append(set())
        if "figure" in self.open[:-1] and tag in ("svg", "figcaption", "table"):
            self.figures[-1].add(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] in ("style", "title"):
            return
        if "script" in self.open:
            self.scripts += data
            return
        if self.open[-1] in ("h1", "h2", "h3"):
            level, words = self.headings[-1]
            self.headings[-1] = (level, words + data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        self.words += data
        if "section" in self.open:
            title = next((words for level, words in reversed(self.headings) if level == 2), "")
            if title:
                self.sections[title] = self.sections.get(title, "") + data
