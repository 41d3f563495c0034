"""The page's parts, and the page of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from rich.table import Table as TerminalTable

from teacher_cache.pipeline.report.figures import Series, swatch

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Cell:
    """Words, and smaller ones below them."""

    text: str
    small: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells.

    Attributes:
        caption: what it is of.
        headings: of the columns; none of a table of names and values.
        rows: as many cells each; the first names the row.
        left: columns of words, besides the first.
        is_stacked: whether a narrow page shows each row as a list of its own.
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: Sequence[int] = ()
    is_stacked: bool = False

    kind = "table"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture with its legend, what it says in words, and its values.

    Attributes:
        caption: what it is of, and what to see.
        svg: the picture.
        legend: its series, where there are several.
        values: of the picture.
        is_wide: whether a narrow window scrolls it, where others shrink.
    """

    caption: str
    svg: Markup
    legend: Sequence[Series] = ()
    values: Table
    is_wide: bool = False

    @property
    def swatches(self) -> list[tuple[Markup, str]]:
        """Looks and names."""
        return [(swatch(one), one.name) for one in self.legend]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures beside one another, as many as there is room for."""

    of: Sequence[Figure]

    kind = "figures"


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Narrow tables beside one another."""

    of: Sequence[Table]

    kind = "tables"


@dataclass(frozen=True, kw_only=True)
class Quotes:
    """Texts, each with what is said of it: (who, what) below it."""

    title: str
    of: Sequence[tuple[str, Sequence[tuple[str, str]]]]

    kind = "quotes"


@dataclass(frozen=True)
class Note:
    """A sentence."""

    text: str

    kind = "note"


@dataclass(frozen=True, kw_only=True)
class Code:
    """What is typed, or a file."""

    title: str
    text: str

    kind = "code"


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Parts that are there for who asks."""

    title: str
    of: Sequence[Part]

    kind = "folded"


Part = Table | Tables | Figures | Quotes | Note | Code | Folded


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        title: the heading.
        name: of its link.
        parts: in the order of reading.
    """

    title: str
    name: str
    parts: Sequence[Part]


def page_of(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The whole page; every text is escaped.

    Args:
        title: of the page.
        lead: the result in a sentence or two.
        sections: in the order of reading; those without parts are left out.
        foot: the last line.
    """
    # Always: jinja's own choice goes by the ending of a file's name, and a string has none.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files(__package__ or "").joinpath(TEMPLATE).read_text(encoding="utf-8")
    shown = [one for one in sections if one.parts]
    template = environment.from_string(source)
    return template.render(title=title, lead=lead, sections=shown, foot=foot)


def of_terminal(table: TerminalTable, caption: str = "") -> Table:
    """A terminal's table; columns that it sets to the left stay there."""
    columns = table.columns
    cells = [[Cell(str(cell)) for cell in one.cells] for one in columns]
    return Table(
        caption=caption or str(table.title or ""),
        headings=[str(one.header) for one in columns] if table.show_header else (),
        rows=list(zip(*cells, strict=True)),
        left=[i for i, one in enumerate(columns) if i and one.justify != "right"],
    )
