"""Angles against vectors whose angles are known; a step's gradient against autograd in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.codec_table.gradients import GradientSums, angle, step_gradient
from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.stages.data.packing import next_ids, pack_tokens
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.training.batches import PackedCollator
from tests.tiny_language_models import cached, tiny_teacher
from tests.tiny_students import small_config

NUM_IDS = 50


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 4.0, 58.0, 90.0, 135.0, 180.0])
def test_angle_is_the_one_that_a_vector_was_turned_by(degrees: float) -> None:
    rng = np.random.default_rng(0)
    one, across = rng.standard_normal((2, 1000))
    across -= one * (one @ across) / (one @ one)
    across *= np.linalg.norm(one) / np.linalg.norm(across)
    turned = math.cos(math.radians(degrees)) * one + math.sin(math.radians(degrees)) * across
    found = angle(torch.from_numpy(one), torch.from_numpy(7.5 * turned))
    assert found == pytest.approx(degrees, rel=1e-6, abs=1e-12)


def test_noise_averages_out_and_a_bias_stays() -> None:
    dense = torch.zeros(200, dtype=torch.float64)
    dense[0] = 1.0
    noisy, biased = GradientSums(), GradientSums()
    for step in range(100):
        noise = torch.zeros_like(dense)
        noise[step + 1] = 1.0  # across the dense gradient, and across every other noise
        noisy.add(dense + noise, dense)
        bias = torch.zeros_like(dense)
        bias[-1] = 1.0
        biased.add(dense + bias, dense)
    total = 100 * dense
    found, stuck = (sums.against(total, [8, 10] * 50) for sums in (noisy, biased))
    assert (found.num_steps, found.positions) == (100, 9)
    assert found.step == pytest.approx(45) and stuck.step == pytest.approx(45)
    assert found.all_steps == pytest.approx(math.degrees(math.atan(math.sqrt(100) / 100)))
    assert stuck.all_steps == pytest.approx(45)
    assert stuck.norm == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_step_gradient_is_that_of_sums_over_all_positions(alpha: float) -> None:
    teacher, codec = tiny_teacher(NUM_IDS), DenseCodec(support_size=NUM_IDS)
    documents = [(bytes([k]) * 16, np.arange(k, k + 7, dtype=np.uint32)) for k in range(3)]
    samples = [cached(teacher, codec, one) for one in pack_tokens(documents, max_length=14)]
    batch = PackedCollator(0, codec)(
        [one | {"next_ids": next_ids(one["input_ids"], one["segment"])} for one in samples]
    )
    student = build_language_model(small_config(vocab_size=NUM_IDS), seed=0).eval()
    found = step_gradient(student, batch, codec, alpha=alpha)
    assert all(one.grad is None for one in student.parameters())

    losses = []
    for sample in samples:
        for piece in range(int(sample["segment"][-1]) + 1):
            where = sample["segment"] == piece
            losses += slow_losses(student, sample, where, alpha)
    slow = torch.autograd.grad(torch.stack(losses).mean(), list(student.parameters()))
    expected = torch.cat([one.double().flatten() for one in slow])
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def slow_losses(
    student: MambaStudentForCausalLM, sample: dict[str, np.ndarray], where: np.ndarray, alpha: float
) -> list[torch.Tensor]:
    """A document's losses, position by position, its own logits in float64."""
    ids = torch.from_numpy(sample["input_ids"][where].astype(np.int64))
    log_q = torch.log_softmax(student(input_ids=ids[None]).logits[0].double(), dim=-1)
    stored = torch.from_numpy(sample["dense_logits"][where].astype(np.float64))
    log_p = torch.log_softmax(stored, dim=-1)
    return [
        alpha * (log_p[at].exp() * (log_p[at] - log_q[at])).sum()
        - (1 - alpha) * log_q[at, ids[at + 1]]
        for at in range(len(ids) - 1)
    ]
