"""WikiText's lines joined to its articles.

WikiText comes as a table of lines (or a file of them): an article's title (` = Emma = `), headings
(` = = Plot = = `), paragraphs, and empty lines between. A line alone is no document: a heading is
cut from its text, a paragraph from what it goes on from. So the document is the article, title and
headings included, its text that of the original file. What stands before the first title belongs
to the first article.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from teacher_cache.cache.errors import UserError

# One `=` on each side; a heading of a lower level has more.
_TITLE = re.compile(r"= (?!=)(?:.*[^ =]|[^ =]) =")


def join_articles(lines: Iterable[str | None]) -> list[str]:
    """Articles of lines in their order.

    Args:
        lines: with or without their line breaks; None is an empty one.

    Raises:
        UserError: if no line is a title.
    """
    read = [_line(one) for one in lines]
    is_empty = [not one.strip() for one in read]
    starts = [
        i
        for i, line in enumerate(read)
        # A title stands alone; a paragraph may look like one.
        if _TITLE.fullmatch(line.strip())
        and (i == 0 or is_empty[i - 1])
        and (i + 1 == len(read) or is_empty[i + 1])
    ]
    if not starts:
        raise UserError(
            "--txt-unit article joins WikiText's lines to articles, and no line is a title, as in "
            "` = Emma = `: give another unit"
        )
    ends = [*starts[1:], len(read)]
    return ["".join(read[start:end]) for start, end in zip([0, *starts[1:]], ends, strict=True)]


def _line(text: str | None) -> str:
    """As in the original file, where an empty line is a space; tables keep it as no text."""
    return f"{(text or '').rstrip(chr(10)) or ' '}\n"
