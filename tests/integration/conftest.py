"""Caches and runs that several tests look at, made once by the real commands."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.command_line import TINY_STUDENT, done
from tests.ready_made import ReadyMade
from tests.tiny_models import write_tiny_language_model

Copy = Callable[[Path], Path]

SHARD_DOCUMENTS = 32  # 4 shards of labelled and 2 of unlabelled text


@pytest.fixture(scope="session")
def bert_cache(ready_made: ReadyMade, acl_imdb: Path, tiny_bert: Path) -> Path:
    """A complete cache of the stand-in by the tiny BERT; only to be read."""
    return ready_made.folder(
        "caches/bert", lambda folder: done(*cache_command(acl_imdb, tiny_bert, folder))
    )


@pytest.fixture(scope="session")
def bert_run(ready_made: ReadyMade, bert_cache: Path) -> Path:
    """A finished run on `bert_cache`; only to be read."""
    return ready_made.folder(
        "runs/bert",
        lambda folder: done("train-student", "--cache", bert_cache, "--out", folder, *TINY_STUDENT),
    )


@pytest.fixture(scope="session")
def small_language_model(
    ready_made: ReadyMade, gpt2_tokenizer: PreTrainedTokenizerBase, acl_imdb: Path
) -> Path:
    """A tiny GPT-2 with 300 ids: writing 50,257 of them anew in each run would take the time."""

    def make(folder: Path) -> Path:
        texts = [path.read_text() for path in sorted(acl_imdb.glob("train/*/*.txt"))]
        assert isinstance(gpt2_tokenizer, PreTrainedTokenizerFast)
        tokenizer = gpt2_tokenizer.train_new_from_iterator(texts, 300)
        return write_tiny_language_model(folder, tokenizer)

    return ready_made.folder("teachers/gpt2-of-300-ids", make)


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
