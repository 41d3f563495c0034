"""The failure that a fallback may answer."""

from __future__ import annotations

from teacher_cache.cache.errors import UserError


class SourceUnavailable(UserError):
    """A source is not there, cannot be reached or holds nothing: another may be tried instead."""
