"""Silence for `datasets`, whose bars and warnings would break into ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.utils import logging as datasets_logging


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Turn the progress bars and the log messages of `datasets` off, and back as they were."""
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
