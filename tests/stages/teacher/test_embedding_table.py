"""The teacher's embedding table in the cache: what is stored, how exactly, what if it is bad."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, PreTrainedModel

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.cache.manifest import MANIFEST_NAME, read_manifest
from teacher_cache.cache.verify import verify
from teacher_cache.stages import cache_teacher
from teacher_cache.stages.teacher.tables import (
    TABLE_FILE,
    StoredTable,
    embedding_table,
    read_embedding_table,
)
from tests.small_caches import read_unchecked
from tests.tiny_runs import reviews_config


class Model(PreTrainedModel):
    """A model with the given embedding weights, or without any."""

    def __init__(self, weight: torch.Tensor | None):
        torch.nn.Module.__init__(self)
        self._weight = weight

    def get_input_embeddings(self) -> torch.nn.Module:
        if self._weight is None:
            raise NotImplementedError
        return torch.nn.Embedding.from_pretrained(self._weight)


def table_of(weight: torch.Tensor, num_ids: int) -> StoredTable:
    table = embedding_table(Model(weight), num_ids=num_ids)
    assert table is not None
    return table


WEIGHT = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)) / 20


def test_rows_of_the_tokenizers_ids_in_float16_with_the_error_that_makes() -> None:
    table = table_of(WEIGHT, 25)
    assert table.rows.dtype == torch.float16
    assert torch.equal(table.rows, WEIGHT[:25].half())
    error = (table.rows.double() - WEIGHT[:25].double()).norm() / WEIGHT[:25].double().norm()
    assert table.relative_error == pytest.approx(float(error), rel=0.05)
    assert 0 < table.relative_error < 1e-3
    assert table.facts() == {
        "num_rows": 25, "width": 8, "dtype": "float16", "relative_error": table.relative_error,
    }  # fmt: skip
    assert len(table_of(WEIGHT, 40).rows) == 30  # ids without a row


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_float32_where_float16_would_lose_too_much(factor: float) -> None:
    table = table_of(WEIGHT * factor, 30)
    assert torch.equal(table.rows, WEIGHT * factor)
    assert (table.facts()["dtype"], table.relative_error) == ("float32", 0.0)


def test_bfloat16_weights_lose_nothing() -> None:
    table = table_of(WEIGHT.bfloat16(), 30)
    assert table.relative_error < 1e-6
    torch.testing.assert_close(table.rows.float(), WEIGHT.bfloat16().float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "weight", [None, torch.zeros(3, 2, dtype=torch.int8), torch.zeros(2, 2, 2)]
)
def test_a_model_without_a_table_is_said_to_have_none(
    weight: torch.Tensor | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = Model(None)
    if weight is not None:
        module = torch.nn.Module()
        module.weight = weight
        model.get_input_embeddings = lambda: module  # pyright: ignore[reportAttributeAccessIssue]
    with caplog.at_level(logging.INFO, "teacher_cache"):
        assert embedding_table(model, num_ids=3) is None
    assert "no table of input embeddings" in caplog.text


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two", "two"):
        table_of(WEIGHT.clone(), 30).write(tmp_path / name)
    assert (tmp_path / "one" / TABLE_FILE).read_bytes() == (
        tmp_path / "two" / TABLE_FILE
    ).read_bytes()
    assert [path.name for path in (tmp_path / "two").iterdir()] == [TABLE_FILE]


def test_stage_one_commits_the_teachers_table(tiny_cache: Path, tiny_bert: Path) -> None:
    manifest = read_manifest(tiny_cache)
    teacher = BertForSequenceClassification.from_pretrained(tiny_bert)
    expected = teacher.bert.embeddings.word_embeddings.weight.detach().half()
    assert torch.equal(read_embedding_table(tiny_cache, manifest), expected)
    facts = manifest.about["embeddings"]
    assert (facts["num_rows"], facts["width"], facts["dtype"]) == (*expected.shape, "float16")
    assert "embeddings" not in json.dumps(manifest.settings)


@pytest.fixture
def own_cache(tiny_cache: Path, tmp_path: Path) -> Path:
    return copytree(tiny_cache, tmp_path / "cache")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip, Path.unlink])
def test_a_bad_table_is_found_refused_and_written_again(
    own_cache: Path,
    tiny_bert: Path,
    acl_imdb: Path,
    damage: Callable[[Path], None],
) -> None:
    path = own_cache / "teacher" / TABLE_FILE
    whole = path.read_bytes()
    damage(path)
    problems = verify(own_cache).problems
    assert len(problems) == 1 and TABLE_FILE in problems[0]
    with pytest.raises(CheckFailed, match=rf"{TABLE_FILE} is missing or differs.*cache-teacher"):
        read_embedding_table(own_cache, read_manifest(own_cache))
    result = cache_teacher.run(reviews_config(own_cache, tiny_bert, acl_imdb))
    assert result.num_shards_run == 0
    assert path.read_bytes() == whole
    assert verify(own_cache).problems == ()


def forget_table(cache: Path) -> None:
    """Make it a cache of a release that did not keep the table."""
    (cache / "teacher" / TABLE_FILE).unlink()
    manifest = read_unchecked(cache)
    del manifest["teacher_files"][TABLE_FILE], manifest["about"]["embeddings"]
    (cache / MANIFEST_NAME).write_text(json.dumps(manifest))


def test_an_older_cache_gets_the_table_and_keeps_its_shards(
    own_cache: Path, tiny_cache: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    forget_table(own_cache)
    assert verify(own_cache).problems == ()
    with pytest.raises(UserError, match=r"--embeddings teacher .* `pipe cache-teacher` again"):
        read_embedding_table(own_cache, read_manifest(own_cache))
    shards = {path: path.stat().st_mtime_ns for path in own_cache.glob("*/*/*")}
    result = cache_teacher.run(reviews_config(own_cache, tiny_bert, acl_imdb))
    assert result.num_shards_run == 0
    assert {path: path.stat().st_mtime_ns for path in own_cache.glob("*/*/*")} == shards
    assert read_manifest(own_cache).teacher_files == read_manifest(tiny_cache).teacher_files
    assert load_file(own_cache / "teacher" / TABLE_FILE).keys() == {"embeddings"}
    assert verify(own_cache).problems == ()


def test_a_cache_of_a_teacher_without_a_table_says_so(own_cache: Path) -> None:
    forget_table(own_cache)
    manifest = read_unchecked(own_cache)
    manifest["about"]["embeddings"] = None
    (own_cache / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"the teacher of .* has none: leave the option out"):
        read_embedding_table(own_cache, read_manifest(own_cache))
