"""The outcome of the join: where cache and student differ, and the same in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OnMismatch = Literal["error", "warn"]
ID_TABLE = "id-to-string table"
"""Name of the difference that an alignment can answer."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing on which cache and student disagree; a line of the table that the user sees.

    Attributes:
        name: what was compared.
        cache: what the cache has.
        student: what the student has.
        waivable: whether `--on-mismatch warn` lets it pass.
    """

    name: str
    cache: str
    student: str
    waivable: bool


@dataclass(frozen=True, kw_only=True)
class JoinReport:
    """The outcome: what was compared, with counts, and where the two differ."""

    compared: tuple[str, ...]
    differences: tuple[Difference, ...]

    @property
    def verified(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def waivable(self) -> bool:
        """Whether every difference, if any, is one that `--on-mismatch warn` lets pass."""
        return all(difference.waivable for difference in self.differences)

    def accepted(self, on_mismatch: OnMismatch) -> bool:
        """Whether training may start."""
        return self.verified or (on_mismatch == "warn" and self.waivable)


def verified_line(report: JoinReport) -> str:
    """One line that says that the tokens are the same, and what was compared to know it.

    Raises:
        ValueError: if something differs.
    """
    if not report.verified:
        raise ValueError(f"not verified: {', '.join(item.name for item in report.differences)}")
    return f"✓ tokenization verified: {', '.join(report.compared)}"


def ways_out(report: JoinReport) -> list[str]:
    """What the user can do about the differences, the safest first."""
    ways = [
        "use the cache's own tokenizer: drop --student-tokenizer and --max-length, and after "
        "--arch hf: name a model of that tokenizer",
        "run cache-teacher again with a teacher of the student's tokenizer, and train from that "
        "cache",
    ]
    if report.waivable:
        ways.append(
            "train all the same with --on-mismatch warn: every id means the same string to both, "
            "but texts may be cut or spelt otherwise than the teacher saw them"
        )
    return ways
