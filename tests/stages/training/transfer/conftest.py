from pathlib import Path

import pytest

from tests.ready_made import ReadyMade
from tests.tiny_runs import cache_reviews


@pytest.fixture(scope="session")
def transfer_cache(ready_made: ReadyMade, tiny_bert: Path, acl_imdb: Path) -> Path:
    """The tiny BERT's logits, pooled states, and the maps and states of both its layers."""
    return ready_made.folder(
        "caches/reviews-transfer",
        lambda folder: cache_reviews(
            folder,
            tiny_bert,
            acl_imdb,
            hidden="pooled,0,1",
            attention="mean",
            attention_layers="all",
        ),
    )
