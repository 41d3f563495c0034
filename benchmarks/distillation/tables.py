"""Results of the benchmarks of reviews as grids of words, printed by rich or as markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.distillation.bootstrap import Interval
from benchmarks.distillation.cost import Cost
from benchmarks.distillation.inside import Inside
from benchmarks.distillation.leakage import Overlap
from benchmarks.distillation.results import Result
from benchmarks.distillation.teachers import Sureness
from benchmarks.goal import Goal

NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of words; its first column is written to the left, the others to the right.

    Attributes:
        title: what stands above it.
        headings: of the columns.
        lines: as many words as headings in each.
        note: what a reader must know, or nothing.
    """

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str = ""

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", caption=self.note or None)
        table.caption_justify = "left"
        for idx, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if idx else "left", overflow="fold")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """For a document."""
        rule = ["---", *("---:" for _ in self.headings[1:])]
        rows = [self.headings, rule, *self.lines]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"**{self.title}**\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")


def quality_grid(title: str, found: Sequence[Result]) -> Grid:
    """How well each row classifies, and what it takes: means over seeds."""
    columns: dict[str, Callable[[Result], str]] = {
        "accuracy %": _accuracy,
        "F1 %": lambda one: _percent(one.mean.get("f1")),
        "ECE %": lambda one: _percent(one.mean.get("ece")),
        "NLL": lambda one: _nats(one.mean.get("nll")),
        "agrees %": lambda one: _percent(one.mean.get("agreement")),
        "KL": lambda one: _nats(one.mean.get("kl")),
        "training s": lambda one: (
            f"{sum(one.seconds) / len(one.seconds):,.0f}" if one.seconds else NONE
        ),
        "parameters": lambda one: _millions(one.num_parameters),
        "outside embedding": lambda one: _millions(one.num_outside),
    }
    return Grid(
        title=title,
        headings=("model", *columns),
        lines=tuple((one.title, *(cell(one) for cell in columns.values())) for one in found),
        note="Mean over the seeds, and the accuracy of each in brackets. Agrees: the class of the "
        "teacher that taught it is chosen; KL: from that teacher's distribution, mean nats. "
        "Training that was interrupted counts from where it was taken up again.",
    )


def comparison_grid(title: str, found: Sequence[Result], baseline: str) -> Grid:
    """Each row's accuracy beside that of the teacher and of the block's strongest baseline."""
    return Grid(
        title=title,
        headings=("model", "points above teacher", f"points above {baseline}", "% of teacher's"),
        lines=tuple(
            (
                one.title,
                _interval(one.to_teacher, "+.1f"),
                NONE if one.to_baseline is None else _interval(one.to_baseline, "+.1f"),
                _interval(one.of_teacher, ".1f"),
            )
            for one in found
        ),
        note="Accuracy, with 95 % intervals of a paired bootstrap over the test movies. The "
        f"teacher is the one that taught the row; {baseline} is the best such row of its block.",
    )


def inside_grid(title: str, found: Sequence[Inside]) -> Grid:
    """How far each row's students are inside from their teacher: means over seeds."""
    first = found[0]
    return Grid(
        title=title,
        headings=("model", "KL of a map's row", "1 - cosine of a state"),
        lines=(
            ("any row spread evenly", _nats(first.even_kl), NONE),
            *((one.title, _of_seeds(one.map_kl), _of_seeds(one.hidden)) for one in found),
        ),
        note=f"On {first.num_reviews:,} test reviews, mean over the matched layers, and each seed "
        "in brackets. KL: from the teacher's row to the student's, nats. State: through a ridge "
        "regression fitted on half of these reviews, judged on the other half.",
    )


def sureness_grid(found: Sequence[Sureness]) -> Grid:
    """Teachers on text that they learned from, and on text that they did not."""
    return Grid(
        title="teachers on what they were fine-tuned on, and not",
        headings=("texts", "number", "accuracy %", "NLL", "mean confidence %"),
        lines=tuple(
            (
                one.texts,
                f"{one.num_texts:,}",
                _percent(one.accuracy),
                _nats(one.nll),
                _percent(one.confidence),
            )
            for one in found
        ),
    )


def cost_grid(cost: Cost) -> Grid:
    """CPU time of one review."""
    return Grid(
        title="CPU time of a review",
        headings=("model", "ms", "× the student's"),
        lines=tuple(
            (name, f"{ms:.2f}", f"{ms / cost.ms_per_review['student']:.1f}")
            for name, ms in cost.ms_per_review.items()
        ),
        note=f"One thread, batches of {cost.batch_size} test reviews sorted by length, "
        f"{cost.num_reviews} in all; median CPU time of {len(cost.passes_s['student'])} "
        "interleaved passes.",
    )


def overlap_grid(found: Sequence[Overlap]) -> Grid:
    """What of the texts that are learned from coincides with those that judge."""
    return Grid(
        title="texts that are learned from and coincide with one that judges",
        headings=("texts", "compared with", "number", "exactly", "but for case and punctuation"),
        lines=tuple(
            (
                one.part,
                one.held_out,
                f"{one.num_texts:,}",
                str(one.num_exact),
                str(one.num_normalised),
            )
            for one in found
        ),
    )


def choice_grid(found: Sequence[Result], chosen_by: str) -> Grid:
    """Each row's trial, and who chose it."""
    return Grid(
        title=f"trials: {chosen_by}",
        headings=("row", "settings"),
        lines=tuple((one.key, _written(one.settings)) for one in found if one.settings),
    )


def trial_grid(tuned: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Every trial of the rows that were tuned, by a row's key; the chosen one is marked."""
    lines = [
        (
            f"{key}{' *' if trial['settings'] == row['chosen'] else ''}",
            _written(trial["settings"]),
            _percent(trial["accuracy"]),
            _nats(trial["nll"]),
            f"{trial['seconds']:,.0f}",
        )
        for key, row in tuned.items()
        for trial in row["trials"]
    ]
    return Grid(
        title="trials, on the validation movies",
        headings=("row", "settings", "accuracy %", "NLL", "training s"),
        lines=tuple(lines),
        note="*: the highest accuracy, then the lowest NLL.",
    )


def goal_grid(found: Sequence[Goal]) -> Grid:
    """Goals with what was measured and whether that meets them."""
    return Grid(
        title="goals",
        headings=("goal", "measured", "wanted", ""),
        lines=tuple((one.what, one.measured, one.wanted, one.verdict) for one in found),
    )


def _written(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _accuracy(result: Result) -> str:
    mean = _percent(result.mean["accuracy"])
    if len(result.each) < 2:
        return mean
    return f"{mean} ({', '.join(_percent(one['accuracy']) for one in result.each)})"


def _interval(interval: Interval, form: str) -> str:
    value, low, high = (100 * one for one in (interval.value, interval.low, interval.high))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def _of_seeds(values: Sequence[float]) -> str:
    mean = _nats(statistics.fmean(values))
    return mean if len(values) < 2 else f"{mean} ({', '.join(map(_nats, values))})"


def _percent(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _nats(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def _millions(count: int | None) -> str:
    return NONE if count is None else f"{count / 1e6:.2f} M"
