"""What every picture needs: matplotlib, if it is there, and the bytes of a file."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_AN_INCH = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose square panels leave room for what is written around them.

    No window, no global state.

    Raises:
        UserError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "pictures are drawn with matplotlib, which is not installed: "
            "`pip install 'teacher-cache[report]'`"
        ) from error
    return Figure(figsize=(width, height), layout="compressed")


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as a file's bytes.

    Args:
        figure: drawn.
        kind: a format that matplotlib knows: png, svg, pdf, ...
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of scripts that the font lacks
        figure.savefig(buffer, format=kind, dpi=DOTS_AN_INCH)
    return buffer.getvalue()


def write_figure(figure: Figure, path: Path, *, option: str) -> None:
    """Write a figure in the format that the file's ending names.

    Args:
        figure: drawn.
        path: of the picture.
        option: that gave the path, for a message.

    Raises:
        UserError: if matplotlib knows no such format, or the file cannot be written.
    """
    kind = path.suffix.removeprefix(".").lower() or "none"
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(
            f"{option} {path} has the ending {kind!r}, expected one of {', '.join(sorted(known))}"
        )
    write_bytes_atomically(path, rendered(figure, kind))
