"""A goal of a benchmark: what was measured beside what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """One figure beside what it should be.

    Attributes:
        what: the figure's name.
        value: measured, or none.
        bound: the goal.
        at_least: whether the value should not be below the bound, rather than not above.
        applies: whether the sizes are those that the goal was set for.
    """

    what: str
    value: float | None
    bound: float
    at_least: bool = False
    applies: bool = True

    @property
    def verdict(self) -> str:
        """`met`, `missed`, `not measured` or `other sizes`."""
        if self.value is None:
            return "not measured"
        if not self.applies:
            return "other sizes"
        met = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "met" if met else "missed"

    @property
    def wanted(self) -> str:
        """The bound as a reader writes it."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}"

    @property
    def measured(self) -> str:
        """The value with two decimals; empty where there is none."""
        return "" if self.value is None else f"{self.value:.2f}"


def goal_table(found: Sequence[Goal]) -> Table:
    """Goals with what was measured and whether that meets them."""
    table = Table("goal", "measured", "wanted", "", title="goals", title_justify="left")
    for goal in found:
        table.add_row(goal.what, goal.measured, goal.wanted, goal.verdict)
    return table
