"""Drive `pipe` inside the test's own process: what a user types, and what they would see."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from teacher_cache.pipeline.cli import app
from teacher_cache.pipeline.reporting import console, error_console

WIDTH = 240  # tables must not fold the words that a test looks for

# A student that trains in a second.
TINY_STUDENT = (
    "--d-model", "16", "--num-layers", "1", "--expand", "2", "--d-state", "16", "--head-dim", "8",
    "--batch-size", "8", "--max-steps", "6", "--checkpoint-steps", "3",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left: exit code and the two streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The one sentence that a command which failed on purpose ends with.

        Asserts that it is one, and that nothing but our own notes stands before it.
        """
        assert self.code in (1, 2), f"exit code {self.code}\n{self.stdout}\n{self.stderr}"
        assert "Traceback" not in self.stdout + self.stderr
        found = re.fullmatch(r"(?:(?:INFO|WARNING) +\S.*\n)*error: (.+)\n", self.stderr)
        assert found, self.stderr
        return found.group(1)


def pipe(*args: str | Path, text: str | None = None) -> Outcome:
    """Run one command; `text` is its standard input. An exception of ours or others is raised."""
    with _as_a_process():
        result = CliRunner().invoke(app, [str(one) for one in args], input=text, prog_name="pipe")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(code=result.exit_code, stdout=result.stdout, stderr=result.stderr)


def done(*args: str | Path, text: str | None = None) -> str:
    """Run a command that must succeed; return its standard output."""
    outcome = pipe(*args, text=text)
    assert outcome.code == 0, f"{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


def refused(*args: str | Path, code: int = 2, saying: str) -> str:
    """Run a command that must fail; its one sentence matches `saying`. Return what it printed."""
    outcome = pipe(*args)
    assert outcome.code == code, outcome.stderr
    assert re.search(saying, outcome.error), outcome.error
    return outcome.stdout


@contextmanager
def _as_a_process() -> Iterator[None]:
    """Take back what a command may change for its whole process: the logger, the width."""
    logger = logging.getLogger("teacher_cache")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    widths = console.width, error_console.width
    console.width = error_console.width = WIDTH
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        console.width, error_console.width = widths
