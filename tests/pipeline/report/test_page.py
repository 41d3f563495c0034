"""The page's HTML: escaped, complete in itself."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

from rich.table import Table

from teacher_cache.pipeline.report.report import Picture, Section, page_of


class Read(HTMLParser):
    """Tags that are open at the end, cells' words, addresses of pictures and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_tables_are_those_of_the_terminal() -> None:
    table = Table("model", title="<models> & more")
    table.add_column("accuracy", justify="right")
    table.add_row("<b>tiny</b>", "81.5")
    text = page_of("a < b", [Section(title="T", notes=["1 < 2"], tables=[table])])
    read = Read(text)
    assert read.open == [] and read.cells == ["model", "accuracy", "<b>tiny</b>", "81.5"]
    assert '<td class="number">81.5</td>' in text and "<td>&lt;b&gt;" in text
    assert "<caption>&lt;models&gt; &amp; more</caption>" in text
    assert "<title>a &lt; b</title>" in text and "1 &lt; 2" in text


def test_a_table_without_headings() -> None:
    table = Table(show_header=False)
    table.add_column("setting")
    table.add_row("[red]lr[/red]")
    text = page_of("t", [Section(title="s", tables=[table])])
    assert "<thead>" not in text and "<caption>" not in text
    assert Read(text).cells == ["[red]lr[/red]"]


def test_pictures_lie_in_the_page() -> None:
    data = bytes(range(256))
    picture = Picture(caption='of "it"', kind="png", data=data)
    text = page_of("t", [Section(title="s", pictures=[picture])])
    own, source = Read(text).addresses
    assert own == "#s1" and source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.partition(",")[2]) == data
    assert "of &#34;it&#34;" in text
