"""The naive baseline against sums written out in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.codec_table.renormalised import renormalised_cache, without_tail
from teacher_cache.cache.codecs.topk import IDS, LOG_PROBS, TAIL_R, TopKCodec
from teacher_cache.cache.reader import CacheReader
from teacher_cache.cache.writer import CacheWriter
from teacher_cache.stages.data.packing import pack_tokens
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import StepTotals, distillation_objective
from teacher_cache.stages.training.targets import CachedTargets
from tests.tiny_language_models import cached, tiny_teacher, write_cache

NUM_IDS, TOP_K = 40, 5
TEXTS = ("It is a truth", "universally acknowledged, that", "a single man in possession of")


def slow_loss_and_gradient(
    head: np.ndarray, log_probs: np.ndarray, student: np.ndarray
) -> tuple[float, list[float]]:
    """Of one position: the head's softmax over itself alone, and the student's over all ids."""
    weights = [math.exp(value) for value in log_probs.astype(np.float64)]
    p = {int(one): weight / sum(weights) for one, weight in zip(head, weights, strict=True)}
    scores = [math.exp(score - max(student)) for score in student]
    q = [score / sum(scores) for score in scores]
    loss = math.fsum(share * (math.log(share) - math.log(q[one])) for one, share in p.items())
    return loss, [q[one] - p.get(one, 0.0) for one in range(len(q))]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_those_of_the_head_alone(temperature: float) -> None:
    codec = TopKCodec(support_size=NUM_IDS, top_k=TOP_K, is_exact=True)
    (sample,) = pack_tokens([(b"0" * 16, np.arange(9, dtype=np.uint32))], max_length=24)
    stored = without_tail(cached(tiny_teacher(NUM_IDS), codec, sample))
    generator = torch.Generator().manual_seed(1)
    student = 3 * torch.randn((9, NUM_IDS), generator=generator, dtype=torch.float64)
    student.requires_grad_()
    targets = CachedTargets(
        codec=codec,
        stored={spec.name: torch.from_numpy(stored[spec.name]) for spec in codec.fields},
        temperature=temperature,
        num_outcomes=NUM_IDS,
    ).at_positions(slice(None))
    terms = distillation_objective(
        student,
        targets,
        torch.zeros(9, dtype=torch.int64),
        config=ObjectiveConfig(alpha=1.0, temperature=temperature),
        totals=StepTotals(num_labeled=9, num_labels=9),
    )
    terms.loss.backward()
    slow = [
        slow_loss_and_gradient(
            stored[IDS][at],
            stored[LOG_PROBS][at].astype(np.float64) / temperature,
            student.detach().numpy()[at] / temperature,
        )
        for at in range(9)
    ]
    # The objective's T^2 over the mean of the positions, and 1 / T of the softened student.
    assert float(terms.loss.detach()) == pytest.approx(
        temperature**2 * math.fsum(loss for loss, _ in slow) / 9, rel=1e-6
    )
    gradient = temperature * np.array([row for _, row in slow]) / 9
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), gradient, atol=1e-7)


def test_cache_without_tails_is_the_cache_but_for_these(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = tiny_teacher(len(smollm2_tokenizer))
    codec = TopKCodec(support_size=teacher.support.size, top_k=TOP_K)
    # More documents than a shard has, so that there are two.
    source = write_cache(tmp_path / "source", codec, smollm2_tokenizer, TEXTS * 2, teacher)
    made = renormalised_cache(source, tmp_path / "made")
    before, after = CacheReader(source), CacheReader(made)
    assert after.manifest.complete
    assert after.manifest.fingerprint != before.manifest.fingerprint
    assert after.manifest.teacher_files == before.manifest.teacher_files
    assert len(after) == len(before) and len(after.sidecars) == len(before.sidecars) == 2
    for idx in range(len(before)):
        old, new = before.sample(idx), after.sample(idx)
        assert old.keys() == new.keys()
        for name, values in old.items():
            if name == TAIL_R:
                assert np.isneginf(new[name]).all() and np.isfinite(values).all()
            else:
                np.testing.assert_array_equal(new[name], values)


def test_unfinished_cache_is_gone_on_with_and_a_finished_one_left_alone(
    tmp_path: Path, smollm2_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = tiny_teacher(len(smollm2_tokenizer))
    codec = TopKCodec(support_size=teacher.support.size, top_k=TOP_K)
    source = write_cache(tmp_path / "source", codec, smollm2_tokenizer, TEXTS * 2, teacher)
    commit = CacheWriter.commit

    def stops_at_the_second(writer: CacheWriter, split: str, shard_idx: int, *args: Any, **kw: Any):
        if shard_idx == 1:
            raise KeyboardInterrupt
        return commit(writer, split, shard_idx, *args, **kw)

    with monkeypatch.context() as patched:
        patched.setattr(CacheWriter, "commit", stops_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            renormalised_cache(source, tmp_path / "made")
    made = renormalised_cache(source, tmp_path / "made")
    finished = (made / "manifest.json").read_bytes()
    assert len(CacheReader(made)) == len(CacheReader(source))
    assert renormalised_cache(source, tmp_path / "made") == made
    assert (made / "manifest.json").read_bytes() == finished
