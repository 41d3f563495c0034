"""What a run of a benchmark's command was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from benchmarks.distillation import tuning
from benchmarks.distillation.folders import Folders
from benchmarks.distillation.rows import BLOCKS, Block, Row, Settings
from benchmarks.distillation.scale import Scale
from teacher_cache.cache.errors import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Table:
    """What one command of the benchmarks trains and compares.

    Attributes:
        name: of the command and of its files of results.
        rows: of all blocks.
        usual_blocks: what a run takes that is not told otherwise.
        baseline: what the rows that are baselines learn from.
        full: scale of a run whose figures mean something.
        tiny: scale of one that only tries the machine.
    """

    name: str
    rows: tuple[Row, ...]
    usual_blocks: tuple[Block, ...]
    baseline: str
    full: Scale
    tiny: Scale

    @property
    def command(self) -> str:
        """What a user types."""
        return f"python -m benchmarks.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Rows, seeds, scale and places; the options' help says more.

    Attributes:
        table: that it is a run of.
        rows: to tune or to judge.
        seeds: of each row's students.
        scale: how much of everything.
        folders: of what is trained.
        results: folder of what was chosen and measured.
        untuned: take each row's first trial, not the one that was chosen.
        num_workers: students trained at the same time.
        num_threads: of torch for each.
        console: for progress and tables.
    """

    table: Table
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    scale: Scale
    folders: Folders
    results: Path
    untuned: bool
    num_workers: int
    num_threads: int
    console: Console

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those of its rows, in the order of reading."""
        return tuple(block for block in BLOCKS if any(row.block == block for row in self.rows))

    @property
    def is_whole(self) -> bool:
        """Whether every row of some blocks and every seed is asked for."""
        whole = tuple(row for row in self.table.rows if row.block in self.blocks)
        return self.rows == whole and self.seeds == self.scale.seeds

    @property
    def results_name(self) -> str:
        """What its files of results are called, without their endings."""
        is_usual = self.blocks == self.table.usual_blocks
        return self.table.name if is_usual else "-".join((self.table.name, *self.blocks))

    @property
    def is_standard(self) -> bool:
        """Whether the goals were set for a run like this."""
        return self.is_whole and self.scale == self.table.full

    @property
    def tuning_file(self) -> Path:
        """Where the choice of trials is kept."""
        return self.results / f"{self.table.name}-tuning.json"

    def say(self, line: str) -> None:
        """One line of progress."""
        self.console.print(line, highlight=False, markup=False)

    def chosen(self) -> dict[str, Settings]:
        """The trial of each row, by its key.

        Raises:
            UserError: if a row was not tuned as it stands now.
        """
        if self.untuned:
            self.say("untuned: the first trial of each row")
            return {row.key: row.trials[0] if row.trials else {} for row in self.rows}
        found = {row.key: self._chosen(row) for row in self.rows}
        self.say(f"each row's settings as {self.tuning_file} chose them by the validation movies")
        return found

    def _chosen(self, row: Row) -> Settings:
        table = self.table
        return tuning.chosen(
            self.tuning_file, row, self.scale, rows=table.rows, command=table.command
        )


def choose_rows(rows: Sequence[Row], names: str, blocks: str) -> tuple[Row, ...]:
    """The rows of these names in these blocks, both separated by commas; all rows for no name.

    Args:
        rows: to choose from.
        names: of rows; a name may be in several blocks.
        blocks: of `BLOCKS` that the rows have.

    Raises:
        BadParameter: for a name that there is not.
    """
    wanted_blocks, wanted = _words(blocks), _words(names)
    there = {row.block for row in rows}
    known = {row.name for row in rows if row.block in wanted_blocks}
    for option, given, names_there in (("blocks", wanted_blocks, there), ("rows", wanted, known)):
        for one in given:
            if one not in names_there:
                hint = did_you_mean(one, names_there)
                raise typer.BadParameter(f"--{option} names {one!r}: {hint}")
    return tuple(
        row for row in rows if row.block in wanted_blocks and (not wanted or row.name in wanted)
    )


def choose_seeds(written: str) -> tuple[int, ...]:
    """Seeds separated by commas, each once.

    Raises:
        BadParameter: for what is no number.
    """
    words = _words(written)
    if not all(word.isdigit() for word in words):
        raise typer.BadParameter(f"--seeds is {written!r}, expected numbers such as 0,1,2")
    return tuple(dict.fromkeys(int(word) for word in words))


def _words(written: str) -> list[str]:
    return [word.strip() for word in written.split(",") if word.strip()]
