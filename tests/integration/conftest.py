"""Caches and runs that several tests look at, made once by the real commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.command_line import TINY_STUDENT, done
from tests.tiny_models import write_tiny_language_model

Copy = Callable[[Path], Path]

SHARD_DOCUMENTS = 32  # 4 shards of labelled and 2 of unlabelled text


@pytest.fixture(scope="session")
def bert_cache(tmp_path_factory: pytest.TempPathFactory, acl_imdb: Path, tiny_bert: Path) -> Path:
    """A complete cache of the stand-in by the tiny BERT; only to be read."""
    cache = tmp_path_factory.mktemp("caches") / "bert"
    done(*cache_command(acl_imdb, tiny_bert, cache))
    return cache


@pytest.fixture(scope="session")
def bert_run(tmp_path_factory: pytest.TempPathFactory, bert_cache: Path) -> Path:
    """A finished run on `bert_cache`; only to be read."""
    run = tmp_path_factory.mktemp("runs") / "bert"
    done("train-student", "--cache", bert_cache, "--out", run, *TINY_STUDENT)
    return run


@pytest.fixture(scope="session")
def small_language_model(
    tmp_path_factory: pytest.TempPathFactory,
    gpt2_tokenizer: PreTrainedTokenizerBase,
    acl_imdb: Path,
) -> Path:
    """A tiny GPT-2 with 300 ids: writing 50,257 of them anew in each run would take the time."""
    texts = [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]
    assert isinstance(gpt2_tokenizer, PreTrainedTokenizerFast)
    tokenizer = gpt2_tokenizer.train_new_from_iterator(texts, 300)
    return write_tiny_language_model(tmp_path_factory.mktemp("small-lm") / "gpt2", tokenizer)


@pytest.fixture
def own(tmp_path: Path) -> Copy:
    """Copy a cache or a run, to be damaged."""

    def copy(folder: Path) -> Path:
        return shutil.copytree(folder, tmp_path / f"own-{folder.name}")

    return copy


def cache_command(data: Path, teacher: Path, cache: Path) -> tuple[str | Path, ...]:
    """The command that makes `bert_cache`, or goes on with it."""
    return (
        "cache-teacher", "--data", data, "--teacher", teacher, "--out", cache,
        "--shard-documents", str(SHARD_DOCUMENTS),
    )  # fmt: skip


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file's time and bytes, by its path in the folder."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
