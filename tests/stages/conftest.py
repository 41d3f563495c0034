from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from teacher_cache.stages import train_student
from tests.ready_made import ReadyMade
from tests.tiny_runs import cache_reviews, read_tokenizers_once


@pytest.fixture(scope="module")
def tokenizers_read_once() -> Iterator[None]:
    """A module's trainings join a cache, and describe a tokenizer, once each."""
    with pytest.MonkeyPatch.context() as patched:
        read_tokenizers_once(partial(patched.setattr, train_student))
        yield


@pytest.fixture(scope="session")
def tiny_cache(ready_made: ReadyMade, tiny_bert: Path, acl_imdb: Path) -> Path:
    """The tiny BERT's logits over 120 labelled and 60 unlabelled reviews, cut to 24 tokens."""
    return ready_made.folder(
        "caches/reviews", lambda folder: cache_reviews(folder, tiny_bert, acl_imdb)
    )


@pytest.fixture(scope="session")
def pooled_cache(ready_made: ReadyMade, tiny_bert: Path, acl_imdb: Path) -> Path:
    """The same with the teacher's pooled states, of width 32."""
    return ready_made.folder(
        "caches/reviews-pooled",
        lambda folder: cache_reviews(folder, tiny_bert, acl_imdb, hidden="pooled"),
    )
