"""Slices of one cache in processes of their own, killed at random: the cache is that of one run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.cache.manifest import read_manifest
from teacher_cache.cache.verify import verify
from teacher_cache.stages.cache_job import CacheTeacherConfig
from tests.integration.fork_server import ForkServer
from tests.small_caches import contents
from tests.tiny_models import write_tiny_bert
from tests.tiny_runs import language_config, reviews_config

NUM_SLICES = 2
NUM_KILLS = 4
MOST_RUNS = 60


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ForkServer]]:
    """One for each slice, so that they run at the same time."""
    folder = tmp_path_factory.mktemp("servers")
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                ForkServer("tests.integration.stage_one_child", folder / f"{idx}.txt")
            )
            for idx in range(NUM_SLICES)
        ]


def _given(config: CacheTeacherConfig, cache: Path, **changes: Any) -> str:
    return config.model_copy(update={"out": cache, **changes}).model_dump_json()


@pytest.fixture
def classifier(tmp_path: Path, bert_tokenizer: Any, acl_imdb: Path) -> CacheTeacherConfig:
    texts = [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]
    teacher = write_tiny_bert(
        tmp_path / "teacher", bert_tokenizer.train_new_from_iterator(texts, 300)
    )
    return reviews_config(tmp_path, teacher, acl_imdb, shard_documents=15, views=1)


@pytest.fixture
def language_model(
    tmp_path: Path, small_language_model: Path, acl_imdb: Path
) -> CacheTeacherConfig:
    return language_config(tmp_path, small_language_model, acl_imdb, shard_documents=2)


@pytest.mark.parametrize(
    ("kind", "store"),
    [("classifier", "arrow"), ("classifier", "zarr"), ("language_model", "arrow"),
     ("language_model", "zarr")],
)  # fmt: skip
def test_slices_at_once_killed_at_random(
    request: pytest.FixtureRequest,
    servers: list[ForkServer],
    tmp_path: Path,
    kind: str,
    store: str,
) -> None:
    config = request.getfixturevalue(kind).model_copy(update={"format": store})
    for server in servers:
        warm = tmp_path / f"warm-{server.output.stem}"
        server.call("warm_up", config=_given(config, warm))
    whole = tmp_path / "whole"
    started = time.monotonic()
    assert servers[0].run("cache_slice", config=_given(config, whole)) == 0
    seconds = time.monotonic() - started
    cache, rng = tmp_path / "cache", random.Random(store)
    slices = [f"{idx}/{NUM_SLICES}" for idx in range(NUM_SLICES)]
    num_kills = 0
    for _ in range(MOST_RUNS):
        started_at = [
            server.start("cache_slice", config=_given(config, cache, slice=name))
            for server, name in zip(servers, slices, strict=True)
        ]
        if num_kills < NUM_KILLS:
            time.sleep(rng.random() * seconds)
            os.kill(rng.choice(started_at), signal.SIGKILL)
        codes = [server.wait() for server in servers]
        num_kills += codes.count(-signal.SIGKILL)
        assert set(codes) <= {0, -signal.SIGKILL}, [
            one.output.read_text()[-3000:] for one in servers
        ]
        if codes == [0, 0]:
            break
    assert num_kills > 0 and read_manifest(cache).complete
    assert contents(cache) == contents(whole)
    assert verify(cache).problems == ()
