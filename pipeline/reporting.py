"""What goes wrong, said in one sentence with an exit code; and what libraries may print."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from teacher_cache.cache.errors import TeacherCacheError, UserError
from teacher_cache.stages.processes import is_main, num_processes

EXIT_INTERRUPTED = 130
RESUMING = (
    *("finetune-teacher", "cache-teacher", "convert", "import-log-probs"),
    *("train-student", "run"),
)
# How long a process that torchrun started beside the main one keeps an error to itself.
GRACE_S = 30.0

# Without markup and emoji: a token called [unused1] or :eye: is printed as it is.
console = Console(highlight=False, markup=False, emoji=False, quiet=not is_main())
error_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def reported(*, in_processes: bool = False) -> Iterator[None]:
    """Run a command; our errors become one sentence, an interruption the line that resumes.

    Args:
        in_processes: whether torchrun may start the command, in several processes.

    Raises:
        SystemExit: with the error's exit code, or 130 after an interruption.
    """
    _configure_logging()
    try:
        with ExitStack() as stack:
            stack.push(_let_main_speak_first)
            if not in_processes:
                _refuse_processes()
            yield
    except TeacherCacheError as error:
        error_console.print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if num_processes() > 1:  # torchrun passes on what the terminal has sent already
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if is_main():
            error_console.print(Text(_how_to_go_on(sys.argv[1:])), soft_wrap=True)
        sys.exit(EXIT_INTERRUPTED)


def _let_main_speak_first(
    kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Hold back errors of other processes than the main one; on leaving a `with`.

    Most are the main one's too, or follow from its end: once that has said it and has ended,
    torchrun ends the others. What is left after a while is an error of this process alone.
    """
    if isinstance(error, Exception) and not is_main():
        time.sleep(GRACE_S)


def _refuse_processes() -> None:
    if num_processes() > 1:
        raise UserError(
            f"torchrun started {num_processes()} processes, and this command runs in one: start "
            "it without torchrun (`pipe finetune-teacher`, `pipe cache-teacher` and `pipe "
            "train-student` run in several)"
        )


def _how_to_go_on(words: list[str]) -> str:
    """The line that resumes; without what would start again, and only where there is a state."""
    if not words or words[0] not in RESUMING:
        return "interrupted"
    kept = [word for word in words if word not in ("--overwrite", "--resume=never")]
    for position in [i for i, word in enumerate(kept) if word == "--resume"]:
        if kept[position + 1 : position + 2] == ["never"]:
            del kept[position : position + 2]
    again = "under torchrun again, " if num_processes() > 1 else ""
    return f"interrupted: go on from here {again}with: {shlex.join(['pipe', *kept])}"


def _configure_logging() -> None:
    if num_processes() > 1:
        # Before torch is imported: it notes that no weight was without a gradient.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    handler = RichHandler(
        console=error_console, show_time=False, show_path=False, show_level=True, markup=False
    )
    logger = logging.getLogger("teacher_cache")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_main() else logging.ERROR)
    logger.propagate = False


def quiet_libraries() -> None:
    """Keep transformers' own bars and notes off the screen; our observers say what happens."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # What several processes say of a convolution's weight: no stride matters where the size is 1.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")


def working(console: Console, message: str) -> AbstractContextManager[Any]:
    """A spinner while something slow has no counts; silent where there is no terminal."""
    return console.status(message) if console.is_terminal else nullcontext()
