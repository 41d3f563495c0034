"""Held-out figures against sums over positions in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.codec_table.held_out import BATCH_SIZE, Figures, HeldOut
from benchmarks.codec_table.teacher import trained_tokenizer
from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.student import build_language_model
from tests.reference_losses import cross_entropy, expected_calibration_error, kl
from tests.tiny_language_models import tiny_teacher, write_cache
from tests.tiny_students import small_config

TEXTS = [f"No {k}: {'she was in every respect ' * (k % 3)}happy." for k in range(2 * BATCH_SIZE)]
SMALL_IDS = 300


@pytest.fixture(scope="module")
def judged(
    tmp_path_factory: pytest.TempPathFactory, small_tokenizer: PreTrainedTokenizerBase
) -> Path:
    teacher = tiny_teacher(len(small_tokenizer))
    codec = DenseCodec(support_size=teacher.support.size)
    folder = tmp_path_factory.mktemp("held-out") / "cache"
    return write_cache(folder, codec, small_tokenizer, TEXTS, teacher)


@pytest.fixture(scope="module")
def small_tokenizer() -> PreTrainedTokenizerBase:
    return trained_tokenizer(TEXTS, SMALL_IDS)


def positions(cache: Path) -> list[tuple[torch.Tensor, list[float], int]]:
    """Of each that counts: its document up to it, the teacher's logits, the next token."""
    reader, found = CacheReader(cache), []
    for idx in range(len(reader)):
        sample = reader.sample(idx)
        ids, segment = sample["input_ids"].astype(np.int64), sample["segment"]
        for at in np.flatnonzero(sample["loss_mask"]):
            start = int(np.flatnonzero(segment == segment[at])[0])
            before = torch.from_numpy(ids[start : at + 1])
            found.append((before, sample["dense_logits"][at].astype(float).tolist(), ids[at + 1]))
    return found


def slow_figures(rows: list[tuple[list[float], list[float], int]]) -> Figures:
    """Of the teacher's and a model's logits, and the next token, at each position."""
    num = len(rows)
    logits, labels = [row[1] for row in rows], [int(row[2]) for row in rows]
    return Figures(
        ce=sum(cross_entropy(row, label, 0.0) for row, label in zip(logits, labels, strict=True))
        / num,
        kl=sum(kl(teacher, student, 1.0) for teacher, student, _ in rows) / num,
        ece=expected_calibration_error(logits, labels),
        accuracy=sum(
            int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True)
        )
        / num,
    )


def close(found: Figures, expected: Figures) -> None:
    assert vars(found) == pytest.approx(vars(expected), rel=1e-4, abs=1e-7)


def test_student_is_judged_at_every_position_that_counts(judged: Path) -> None:
    config = small_config(vocab_size=CacheReader(judged).manifest.settings["support"]["size"])
    student = build_language_model(config, seed=0).eval()
    student.lm_head.weight.data *= 30  # the table too: sure enough that confidences differ
    rows = []
    with torch.no_grad():
        for before, teacher, label in positions(judged):
            logits = student(input_ids=before[None]).logits[0, -1].double()
            rows.append((teacher, logits.tolist(), label))
    assert len(rows) > 10 * BATCH_SIZE
    close(HeldOut(judged).of_student(student), slow_figures(rows))


def test_teacher_is_judged_by_what_is_cached(judged: Path) -> None:
    rows = [(teacher, teacher, label) for _, teacher, label in positions(judged)]
    found = HeldOut(judged).of_teacher()
    close(found, slow_figures(rows))
    assert found.kl == 0
