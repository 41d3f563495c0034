"""Figures as SVG: lines over an axis, and maps of shares.

A figure has the width of a phone, so that its words have one size everywhere; colours are the
page's, which has two sets of them. Series differ by dash and mark too, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
NUM_TICKS = 5
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 2")
LEVELS = 16  # shades of a map
MOST_LABELS = 40  # of a map's side
CELL, LABEL_SIDE = 13, 74

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line.

    Attributes:
        name: in the legend.
        points: (x, y), ascending x; at least one.
        colour: index of the page's colours; -1 is the teacher's.
        is_marked: whether each point has a mark.
        dash: index of the dashes.
    """

    name: str
    points: Sequence[Point]
    colour: int
    is_marked: bool = False
    dash: int = 0


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One of the two.

    Attributes:
        title: with its unit.
        is_log: whether equal steps are equal ratios.
        bounds: both ends; None for those of the points.
        is_percent: whether values are shares, to be read as percentages.
    """

    title: str
    is_log: bool = False
    bounds: tuple[float, float] | None = None
    is_percent: bool = False


def chart(series: Sequence[Series], x: Axis, y: Axis, *, diagonal: bool = False) -> Markup:
    """A line for each series.

    Args:
        series: at least one.
        x: the axis below.
        y: the axis at the left.
        diagonal: whether to draw where y is x.
    """
    xs = _Scale.of(x, [p[0] for one in series for p in one.points], LEFT, WIDTH - RIGHT)
    ys = _Scale.of(y, [p[1] for one in series for p in one.points], HEIGHT - BOTTOM, TOP)
    svg = _svg(WIDTH, HEIGHT)
    for tick, words in ys.ticks:
        at = ys(tick)
        _add(svg, "line", "grid", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at)
        _text(svg, words, LEFT - 6, at + 4, "end")
    for tick, words in xs.ticks:
        _add(svg, "line", "axis", x1=xs(tick), x2=xs(tick), y1=HEIGHT - BOTTOM, y2=HEIGHT - 36)
        _text(svg, words, xs(tick), HEIGHT - 23, "middle")
    _add(svg, "line", "axis", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM)
    _text(svg, x.title, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle")
    turned = f"translate(11 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)"
    _text(svg, y.title, 0, 0, "middle", transform=turned)
    if diagonal:
        low, high = max(xs.low, ys.low), min(xs.high, ys.high)
        _add(svg, "line", "diagonal", x1=xs(low), y1=ys(low), x2=xs(high), y2=ys(high))
    for one in series:
        points = [(xs(px), ys(py)) for px, py in one.points]
        line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        group = _add(svg, "g", colour_class(one.colour))
        _add(group, "polyline", "line", points=line, **_dashed(one.dash))
        for px, py in points if one.is_marked or len(points) == 1 else ():
            _mark(group, one.colour, px, py)
    return _markup(svg)


def swatch(one: Series) -> Markup:
    """A line's look, for the legend."""
    svg = _svg(28, 12)
    group = _add(svg, "g", colour_class(one.colour))
    _add(group, "polyline", "line", points="1,6 27,6", **_dashed(one.dash))
    if one.is_marked:
        _mark(group, one.colour, 14, 6)
    return _markup(svg)


def heat_map(values: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> Markup:
    """A map of shares, [R, S] in 0..1, the largest the darkest; NaN where nothing is.

    Args:
        values: of the cells, shaded by their root: few are large and many small.
        columns: names of the S columns.
        rows: names of the R rows.
    """
    num_rows, num_columns = values.shape
    cell = max(3, min(CELL, (640 - LABEL_SIDE) // num_columns))
    width, height = LABEL_SIDE + cell * num_columns + 2, LABEL_SIDE + cell * num_rows + 2
    svg = _svg(width, height)
    largest = float(np.nanmax(values)) or 1.0
    levels = np.ceil(LEVELS * np.sqrt(np.nan_to_num(values, nan=0.0) / largest)).astype(int)
    body = _add(svg, "g", "map")
    frame = {"width": cell * num_columns, "height": cell * num_rows}
    _add(body, "rect", "frame", x=LABEL_SIDE, y=LABEL_SIDE, **frame)
    for level in range(1, LEVELS + 1):
        places = np.argwhere(levels == level)
        if len(places):
            path = "".join(
                f"M{LABEL_SIDE + cell * c} {LABEL_SIDE + cell * r}h{cell}v{cell}h-{cell}z"
                for r, c in places.tolist()
            )
            _add(body, "path", d=path, opacity=f"{level / LEVELS:.2f}")
    for names, is_row in ((columns, False), (rows, True)):
        step = math.ceil(len(names) / MOST_LABELS) if cell >= 10 else math.ceil(12 / cell)
        for i in range(0, len(names), step):
            along = LABEL_SIDE + cell * (i + 0.5)
            at = (LABEL_SIDE - 4, along + 3) if is_row else (along + 3, LABEL_SIDE - 4)
            word = names[i] if len(names[i]) <= 10 else names[i][:9] + "…"
            if is_row:
                _text(svg, word, *at, "end", size="small")
            else:
                turned = f"translate({at[0]:.1f} {at[1]:.1f}) rotate(-90)"
                _text(svg, word, 0, 0, "start", size="small", transform=turned)
    return _markup(svg)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def of(cls, axis: Axis, values: Sequence[float], start: float, stop: float) -> _Scale:
        finite = [one for one in values if math.isfinite(one)] or [0.0, 1.0]
        low, high = axis.bounds or (min(finite), max(finite))
        if axis.is_percent and low == high:
            low, high = 0.0, 1.0
        if axis.is_log:
            ticks = (
                sorted(set(finite))[:NUM_TICKS]
                if len(set(finite)) <= NUM_TICKS
                else [
                    2.0**i
                    for i in range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
                ]
            )
            if len(ticks) > NUM_TICKS + 1:
                ticks = ticks[:: math.ceil(len(ticks) / NUM_TICKS)]
        else:
            ticks = _ticks(low, high)
            if axis.bounds is None:
                low, high = min(low, ticks[0]), max(high, ticks[-1])
            ticks = [one for one in ticks if low <= one <= high]
        if low == high:
            high = low * 2 if axis.is_log else low + 1
        words = [(one, tick_words(one, ticks, is_percent=axis.is_percent)) for one in ticks]
        return cls(low=low, high=high, start=start, stop=stop, is_log=axis.is_log, ticks=words)

    def __call__(self, value: float) -> float:
        def at(x: float) -> float:
            return math.log(x) if self.is_log else x

        value = min(max(value, self.low), self.high) if math.isfinite(value) else self.high
        share = (at(value) - at(self.low)) / (at(self.high) - at(self.low))
        return self.start + share * (self.stop - self.start)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around and between both."""
    if low == high:
        low, high = low - abs(low or 1.0) / 2, high + abs(high or 1.0) / 2
    rough = (high - low) / (NUM_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * one for one in (1, 2, 2.5, 5, 10) if power * one >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def tick_words(value: float, ticks: Sequence[float], *, is_percent: bool = False) -> str:
    """A tick, with as many places as tell it from its neighbours."""
    if is_percent:
        value, ticks = 100 * value, [100 * one for one in ticks]
    step = min((abs(b - a) for a, b in pairwise(ticks) if a != b), default=1.0)
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places > 4:
        return f"{value:.0e}" if value else "0"
    exact = float(round(step * 10**places, 9)).is_integer()
    return f"{value:,.{places if exact else places + 1}f}"


def colour_class(colour: int) -> str:
    """The page's class of a series' colour."""
    return "teacher" if colour < 0 else f"c{colour % 6}"


def _dashed(dash: int) -> dict[str, str]:
    pattern = DASHES[dash % len(DASHES)]
    return {"stroke-dasharray": pattern} if pattern else {}


def _mark(group: ET.Element, colour: int, x: float, y: float) -> None:
    """A circle, a square, a triangle or a diamond."""
    if colour % 4 == 0:
        _add(group, "circle", "mark", cx=x, cy=y, r=3)
    elif colour % 4 == 1:
        _add(group, "rect", "mark", x=x - 2.8, y=y - 2.8, width=5.6, height=5.6)
    elif colour % 4 == 2:
        _add(group, "path", "mark", d=f"M{x:.1f} {y - 3.6:.1f}l3.6 6.4h-7.2z")
    else:
        _add(group, "path", "mark", d=f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4-4z")


def _svg(width: float, height: float) -> ET.Element:
    # What it shows stands in words and numbers beside it, so readers of screens pass it over.
    size = {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height)}
    return ET.Element("svg", {**size, "aria-hidden": "true", "focusable": "false"})


def _add(parent: ET.Element, tag: str, kind: str = "", **attributes: object) -> ET.Element:
    words = {
        name: f"{value:.1f}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    return ET.SubElement(parent, tag, ({"class": kind} if kind else {}) | words)


def _text(
    svg: ET.Element, words: str, x: float, y: float, anchor: str, *, size: str = "", **more: object
) -> None:
    at = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    _add(svg, "text", size, **at, **more).text = words


def _markup(svg: ET.Element) -> Markup:
    return Markup(ET.tostring(svg, encoding="unicode"))  # escaped by ElementTree
