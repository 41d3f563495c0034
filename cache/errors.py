"""What can go wrong and who can mend it; each is one sentence and an exit code to a user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TeacherCacheError(Exception):
    """Base of every error this project raises on purpose.

    The message is one clear sentence: what was found, what was expected, what to do.
    """

    exit_code = 2


class UserError(TeacherCacheError):
    """The user can fix it: wrong option, missing file, changed settings, no disk space."""

    exit_code = 2


class CheckFailed(TeacherCacheError):
    """A check that was asked for (the join, `verify`) found a difference."""

    exit_code = 1


class BadShardError(CheckFailed):
    """A shard's bytes differ from what its sidecar recorded."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """A clause that suggests the nearest known name, or lists what there is.

    Args:
        name: what was given.
        options: the names that exist.

    Returns:
        `did you mean 'x'?` when one is close, else `choose from a, b, c`.
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(known)}" if known else "none are known"


def first_line(error: BaseException) -> str:
    """What another library's error says first, to stand within a sentence; its name if nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
