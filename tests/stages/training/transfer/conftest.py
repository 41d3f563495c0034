from pathlib import Path

import pytest

from tests.tiny_runs import cache_reviews


@pytest.fixture(scope="session")
def transfer_cache(
    tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, acl_imdb: Path
) -> Path:
    """The tiny BERT's logits, pooled states, and the maps and states of both its layers."""
    folder = tmp_path_factory.mktemp("caches") / "transfer"
    return cache_reviews(
        folder,
        tiny_bert,
        acl_imdb,
        hidden="pooled,0,1",
        attention="mean",
        attention_layers="all",
    )
