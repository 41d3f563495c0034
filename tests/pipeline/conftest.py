from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.ready_made import ReadyMade
from tests.tiny_runs import cache_reviews


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail at the first attempt to reach or to look up another machine."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"asked the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)


@pytest.fixture(scope="session")
def tiny_cache(ready_made: ReadyMade, tiny_bert: Path, acl_imdb: Path) -> Path:
    """The tiny BERT's logits and pooled states over 120 labelled and 60 unlabelled reviews."""
    return ready_made.folder(
        "caches/reviews-pooled",
        lambda folder: cache_reviews(folder, tiny_bert, acl_imdb, hidden="pooled"),
    )
