"""What goes wrong, said in one sentence with an exit code; and what libraries may print."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from teacher_cache.cache.errors import TeacherCacheError

EXIT_INTERRUPTED = 130

# Without markup and emoji: a token called [unused1] or :eye: is printed as it is.
console = Console(highlight=False, markup=False, emoji=False)
error_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def reported() -> Iterator[None]:
    """Run a command; our errors become one sentence, an interruption the line that resumes.

    Raises:
        SystemExit: with the error's exit code, or 130 after an interruption.
    """
    _configure_logging()
    try:
        yield
    except TeacherCacheError as error:
        error_console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        command = shlex.join(["pipe", *sys.argv[1:]])
        error_console.print(
            f"interrupted: the same command goes on from here: {command}", soft_wrap=True
        )
        sys.exit(EXIT_INTERRUPTED)


def _configure_logging() -> None:
    handler = RichHandler(
        console=error_console, show_time=False, show_path=False, show_level=True, markup=False
    )
    logger = logging.getLogger("teacher_cache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def quiet_libraries() -> None:
    """Keep transformers' own bars and notes off the screen; our observers say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def working(console: Console, message: str) -> AbstractContextManager[Any]:
    """A spinner while something slow has no counts; silent where there is no terminal."""
    return console.status(message) if console.is_terminal else nullcontext()
