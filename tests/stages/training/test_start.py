"""Where a Mamba student's first weights come from."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.manifest import read_manifest
from teacher_cache.stages.join.join import Joined, join
from teacher_cache.stages.join.report import Difference, JoinReport
from teacher_cache.stages.teacher.tables import read_embedding_table, read_token_states
from teacher_cache.stages.training.start import (
    StartingStudent,
    from_teacher,
    side_by_side,
    start_student,
)
from tests.tiny_runs import MAX_LENGTH, cache_reviews, student_config


@pytest.fixture(scope="module")
def joined(tiny_cache: Path) -> Joined:
    config = student_config(tiny_cache, tiny_cache)
    return join(tiny_cache, config.join, longest_sample=MAX_LENGTH)


def start(cache: Path, joined: Joined, **changes: Any) -> StartingStudent:
    return start_student(
        student_config(cache, cache, **changes),
        joined,
        id2label={0: "neg", 1: "pos"},
        lengths=np.array([4, MAX_LENGTH]),
    )


@pytest.mark.parametrize("d_model", [8, 48])  # narrower and wider than the teacher's 32
def test_the_teachers_embeddings_replace_the_fresh_ones_and_nothing_else(
    tiny_cache: Path, joined: Joined, caplog: pytest.LogCaptureFixture, d_model: int
) -> None:
    fresh = start(tiny_cache, joined, d_model=d_model)
    with caplog.at_level(logging.INFO, "teacher_cache"):
        taken = start(tiny_cache, joined, d_model=d_model, embeddings="teacher")
    before, after = fresh.model.state_dict(), taken.model.state_dict()
    name = "backbone.embedding.weight"
    table = read_embedding_table(tiny_cache, read_manifest(tiny_cache))
    expected = from_teacher(before[name], table)
    assert torch.equal(after[name], expected.rows)
    assert not torch.equal(after[name], before[name])
    for other in before.keys() - {name}:
        assert torch.equal(after[other], before[other]), other
    assert f"keeps {100 * expected.energy_kept:.1f} % of its table's energy" in caplog.text
    assert fresh.settings["teacher_embeddings_sha256"] is None
    assert len(taken.settings["teacher_embeddings_sha256"]) == 64


def test_embeddings_from_the_teachers_states_too(
    tmp_path: Path, tiny_bert: Path, acl_imdb: Path
) -> None:
    cache = cache_reviews(tmp_path / "cache", tiny_bert, acl_imdb, hidden="pooled")
    config = student_config(cache, cache)
    joined = join(cache, config.join, longest_sample=MAX_LENGTH)
    taken = start(cache, joined, embeddings="teacher-states")
    manifest = read_manifest(cache)
    table = side_by_side(read_embedding_table(cache, manifest), read_token_states(cache, manifest))
    name = "backbone.embedding.weight"
    fresh = start(cache, joined).model.state_dict()[name]
    assert torch.equal(taken.model.state_dict()[name], from_teacher(fresh, table).rows)
    without = start(cache, joined, embeddings="teacher").settings
    assert len(taken.settings["token_states_sha256"]) == 64
    assert taken.settings.items() - without.items() == {
        ("token_states_sha256", taken.settings["token_states_sha256"])
    }


def test_ids_that_mean_other_strings_take_no_embeddings(tiny_cache: Path, joined: Joined) -> None:
    other = Difference(name="id-to-string table", cache="a", student="b", waivable=False)
    report = JoinReport(compared=(), differences=(other,))
    with pytest.raises(UserError, match=r"--embeddings teacher needs ids .* other strings"):
        start(tiny_cache, replace(joined, report=report), embeddings="teacher")
