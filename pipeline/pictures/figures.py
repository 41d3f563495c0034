"""Pictures with matplotlib, if it is there: figures, the bytes of a file, curves of a training."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.commit import write_bytes_atomically
from teacher_cache.cache.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_AN_INCH = 150
CURVE_COLUMNS = 3
PANEL_INCHES = (3.4, 2.2)
HELD_OUT = "eval_"
# What stands in the Trainer's log and is no curve: where it is, and the clock.
NOT_CURVES = ("step", "epoch", "total_flos", "train_loss")  # the last is the mean of all steps
CLOCK = ("runtime", "per_second")
FIRST = "loss"
COLOURS = {"training": "C0", "held out": "C1"}

Curve = Sequence[tuple[int, float]]
"""(optimizer step, value)."""


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


def curves_of(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """Curves by panel, the loss first, then by whether they are of `training` or `held out`.

    Args:
        log: entries of transformers' Trainer, each with its `step`; held-out figures begin with
            `eval_`.
    """
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for entry in log:
        for name, value in entry.items():
            if is_clock(name) or name in NOT_CURVES or not isinstance(value, int | float):
                continue
            side = "held out" if name.startswith(HELD_OUT) else "training"
            panel = panels.setdefault(name.removeprefix(HELD_OUT), {})
            panel.setdefault(side, []).append((int(entry["step"]), float(value)))
    names = sorted(panels, key=lambda name: name != FIRST)
    return {name: {side: tuple(curve) for side, curve in panels[name].items()} for name in names}


def is_clock(name: str) -> bool:
    """Whether a logged figure is of the machine's speed."""
    return name.endswith(CLOCK)


def curves_figure(panels: Mapping[str, Mapping[str, Curve]]) -> Figure:
    """Draw them, a panel each, over optimizer steps.

    Args:
        panels: at least one.

    Raises:
        UserError: if matplotlib is missing.
    """
    columns = min(CURVE_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1])
    grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axes, (name, sides) in zip(grid, panels.items(), strict=False):
        for side, curve in sides.items():
            steps, values = zip(*curve, strict=True)
            # A line of one point would not be seen.
            marker = "o" if side == "held out" or len(curve) == 1 else None
            axes.plot(steps, values, label=side, color=COLOURS[side], marker=marker, markersize=3.0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("optimizer step", fontsize=8)
    return figure
