"""What holds for a cache holds in every store."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from teacher_cache.cache.stores.named import STORES
from tests.small_caches import default_store


@pytest.fixture(scope="module", params=STORES)
def store(request: pytest.FixtureRequest) -> Iterator[str]:
    """The store that the tests' small caches are written in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # thousands; no power is cut here
        patch.setitem(default_store, "name", request.param)
        yield request.param
