"""The page: sections of notes, tables and pictures as one HTML text."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from rich.table import Table

MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}
TEMPLATE = "page.html.jinja"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture, which lies in the page itself.

    Attributes:
        caption: what it shows.
        kind: png or svg.
        data: of the file.
    """

    caption: str
    kind: str
    data: bytes

    @property
    def uri(self) -> str:
        """The whole file as an address."""
        return f"data:{MEDIA_TYPES[self.kind]};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: above it.
        notes: sentences.
        tables: as the terminal shows them.
        pictures: behind the tables.
    """

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole page; every text is escaped.

    Args:
        title: of the page.
        sections: in the order of reading.
    """
    # Always: jinja's own choice goes by the ending of a file's name, and a string has none.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files(__package__ or "").joinpath(TEMPLATE).read_text(encoding="utf-8")
    shown = [
        {
            "title": one.title,
            "notes": one.notes,
            "tables": [_words(table) for table in one.tables],
            "pictures": one.pictures,
        }
        for one in sections
    ]
    return environment.from_string(source).render(title=title, sections=shown)


def _words(table: Table) -> dict[str, object]:
    """A terminal's table as words."""
    columns = table.columns
    return {
        "title": str(table.title or ""),
        "headings": [str(one.header) for one in columns] if table.show_header else [],
        "numeric": [one.justify == "right" for one in columns],
        "rows": list(zip(*([str(cell) for cell in one.cells] for one in columns), strict=True)),
    }
