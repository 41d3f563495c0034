"""What the rows keep of a tiny teacher: only what must hold whatever its weights are."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
from transformers import GPT2Config

from benchmarks.codec_table.kept import Comparison, Kept
from benchmarks.codec_table.rows import DISTILLED, NONE, ON_CPU, ROWS
from benchmarks.codec_table.teacher import trained_tokenizer
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.teacher.config import TeacherConfig
from teacher_cache.stages.teacher.load import load_language_model
from tests.tiny_models import tiny_language_model
from tests.tiny_students import small_config

TEXTS = [f"Chapter {k}. She was {'not ' * (k % 9)}at all astonished." for k in range(60)]
NUM_IDS = 300


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    folder: Path = tmp_path_factory.mktemp("teacher")
    tokenizer = trained_tokenizer(TEXTS, NUM_IDS)
    num_ids = len(tokenizer)
    config = GPT2Config(vocab_size=num_ids, n_embd=16, n_layer=1, n_head=2, n_positions=128)
    tiny_language_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teacher = load_language_model(TeacherConfig(teacher=str(folder), **ON_CPU))
    student = build_language_model(small_config(vocab_size=num_ids), seed=0)
    documents = [
        Document(text=text, source="tiny", split="train", position=position)
        for position, text in enumerate(TEXTS)
    ]
    comparison = Comparison(teacher, student, (NONE, *DISTILLED))
    return comparison.over(documents, batch_size=1, steps=8)


def test_whole_distributions_lose_nothing_and_point_where_the_dense_gradient_does(
    kept: dict[str, Kept],
) -> None:
    for name in ("dense", "hidden"):
        assert kept[name].kl < 1e-4 and kept[name].mass_outside == 0
        assert kept[name].angles.step < 1 and kept[name].angles.norm == pytest.approx(1, abs=0.01)
    assert kept["dense"].angles.all_steps == 0


def test_only_the_renormalised_give_mass_up(kept: dict[str, Kept]) -> None:
    for row in DISTILLED:
        assert (kept[row.name].kl == math.inf) == row.is_renormalised
    for top_k in (12, 50):
        naive, ghost = kept[f"naive-{top_k}"], kept[f"ghost-{top_k}"]
        assert naive.mass_outside == ghost.mass_outside > 0
        assert naive.num_ids == ghost.num_ids == top_k
        assert ghost.kl < 1e-3
        # Without the five temperatures' tails of four bytes.
        assert ghost.bytes_per_token - naive.bytes_per_token == 20
    assert kept["ghost-64"].mass_outside < kept["ghost-50"].mass_outside


def test_more_positions_help_draws_and_no_bias(kept: dict[str, Kept]) -> None:
    drawn, naive = kept["sampled-50"].angles, kept["naive-12"].angles
    assert drawn.all_steps / drawn.step < 0.8 < 0.9 < naive.all_steps / naive.step
    assert kept["none"].angles.all_steps > 0


def test_figures_survive_being_written(kept: dict[str, Kept]) -> None:
    for one in kept.values():
        assert Kept.from_json(asdict(one)) == one
    assert set(kept) <= {row.name for row in ROWS}
