"""What every way of opening a source shares: silence, the split to read, and the failure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import datasets
from datasets.utils import logging as datasets_logging

from teacher_cache.cache.errors import UserError, did_you_mean


class SourceUnavailable(UserError):
    """A source is not there, cannot be reached or holds nothing: another may be tried instead."""


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn the bars and log messages of `datasets`, which break into ours, off and back again."""
    had_bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets_logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    finally:
        datasets_logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def choose_split(splits: Sequence[str], wanted: str | None, source: str) -> str:
    """The wanted split, or without a wish `train` or the only one.

    Args:
        splits: the names there are.
        wanted: the name asked for.
        source: what to call the source in a message.

    Raises:
        UserError: if it is not there, or none was asked for where there are several.
    """
    listed = f"it has {', '.join(splits)}"
    if wanted is not None:
        if wanted not in splits:
            raise UserError(
                f"{source} has no split {wanted!r} ({listed}): {did_you_mean(wanted, splits)}"
            )
        return wanted
    if "train" in splits:
        return "train"
    if len(splits) != 1:
        raise UserError(f"{source} has no split 'train' ({listed}): name the split to read")
    return splits[0]
