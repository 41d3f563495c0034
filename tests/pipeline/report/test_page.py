"""The page's HTML and its figures: escaped, complete in itself, in the order of reading."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from teacher_cache.pipeline.report.comparison import (
    Comparison,
    agreement_parts,
    cost_parts,
    disagreement_parts,
    label_parts,
    lead,
    result_parts,
)
from teacher_cache.pipeline.report.figures import Axis, Series, chart, heat_map, tick_words
from teacher_cache.pipeline.report.page import (
    Cell,
    Code,
    Figure,
    Figures,
    Folded,
    Note,
    Quotes,
    Section,
    Table,
    page_of,
)
from teacher_cache.pipeline.report.report import renamed, short_names
from teacher_cache.pipeline.report.words import shown
from tests.pipeline.report.read_page import Page

X, Y = Axis(title="steps"), Axis(title="a < b")


def line(*points: tuple[float, float]) -> Series:
    return Series(name="<line>", points=points, colour=1, is_marked=True)


def table(*rows: tuple[str, str]) -> Table:
    cells = [[Cell(name), Cell(value, "small <one>")] for name, value in rows]
    return Table(caption="<models> & more", headings=["model", "accuracy"], rows=cells)


def page(*parts: object) -> Page:
    section = Section(title="S", name="s", parts=parts)  # pyright: ignore[reportArgumentType]
    return Page(page_of("a < b", "the <result>", [section], "foot"))


def test_every_text_is_escaped_and_every_tag_closed() -> None:
    figure = Figure(caption="of <it>", svg=chart([line((0, 1), (9, 2))], X, Y), values=table())
    inner = [Note("1 < 2"), Code(title="<t>", text="a && b"), table(("<b>tiny</b>", "81.5"))]
    quotes = Quotes(title="<q>", of=[("a <script>", [("who", "<what>")])])
    read = page(*inner, Figures(of=[figure]), quotes, Folded(title="<f>", of=inner))
    assert "<b>tiny</b>" in read.cells and "81.5 small <one>" in read.cells
    for words in ("1 < 2", "a && b", "a <script>", "<what>", "the <result>", "<models> & more"):
        assert words in read.words
    assert read.headings == [(1, "a < b"), (2, "S"), (3, "<t>"), (3, "<q>"), (3, "<t>")]
    assert read.figures == [{"svg", "figcaption", "table"}]


def test_a_section_of_nothing_is_left_out() -> None:
    shown = [Section(title=one, name=one, parts=parts) for one, parts in (("a", [Note("n")]),)]
    read = Page(page_of("t", "l", [*shown, Section(title="b", name="b", parts=[])], "f"))
    assert read.addresses == ["#a", "#a"] and "a" in read.ids


def points_of(svg: str) -> list[tuple[float, float]]:
    found = next(one for one in ET.fromstring(svg).iter("polyline")).get("points", "")
    return [tuple(map(float, pair.split(","))) for pair in found.split()]  # pyright: ignore[reportReturnType]


def test_a_line_goes_where_its_axes_say() -> None:
    svg = chart([line((0, 0.5), (50, 1.0), (100, 0.0))], X, Y)
    (left, middle), (half, top), (right, bottom) = points_of(svg)
    assert left < half < right and half == pytest.approx((left + right) / 2, abs=0.1)
    assert top < middle < bottom and middle == pytest.approx((top + bottom) / 2, abs=0.1)
    (first, _), (second, _), (third, _) = points_of(
        chart([line((8, 1), (16, 2), (64, 3))], Axis(title="x", is_log=True), Y)
    )
    assert third - second == pytest.approx(2 * (second - first), abs=0.2)
    words = [one.text for one in ET.fromstring(svg).iter("text")]
    assert "a < b" in words and {"0", "50", "100", "0.00", "0.50", "1.00"} <= set(words)


@pytest.mark.parametrize(
    "points",
    [[(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(5.0, 1e-9), (6.0, 3e-9)], [(1.0, float("inf"))]],
)
def test_odd_values_are_drawn_inside(points: list[tuple[float, float]]) -> None:
    for x, y in points_of(chart([line(*points)], X, Y)):
        assert 0 <= x <= 340 and 0 <= y <= 230


def test_ticks_have_as_many_places_as_they_need() -> None:
    assert [tick_words(one, [0, 0.25, 0.5]) for one in (0, 0.25)] == ["0.00", "0.25"]
    assert tick_words(2000, [0, 1000, 2000]) == "2,000"
    assert tick_words(0.5, [0.25, 0.5], is_percent=True) == "50"


def test_a_map_shades_what_is_looked_at() -> None:
    svg = ET.fromstring(heat_map(np.array([[1.0, 0.0], [0.25, np.nan]]), ["a", "b"], ["c", "d"]))
    paths = {one.get("opacity"): one.get("d", "") for one in svg.iter("path")}
    assert set(paths) == {"1.00", "0.50"}, "the root of the share, none where nothing is"
    assert all(path.count("M") == 1 for path in paths.values())


def details(**changes: object) -> dict[str, object]:
    part = {"low": 0.5, "high": 0.9, "num": 4, "means": {"agreement": 0.75, "kl": 0.1}}
    other = {"low": 0.9, "high": 1.0, "num": 6, "means": {"agreement": 1.0, "kl": 0.0}}
    return {
        "intervals": {"accuracy": [0.61, 0.79], "agreement": [0.8, 0.9]},
        "by_confidence": [part, other],
        "by_length": [part, {**other, "high": None}],
        "calibration": [{**part, "means": {"confidence": 0.6, "accuracy": 0.55}}],
        "confusion": [[7, 3], [1, 9]],
        "disagreements": [
            {
                "text": "a <film>",
                "truth": "neg",
                "kl": 1.234567,
                "teacher": [["neg", 0.91234], ["pos", 0.08766]],
                "student": [["pos", 0.7], ["neg", 0.3]],
            }
        ],
        **changes,
    }


def comparison() -> Comparison:
    row = {"accuracy": 0.7123456, "f1": 0.7, "ece": None, "agreement": 0.85, "kl": 0.0654321}
    cost = {"num_parameters": 4_123_456, "megabytes": 16.5, "latency_ms": {"32": 3.14159, "8": 1.0}}
    found = {
        "num_documents": 1234,
        "rows": [
            {"name": "teacher", "accuracy": 0.8, "agreement": 1.0, "kl": 0.0},
            {"name": "r-plain", **row, **cost},
            {"name": "r-taught", **row, **cost, "accuracy": 0.75},
            {"name": "other", **row},
        ],
        "marks": {"r-plain": "was let pass", "other": "x"},
        "details": {
            "class_names": ["neg", "pos"],
            "models": {
                "teacher": details(disagreements=[]),
                "r-plain": details(),
                "r-taught": details(),
                "other": details(),
            },
            "differences": [
                {"model": a, "other": b, "figure": "accuracy", "mean": m, "interval": [m - 1, m]}
                for a, b, m in (("r-plain", "teacher", -0.05), ("r-taught", "r-plain", 0.04))
            ],
        },
    }
    rows = [one for one in found["rows"] if one["name"] != "other"]  # pyright: ignore[reportGeneralTypeIssues,reportIndexIssue]
    return Comparison(
        found=renamed({**found, "rows": rows}, short_names(["r-plain", "r-taught"])),
        source="of somewhere",
        labels_only=["plain"],
    )


def test_a_comparison_is_told_in_words_and_rounded() -> None:
    one = comparison()
    parts = [
        part
        for of in (result_parts, label_parts, agreement_parts, disagreement_parts, cost_parts)
        for part in of(one)
    ]
    read = page(*parts)
    assert lead(one).startswith(
        "Of 2 students, taught does best: an accuracy of 75.0 % (95 %: 61.0 – 79.0) on 1,234 "
    )
    assert "learned from labels alone" in read.words and "plain: was let pass." in read.words
    assert "71.2 61.0 – 79.0" in read.cells and "0.065" in read.cells and "4.1 M" in read.cells
    assert "+4.0 -96.0 to +4.0" in read.cells and "over 1" in " ".join(read.cells)
    assert "neg 91.2 %" in read.words and "1.23 nats" in read.words
    too_long = [cell for cell in read.cells if re.search(r"\d\.\d{4}|\de[-+]", cell)]
    assert not too_long, "no figure has more places than it means"
    assert "other" not in read.cells
    assert all(one == {"svg", "figcaption", "table"} for one in read.figures) and read.figures


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["a-b-c", "a-b-d"]) == {"a-b-c": "c", "a-b-d": "d"}
    assert short_names(["a-b"]) == {"a-b": "a-b"}
    assert short_names(["a", "a-b"]) == {"a": "a", "a-b": "a-b"}
    assert short_names(["x-teacher", "x-b"]) == {"x-teacher": "x-teacher", "x-b": "x-b"}


def test_unknown_figures_keep_their_names() -> None:
    assert shown("odd_one", 0.123456) == "0.1235" and shown("kl", None) == "–"
