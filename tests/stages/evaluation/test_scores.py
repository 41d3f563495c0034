"""Scores against slow ones: one document at a time, whole softmaxes, float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.stages.data.packing import PackedRow, PackedSample, pack_tokens
from teacher_cache.stages.evaluation.models import LanguageModel, TeacherModel
from teacher_cache.stages.evaluation.references import CachedReference, LiveReference
from teacher_cache.stages.evaluation.scores import score
from teacher_cache.stages.models.batching import PACKED, PADDED, Batching
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from tests.tiny_language_models import MAX_LENGTH, WIDTH, cached, tiny_teacher

NUM_IDS, VOCAB_SIZE = 61, 64  # the teacher's, and rows of the student's table
UNUSED = (5, 17)
TEACHER = tiny_teacher(NUM_IDS, unused=UNUSED)
HEAD = LanguageModelHead.of(TEACHER.model).of_support(TEACHER.support)
USED = [i for i in range(NUM_IDS) if i not in UNUSED]
LENGTHS = (7, 5, 12, 1, 30, 9, 2)  # documents of one token, and longer than a sample


def packed() -> list[PackedSample]:
    rng = np.random.default_rng(0)
    documents = [
        (bytes([i]) * 16, rng.choice(USED, length).astype(np.uint32))
        for i, length in enumerate(LENGTHS)
    ]
    return pack_tokens(documents, max_length=MAX_LENGTH)


SAMPLES = packed()
ROWS = [
    PackedRow(input_ids=one.input_ids, segment=one.segment, loss_mask=one.loss_mask)
    for one in SAMPLES
]


def student(arch: str = "mamba2", seed: int = 0) -> LanguageModel:
    config = MambaStudentConfig(
        arch=arch, vocab_size=VOCAB_SIZE, d_model=8, num_layers=1, expand=2, d_state=4, head_dim=8
    )
    model = build_language_model(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return of_model(model)


def of_model(model: Any, *, batching: Batching = PADDED) -> LanguageModel:
    tokenizer: Any = None  # ids alone are read
    return LanguageModel(
        name="student", model=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batching=batching
    )


def live(*, batching: Batching) -> LiveReference:
    tokenizer: Any = None
    teacher = TeacherModel(
        name="teacher",
        model=TEACHER.model,
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        batching=batching,
        support=TEACHER.support,
    )
    return LiveReference(teacher=teacher, rows=ROWS)


def each_position(model: Any) -> list[tuple[list[float], int]]:
    """Logits in float64 and the next token where there is one; a document by itself."""
    wide = copy.deepcopy(model).double()
    found = []
    for sample in SAMPLES:
        for segment in range(int(sample.segment[-1]) + 1):
            ids = sample.input_ids[sample.segment == segment].astype(np.int64)
            with torch.no_grad():
                logits = wide(torch.from_numpy(ids)[None], use_cache=False).logits[0]
            found += [(logits[t].tolist(), int(ids[t + 1])) for t in range(len(ids) - 1)]
    return found


def log_softmax(logits: list[float], outcomes: list[int]) -> dict[int, float]:
    largest = max(logits[i] for i in outcomes)
    total = sum(math.exp(logits[i] - largest) for i in outcomes)
    return {i: logits[i] - largest - math.log(total) for i in outcomes}


def slow_score(model: Any, *, head: int | None = None) -> dict[str, float]:
    """Means by definition; with `head`, the KL of that many tokens and one outcome for the rest."""
    nll = kl = agreement = teacher_nll = 0.0
    positions = each_position(model)
    for (logits, following), (of_teacher, _) in zip(
        positions, each_position(TEACHER.model), strict=True
    ):
        everything = log_softmax(logits, list(range(VOCAB_SIZE)))
        log_q, log_p = log_softmax(logits, USED), log_softmax(of_teacher, USED)
        nll -= everything[following]
        teacher_nll -= log_p[following]
        kept = sorted(USED, key=lambda i: -log_p[i])[:head]
        kl += sum(math.exp(log_p[i]) * (log_p[i] - log_q[i]) for i in kept)
        rest = [i for i in USED if i not in kept]
        if rest:
            p, q = (sum(math.exp(of[i]) for i in rest) for of in (log_p, log_q))
            kl += p * math.log(p / q)
        agreement += max(everything, key=lambda i: everything[i]) == kept[0]
    num = len(positions)
    return {
        "nll": nll / num,
        "kl": kl / num,
        "agreement": agreement / num,
        "teacher": teacher_nll / num,
    }


def test_only_positions_with_a_next_token_count() -> None:
    in_pieces = 30 // MAX_LENGTH  # a border more in the long document
    assert sum(int(row.loss_mask.sum()) for row in ROWS) == sum(LENGTHS) - len(LENGTHS) - in_pieces
    assert [n for row in ROWS for n in row.lengths] == [7, 5, 12, 1, 24, 6, 9, 2]


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
@pytest.mark.parametrize(
    ("batch_tokens", "slice_logits", "batching"),
    [(1, 1, PACKED), (60, 5 * VOCAB_SIZE, PADDED), (10_000, 2**24, PACKED)],
)
def test_a_student_beside_its_teacher(
    arch: str, batch_tokens: int, slice_logits: int, batching: Batching
) -> None:
    one = student(arch)
    found = score(
        [one], ROWS, live(batching=batching), batch_tokens=batch_tokens, slice_logits=slice_logits
    )
    slow = slow_score(one.model)
    assert found.teacher is not None
    assert found.num_positions == len(each_position(one.model))
    (its,) = found.models
    assert {"nll": its.nll, "kl": its.kl, "agreement": its.agreement} == pytest.approx(
        {name: slow[name] for name in ("nll", "kl", "agreement")}, rel=1e-5
    )
    assert found.teacher.nll == pytest.approx(slow["teacher"], rel=1e-5)
    assert its.perplexity == pytest.approx(math.exp(slow["nll"]), rel=1e-4)


def test_a_teacher_agrees_with_itself() -> None:
    found = score([of_model(TEACHER.model)], ROWS, live(batching=PACKED), batch_tokens=100)
    (its,) = found.models
    assert its.kl == pytest.approx(0, abs=1e-6)
    # Where an unused row, which only the student may choose, is not the most probable.
    tops = [max(range(NUM_IDS), key=lambda i: logits[i]) for logits, _ in positions_of_teacher()]
    assert its.agreement == pytest.approx(sum(i not in UNUSED for i in tops) / len(tops))


def positions_of_teacher() -> list[tuple[list[float], int]]:
    return each_position(TEACHER.model)


def test_several_models_are_scored_as_each_alone() -> None:
    models = [student(seed=0), student(seed=1)]
    together = score(models, ROWS, live(batching=PACKED), batch_tokens=50)
    for i, one in enumerate(models):
        assert (
            score([one], ROWS, live(batching=PACKED), batch_tokens=50).models[0]
            == together.models[i]
        )
    assert together.models[0] != together.models[1]


def test_without_a_teacher() -> None:
    one = student()
    found = score([one], ROWS, None, batch_tokens=50)
    assert found.models[0].nll == pytest.approx(slow_score(one.model)["nll"], rel=1e-5)
    assert (found.models[0].kl, found.models[0].agreement, found.teacher) == (None, None, None)


CODECS: dict[str, tuple[Codec, int | None, float]] = {  # with its head, and how exact it is
    "topk": (TopKCodec(support_size=NUM_IDS, top_k=6), 6, 2e-2),
    "exact": (TopKCodec(support_size=NUM_IDS, top_k=5, is_exact=True), 5, 1e-3),
    "hidden": (HiddenCodec(support_size=NUM_IDS, width=WIDTH, head=HEAD), None, 2e-3),
    "dense": (DenseCodec(support_size=NUM_IDS), None, 2e-3),
}


@pytest.mark.parametrize("name", CODECS)
def test_a_cache_stands_for_the_teacher(name: str) -> None:
    codec, head, tolerance = CODECS[name]
    one = student()
    samples = [cached(TEACHER, codec, sample) for sample in SAMPLES]
    reference = CachedReference(samples, codec, TEACHER.support, torch.device("cpu"))
    found = score([one], reference.rows, reference, batch_tokens=60)
    slow = slow_score(one.model, head=head)
    assert found.models[0].nll == pytest.approx(slow["nll"], rel=1e-5)
    assert found.models[0].kl == pytest.approx(slow["kl"], rel=tolerance)
    assert found.models[0].agreement == pytest.approx(slow["agreement"])
    assert found.teacher is not None and found.teacher.nll == pytest.approx(
        slow["teacher"], rel=1e-3
    )


def test_draws_give_no_agreement() -> None:
    codec = SampledCodec(support_size=NUM_IDS, num_draws=200)
    one = student()
    samples = [cached(TEACHER, codec, sample) for sample in SAMPLES]
    reference = CachedReference(samples, codec, TEACHER.support, torch.device("cpu"))
    (its,) = score([one], reference.rows, reference, batch_tokens=60).models
    assert its.agreement is None
    assert its.kl == pytest.approx(slow_score(one.model)["kl"], rel=0.1)  # of 200 draws
