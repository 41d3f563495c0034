"""What an evaluation found, as parts of a page: the result, where models are right and agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from teacher_cache.pipeline.report.figures import Axis, Series, chart
from teacher_cache.pipeline.report.page import (
    Cell,
    Figure,
    Figures,
    Folded,
    Note,
    Part,
    Quotes,
    Table,
    Tables,
)
from teacher_cache.pipeline.report.words import (
    HEADLINE,
    NONE,
    interval,
    parameters,
    percent,
    places,
    quantity,
    shown,
)

TEACHER, BASELINES = "teacher", ("majority", "mean")
NUM_QUOTES = 5  # that are not folded
MOST_CLASSES = 12
FEWEST_BINS = 2
OF_TEACHER = ("agreement", "kl")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An evaluation as its file has it.

    Attributes:
        found: of the file.
        source: where the figures come from, behind their documents' number.
        labels_only: names of runs that learned from labels alone.
    """

    found: Mapping[str, Any]
    source: str
    labels_only: Sequence[str]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A model each."""
        return list(self.found["rows"])

    @property
    def num_documents(self) -> str:
        """In words."""
        num = self.found.get("num_documents")
        return "held-out documents" if num is None else f"{num:,} held-out documents"

    @property
    def students(self) -> list[dict[str, Any]]:
        """The rows of runs."""
        return [row for row in self.rows if row["name"] not in (TEACHER, *BASELINES)]

    @property
    def teacher(self) -> dict[str, Any] | None:
        """Its row, where there is one."""
        return next((row for row in self.rows if row["name"] == TEACHER), None)

    @property
    def details(self) -> Mapping[str, Any]:
        """By model; empty of an older release's file."""
        return (self.found.get("details") or {}).get("models", {})

    @property
    def figures(self) -> list[str]:
        """Of the headline, that any model has."""
        return [one for one in HEADLINE if any(row.get(one) is not None for row in self.rows)]

    @property
    def main(self) -> str:
        """The first of them."""
        return self.figures[0] if self.figures else "agreement"

    def colour(self, name: str) -> int:
        """Of a model's lines: of the students in their order; -1 is the teacher's."""
        names = [row["name"] for row in self.students]
        return names.index(name) if name in names else -1

    def interval(self, row: Mapping[str, Any], figure: str) -> tuple[float, float] | None:
        """Of a row's figure."""
        found = (self.details.get(row["name"]) or {}).get("intervals", {})
        of = quantity(figure).of_nats
        if of is None:
            return found.get(figure)
        if of not in found or not row.get(figure):
            return None
        low, high = found[of]
        if figure == "perplexity":
            return exp(low), exp(high)
        return low * row[figure] / row[of], high * row[figure] / row[of]


def lead(one: Comparison) -> str:
    """The result in a sentence or two."""
    main, rows = one.main, one.students
    better = max if quantity(main).is_percent else min
    best = better(rows, key=lambda row: row[main] if row[main] is not None else 0.0)
    unit = " %" if quantity(main).is_percent else ""
    name = quantity(main).words.removesuffix(", %")

    def said(row: Mapping[str, Any]) -> str:
        ends = one.interval(row, main)
        around = "" if ends is None else f" (95 %: {interval(main, ends)})"
        return f"{shown(main, row[main])}{unit}{around}"

    first = "The student" if len(rows) == 1 else f"Of {len(rows)} students, {best['name']}"
    verb = "has" if len(rows) == 1 else "does best:"
    article = "an" if name.startswith("a") else "a"
    text = f"{first} {verb} {article} {name} of {said(best)} on {one.num_documents}"
    teacher = one.teacher
    text += "." if teacher is None else f"; its teacher, {shown(main, teacher[main])}{unit}."
    if best.get("agreement") is not None:
        text += f" It chooses what the teacher chooses {percent(best['agreement'])} % of the time."
    return text


def result_parts(one: Comparison) -> Iterator[Part]:
    """Teacher and students beside each other, and how far apart they are."""
    figures = one.figures
    rows = [
        [
            Cell(row["name"], "learned from labels alone" * (row["name"] in one.labels_only)),
            *(_cell(one, row, figure) for figure in figures),
            Cell(parameters(row.get("num_parameters"))),
        ]
        for row in one.rows
    ]
    headings = ["model", *(quantity(figure).words for figure in figures), "parameters"]
    caption = f"On {one.num_documents} {one.source}"
    if one.details:
        caption += "; below a figure, its 95 % interval (bootstrap over documents)"
    yield Table(caption=caption, headings=headings, rows=rows, is_stacked=True)
    apart = _differences(one)
    if apart is not None:
        yield apart
    for name, mark in one.found.get("marks", {}).items():
        yield Note(f"{name}: {mark}.")


def _cell(one: Comparison, row: Mapping[str, Any], figure: str) -> Cell:
    ends = one.interval(row, figure)
    is_itself = row["name"] == TEACHER and figure in OF_TEACHER
    small = "" if ends is None or is_itself else interval(figure, ends)
    return Cell(shown(figure, row.get(figure)), small)


def _differences(one: Comparison) -> Table | None:
    """Each student's distance from its teacher and from labels alone, on the same documents."""
    figure = "accuracy" if one.main == "accuracy" else "nll"
    of = {
        (each["model"], each["other"]): each
        for each in (one.found.get("details") or {}).get("differences", ())
        if each["figure"] == figure
    }
    say: Callable[[float], str] = (
        (lambda value: f"{100 * value:+.1f}") if figure == "accuracy" else "{:+.3f}".format
    )
    rows = []
    for student in one.students:
        for other in (TEACHER, *one.labels_only):
            name, sign = student["name"], 1
            found = of.get((name, other))
            if found is None and (other, name) in of:
                found, sign = of[other, name], -1
            if found is not None:
                ends = sorted(sign * end for end in found["interval"])
                mean = Cell(say(sign * found["mean"]), f"{say(ends[0])} to {say(ends[1])}")
                rows.append([Cell(name), Cell(other), mean])
    if not rows:
        return None
    unit = "points of accuracy" if figure == "accuracy" else "nats a token (less is better)"
    return Table(
        caption="Differences on the same documents, each with its 95 % interval (paired bootstrap)",
        headings=["model", "against", unit],
        rows=rows,
        left=[1],
        is_stacked=True,
    )


def label_parts(one: Comparison) -> Iterator[Part]:
    """How right classifiers are by how sure they are, and which classes they take for which."""
    calibrated = {name: each["calibration"] for name, each in one.details.items()}
    calibrated = {name: bins for name, bins in calibrated.items() if bins}
    if calibrated:
        series = [
            _series(one, name, [(each["means"]["confidence"], each) for each in bins], "accuracy")
            for name, bins in calibrated.items()
        ]
        lowest = min(min(point) for each in series for point in each.points)
        bounds = (0.5 if lowest >= 0.5 else 0.0, 1.0)
        rows = [
            [
                Cell(name),
                Cell(_range(each, percent)),
                Cell(f"{each['num']:,}"),
                Cell(percent(each["means"]["confidence"])),
                Cell(percent(each["means"]["accuracy"])),
            ]
            for name, bins in calibrated.items()
            for each in bins
        ]
        words = ["model", "sure to, %", "documents", "mean confidence, %", "right, %"]
        yield Figures(
            of=[
                Figure(
                    caption="Calibration: how often a model is right, by how sure it says it is. "
                    "On the dotted line it is as right as it is sure; below it, surer than right.",
                    svg=chart(
                        series,
                        Axis(title="how sure, %", bounds=bounds, is_percent=True),
                        Axis(title="how often right, %", bounds=bounds, is_percent=True),
                        diagonal=True,
                    ),
                    legend=series,
                    values=Table(caption="Calibration", headings=words, rows=rows),
                )
            ]
        )
    counted = list(_confusions(one))
    if counted:
        yield Tables(of=counted)


def _confusions(one: Comparison) -> Iterator[Table]:
    names = (one.found.get("details") or {}).get("class_names", [])
    for model, each in one.details.items():
        counts = each.get("confusion")
        if counts is None:
            continue
        if len(names) <= MOST_CLASSES:
            yield Table(
                caption=f"{model}: documents of each label (row) by the class it gives them",
                headings=["label", *(f"says {name}" for name in names), "right, %"],
                rows=[
                    [
                        Cell(name),
                        *(Cell(f"{count:,}") for count in row),
                        Cell(percent(row[i] / sum(row)) if sum(row) else NONE),
                    ]
                    for i, (name, row) in enumerate(zip(names, counts, strict=True))
                ],
            )
        else:
            wrong = [
                (row[j], names[i], names[j])
                for i, row in enumerate(counts)
                for j in range(len(row))
                if i != j and row[j]
            ]
            yield Table(
                caption=f"{model}: its most frequent mistakes",
                headings=["label", "says", "documents"],
                rows=[
                    [Cell(label), Cell(given), Cell(f"{num:,}")]
                    for num, label, given in sorted(wrong, reverse=True)[:MOST_CLASSES]
                ],
                left=[1],
            )


def agreement_parts(one: Comparison) -> Iterator[Part]:
    """Figures over the teacher's confidence and over length."""
    unit = "positions" if "num_positions" in one.rows[-1] else "documents"
    length = "tokens read" if unit == "positions" else "tokens of the document"
    ability = "nll" if unit == "positions" else "accuracy"
    figures = [
        _by(one, "by_confidence", "agreement", unit, "the teacher's confidence, %"),
        _by(one, "by_confidence", "kl", unit, "the teacher's confidence, %"),
        _by(one, "by_length", "agreement", unit, length),
        _by(one, "by_length", ability, unit, length),
    ]
    drawn = [figure for figure in figures if figure is not None]
    if drawn:
        yield Figures(of=drawn)


def _by(one: Comparison, bins: str, figure: str, unit: str, along: str) -> Figure | None:
    """A figure over ranges; None where there are too few to draw."""
    is_length = bins == "by_length"
    of: dict[str, list[dict[str, Any]]] = {}
    for name, each in one.details.items():
        is_own = name == TEACHER and figure in OF_TEACHER  # with itself
        having = [] if is_own else [one for one in each[bins] if figure in one["means"]]
        if len(having) >= FEWEST_BINS:
            of[name] = having
    if not of:
        return None

    def place(each: Mapping[str, Any]) -> float:
        if not is_length:
            return (each["low"] + each["high"]) / 2
        return each["high"] or 2 * each["low"]

    series = [
        _series(one, name, [(place(each), each) for each in having], figure)
        for name, having in of.items()
    ]
    known = quantity(figure)
    say = places(0) if is_length else percent
    rows = [
        [
            Cell(name),
            Cell(_range(each, say)),
            Cell(f"{each['num']:,}"),
            Cell(shown(figure, each["means"][figure])),
        ]
        for name, having in of.items()
        for each in having
    ]
    over = "length" if is_length else "how sure the teacher is"
    caption = f"{known.words[0].upper()}{known.words[1:].removesuffix(', %')}, by {over}"
    return Figure(
        caption=caption + f" ({along}, up to)." * is_length + "." * (not is_length),
        svg=chart(
            series,
            Axis(title=along, is_log=is_length, is_percent=not is_length),
            Axis(title=known.words, is_percent=known.is_percent),
        ),
        legend=series,
        values=Table(caption=caption, headings=["model", along, unit, known.words], rows=rows),
    )


def _series(
    one: Comparison, name: str, bins: Sequence[tuple[float, Mapping[str, Any]]], figure: str
) -> Series:
    colour = one.colour(name)
    points = [(x, each["means"][figure]) for x, each in bins if figure in each["means"]]
    return Series(name=name, points=points, colour=colour, is_marked=True, dash=colour + 1)


def _range(each: Mapping[str, Any], say: Callable[[float], str]) -> str:
    if each["high"] is None:
        return f"over {say(each['low'])}"
    return f"{say(each['low'])} – {say(each['high'])}"


def disagreement_parts(one: Comparison) -> Iterator[Part]:
    """The texts on which each student is farthest from its teacher."""
    for row in one.students:
        found = (one.details.get(row["name"]) or {}).get("disagreements", ())
        if not found:
            continue
        truth = "next" if "num_positions" in row else "label"
        quotes = [
            (
                each["text"],
                [
                    ("teacher", _outcomes(each["teacher"])),
                    ("student", _outcomes(each["student"])),
                    *([(truth, each["truth"])] if each["truth"] is not None else []),
                    ("KL", f"{each['kl']:.2f} nats"),
                ],
            )
            for each in found
        ]
        yield Quotes(title=row["name"], of=quotes[:NUM_QUOTES])
        if quotes[NUM_QUOTES:]:
            more = Quotes(title=f"{row['name']}, further", of=quotes[NUM_QUOTES:])
            yield Folded(title=f"{len(quotes) - NUM_QUOTES} more", of=[more])


def _outcomes(found: Sequence[Sequence[Any]]) -> str:
    """The first outcomes with their probabilities; of two the first, which tells both."""
    said = found if len(found) > 2 else found[:1]
    # Quoted where a space would not be seen.
    return ", ".join(
        f"{name if name.strip() == name and name else repr(name)} {percent(p)} %"
        for name, p in said
    )


def cost_parts(one: Comparison) -> Iterator[Part]:
    """Size, and time for one document by length."""
    timed = [row for row in one.rows if row.get("num_parameters") is not None]
    lengths = sorted({int(n) for row in timed for n in row.get("latency_ms") or {}})
    if not timed:
        return
    by_length = {
        row["name"]: {int(n): ms for n, ms in (row.get("latency_ms") or {}).items()}
        for row in timed
    }
    rows = [
        [
            Cell(row["name"]),
            Cell(parameters(row["num_parameters"])),
            Cell(f"{row['megabytes']:,.1f}"),
            *(Cell(_ms(by_length[row["name"]].get(length))) for length in lengths),
        ]
        for row in timed
    ]
    table = Table(
        caption="Size, and milliseconds for one document (median of interleaved passes on the "
        "machine of the evaluation)",
        headings=["model", "parameters", "MB", *(f"ms at {n:,} tokens" for n in lengths)],
        rows=rows,
        is_stacked=True,
    )
    yield table
    series = [
        Series(
            name=name,
            points=sorted(ms.items()),
            colour=one.colour(name),
            is_marked=True,
            dash=one.colour(name) + 1,
        )
        for name, ms in by_length.items()
        if len(ms) >= FEWEST_BINS
    ]
    if series:
        highest = max(ms for each in series for _, ms in each.points)
        yield Figures(
            of=[
                Figure(
                    caption="Time for one document, by its length.",
                    svg=chart(
                        series,
                        Axis(title="tokens", is_log=True),
                        Axis(title="milliseconds", bounds=(0.0, 1.05 * highest)),
                    ),
                    legend=series,
                    values=table,
                )
            ]
        )


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value:,.1f}"
