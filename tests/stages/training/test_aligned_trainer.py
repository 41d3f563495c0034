"""Steps of aligned trainings against loops over single documents, positions and chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.stages.join.aligned_sample import AlignedSample
from teacher_cache.stages.losses.chunk_likelihood import DEFAULT_TAU
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.processes import share_of
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.auxiliaries import WithAuxiliaries
from teacher_cache.stages.training.batches import (
    AlignedCollator,
    AlignedSamples,
    AlternatingBatches,
    Batch,
    BothKinds,
    PackedCollator,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.targets import FixedMap
from teacher_cache.stages.training.trainer import StudentTrainer
from teacher_cache.stages.training.vocabulary_projection import (
    Candidates,
    LearnedProjection,
    learned_share_at,
)
from tests.lessons import held_out_tokens, tokens_lesson
from tests.stages.training.test_language_model_trainer import (
    NUM_IDS,
    NUM_LABELED,
    OBJECTIVE,
    SUPPORT,
    VOCAB_SIZE,
    Cached,
    Sample,
    assert_same,
    make_data,
    make_samples,
    make_student,
    step,
)
from tests.stages.training.test_language_model_trainer import make_trainer as plain_trainer

NUM_STUDENT = 40
UNUSED_STUDENT = 7
STUDENT_SUPPORT = torch.arange(NUM_STUDENT) != UNUSED_STUDENT
CODECS: dict[str, Codec] = {
    "topk": TopKCodec(support_size=NUM_IDS, top_k=9, is_exact=True),
    "sampled": SampledCodec(support_size=NUM_IDS, num_draws=12),
    "dense": DenseCodec(support_size=NUM_IDS),
}


def some_map() -> Tensor:
    """Of the teacher's ids some to none, some two to one."""
    ids = np.random.default_rng(1).integers(-1, NUM_STUDENT, NUM_IDS)
    return torch.from_numpy(np.where(ids == UNUSED_STUDENT, -1, ids))


STUDENT_IDS = some_map()


def fake_aligned(sample: Sample) -> AlignedSample:
    """Other tokens than the teacher's, which meet at random places, in order."""
    rng = np.random.default_rng(int(sample["input_ids"].sum()))
    used = np.flatnonzero(STUDENT_SUPPORT.numpy())
    parts: dict[str, list[np.ndarray]] = {"ids": [], "segment": [], "at": [], "chunk": []}
    chunks: list[float] = []
    for segment in np.unique(sample["segment"]):
        mine = np.flatnonzero(sample["segment"] == segment)
        num = int(rng.integers(1, len(mine) + 3))
        at, chunk = np.full(num, -1), np.full(num, -1)
        both = min(num, len(mine)) - 1
        meets = int(rng.integers(0, both + 1)) if both else 0
        if meets:
            theirs = np.sort(rng.choice(num - 1, meets, replace=False))
            ours = np.sort(rng.choice(len(mine) - 1, meets, replace=False))
            at[theirs] = mine[ours]
            # From one meeting to the next is a chunk.
            for (a, b), (c, d) in zip(pairwise(theirs), pairwise(ours), strict=True):
                chunk[a:b] = len(chunks)
                chunks.append(float(sample["next_log_prob"][mine[c:d]].astype(np.float64).sum()))
        parts["ids"].append(rng.choice(used, num))
        parts["segment"].append(np.full(num, segment))
        parts["at"].append(at)
        parts["chunk"].append(chunk)
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return AlignedSample(
        input_ids=joined["ids"].astype(np.uint32),
        segment=joined["segment"].astype(np.uint16),
        teacher_positions=joined["at"].astype(np.int64),
        is_one_to_one=joined["at"] % 2 == 0,
        chunk_index=joined["chunk"].astype(np.int64),
        teacher_chunks=np.array(chunks, np.float32),
        num_bytes=3 * len(joined["ids"]),
        num_teacher_bytes=5,
        teacher_nll=2.5,
    )


def same_aligned(sample: Sample) -> AlignedSample:
    """The teacher's own tokens."""
    num = len(sample["input_ids"])
    return AlignedSample(
        input_ids=sample["input_ids"],
        segment=sample["segment"],
        teacher_positions=np.where(sample["loss_mask"], np.arange(num), -1),
        is_one_to_one=sample["loss_mask"],
        chunk_index=np.full(num, -1),
        teacher_chunks=np.zeros(0, np.float32),
        num_bytes=num,
        num_teacher_bytes=num,
        teacher_nll=float(-sample["next_log_prob"][sample["loss_mask"]].astype(float).sum()),
    )


def aligned_data(
    samples: list[Sample], aligner: Callable[[Sample], AlignedSample], *, is_spans: bool = False
) -> BothKinds:
    reader: Any = Cached(samples)
    any_aligner: Any = aligner
    made: Any = partial(AlignedSamples, aligner=any_aligner, is_spans=is_spans)
    return BothKinds(
        made(reader, np.arange(NUM_LABELED), labeled=True),
        made(reader, np.arange(NUM_LABELED, len(samples)), labeled=False),
    )


def other_student() -> MambaStudentForCausalLM:
    config = MambaStudentConfig(
        vocab_size=NUM_STUDENT, d_model=8, num_layers=2, expand=2, d_state=4, head_dim=8
    )
    student = build_language_model(config, seed=1).double()
    student.lm_head.weight.data *= 10
    return student


def some_projection() -> LearnedProjection:
    """The fixed map, and three candidates for most of the teacher's ids."""
    rng = np.random.default_rng(2)
    ids = np.stack([rng.permutation(NUM_STUDENT)[:3] for _ in range(NUM_IDS)])
    ids[ids == UNUSED_STUDENT] = -1
    ids[::5] = -1
    weights = rng.random((NUM_IDS, 3)) * (ids >= 0)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
    fixed = STUDENT_IDS[:, None]
    return LearnedProjection(
        Candidates(student_ids=fixed, weights=(fixed >= 0).float()),
        Candidates(student_ids=torch.from_numpy(ids), weights=torch.from_numpy(weights).float()),
    ).double()


def map_of(student_ids: Tensor, num_outcomes: int) -> FixedMap:
    reached = torch.zeros(num_outcomes, dtype=torch.bool)
    reached[student_ids[student_ids >= 0]] = True
    return FixedMap(student_ids=student_ids, reached=reached)


def aligned_trainer(
    folder: Path,
    codec: Codec,
    data: BothKinds,
    model: torch.nn.Module,
    *,
    fixed_map: FixedMap | None = None,
    support: Tensor = STUDENT_SUPPORT,
    objective: ObjectiveConfig = OBJECTIVE,
    **more: Any,
) -> StudentTrainer:
    lesson = tokens_lesson(
        codec,
        objective,
        support=support,
        fixed_map=fixed_map or map_of(STUDENT_IDS, len(support)),
        **more,
    )
    return StudentTrainer(
        model=model,
        args=training_arguments(
            OptimizationConfig(device="cpu", batch_size=1),
            folder,
            num_steps=1,
            steps_per_epoch=1,
            evaluates=False,
            keeps_best=False,
            label_names=["next_ids"],
        ),
        lesson=lesson,
        held_out=held_out_tokens(lesson, temperature=1.0, has_bytes=True),
        batches=AlternatingBatches(data, batch_size=1, num_batches=1, unlabeled_ratio=1.0, seed=0),
        train_dataset=data,
        eval_dataset=data.labeled,
        data_collator=AlignedCollator(0, codec),
    )


def collated(codec: Codec, data: BothKinds, order: list[list[int]]) -> list[Batch]:
    return [AlignedCollator(0, codec)([data[i] for i in batch]) for batch in order]


Weights = list[dict[int, Tensor]]
"""Of each of the teacher's ids, the student's ids and how much of its mass each gets."""


def fixed_weights() -> Weights:
    one = torch.ones((), dtype=torch.float64)
    return [{int(to): one} if to >= 0 else {} for to in STUDENT_IDS]


def mixed_weights(projection: LearnedProjection, share: float) -> Weights:
    """The fixed map and the learned rows, whatever they cannot place left to the ghost."""
    learned = projection.learned_log_weights().exp()
    rows: Weights = []
    for teacher_id, fixed in enumerate(fixed_weights()):
        row = {to: (1 - share) * one for to, one in fixed.items() if share < 1}
        for slot, to in enumerate(projection.student_ids[teacher_id].tolist()):
            if to >= 0 and share > 0:
                row[to] = row.get(to, torch.zeros(())) + share * learned[teacher_id, slot]
        rows.append(row)
    return rows


def slow_draws_kl(
    codec: SampledCodec, sample: Sample, place: int, logits: Tensor, t: float
) -> Tensor:
    """A draw at a time, of an id that the map reaches or of the outcome of all that it does not."""
    start = int(sample["sampled_sizes"][:place].sum())
    drawn = range(start, start + int(sample["sampled_sizes"][place]))
    lse = sample["sampled_lse"][place].astype(np.float64)
    at_draw, at_t = (codec.temperatures.index(one) for one in (codec.draw_temperature, t))
    log_q = logits.masked_fill(~STUDENT_SUPPORT, -torch.inf).div(t).log_softmax(0)
    unreached = STUDENT_SUPPORT.clone()
    unreached[STUDENT_IDS[STUDENT_IDS >= 0]] = False
    assert unreached.any()
    total, ghost = torch.zeros((), dtype=torch.float64), 0.0
    for entry in drawn:
        log_draw = float(sample["sampled_log_probs"][entry])
        log_p = codec.draw_temperature * (log_draw + lse[at_draw]) / t - lse[at_t]
        share = int(sample["sampled_counts"][entry]) / codec.num_draws
        weight = share * np.exp(log_p - log_draw)
        to = int(STUDENT_IDS[int(sample["sampled_ids"][entry])])
        if to < 0:
            ghost += weight
        else:
            total = total + weight * (log_p - log_q[to])
    if ghost:
        total = total + ghost * (np.log(ghost) - log_q[unreached].logsumexp(0))
    return total


def slow_kl(
    codec: Codec, sample: Sample, place: int, logits: Tensor, t: float, weights: Weights
) -> Tensor:
    """Over the ids that the teacher's head reaches, and one outcome for all others."""
    if isinstance(codec, SampledCodec):
        return slow_draws_kl(codec, sample, place, logits, t)
    found = codec.decode(codec.expand(sample), t)
    ids = list(range(NUM_IDS)) if found.ids is None else found.ids[place].tolist()
    probs = np.exp(found.log_probs[place].astype(np.float64))
    masses: dict[int, Tensor] = {}
    for one, prob in zip(ids, probs, strict=True):
        if one < 0 or prob == 0:
            continue
        for to, weight in weights[one].items():
            masses[to] = masses.get(to, torch.zeros((), dtype=torch.float64)) + prob * weight
    log_q = logits.masked_fill(~STUDENT_SUPPORT, -torch.inf).div(t).log_softmax(0)
    rest = torch.ones(NUM_STUDENT, dtype=torch.bool)
    rest[list(masses)] = False
    ghost = 1 - sum(masses.values(), start=torch.zeros((), dtype=torch.float64))
    head = sum(
        (one * (one.log() - log_q[to]) for to, one in masses.items()),
        start=torch.zeros((), dtype=torch.float64),
    )
    return head + ghost * (ghost.log() - log_q[rest].logsumexp(0))


def slow_step(
    codec: Codec,
    student: MambaStudentForCausalLM,
    samples: list[Sample],
    weights: Weights,
    *,
    is_spans: bool = False,
) -> Tensor:
    """The loss of a step over all samples, a document at a time."""
    c = OBJECTIVE
    loss = torch.zeros((), dtype=torch.float64)
    for labeled, chosen in ((True, samples[:NUM_LABELED]), (False, samples[NUM_LABELED:])):
        kds, confidences, nlls, chunks = [], [], [], []
        for sample in chosen:
            aligned = fake_aligned(sample)
            log_likelihoods = torch.zeros(len(aligned.teacher_chunks), dtype=torch.float64)
            for segment in np.unique(aligned.segment):
                places = np.flatnonzero(aligned.segment == segment)
                ids = torch.from_numpy(aligned.input_ids[places].astype(np.int64))
                logits = student(input_ids=ids[None]).logits[0]
                for position, place in enumerate(places[:-1]):
                    whole = logits[position].log_softmax(0)
                    nll, even = -whole[ids[position + 1]], -whole.mean()
                    smooth = (1 - c.label_smoothing) * nll + c.label_smoothing * even
                    nlls.append(smooth)
                    chunk = int(aligned.chunk_index[place])
                    if chunk >= 0:
                        hot = torch.arange(len(log_likelihoods)) == chunk
                        log_likelihoods = log_likelihoods - nll * hot
                    at = int(aligned.teacher_positions[place])
                    counts = at >= 0 and (aligned.is_one_to_one[place] or not is_spans)
                    if counts:
                        top1 = float(sample["top1_log_prob"][at])
                        confidences.append(np.exp(c.conf_power * top1))
                        t = c.temperature
                        kds.append(slow_kl(codec, sample, at, logits[position], t, weights))
            p = (torch.from_numpy(aligned.teacher_chunks).double() / DEFAULT_TAU - 1e-6).exp()
            q = (log_likelihoods / DEFAULT_TAU - 1e-6).exp()
            chunks.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        alpha = c.alpha if labeled else c.unlabeled_alpha
        kd_weights = torch.tensor(confidences) / float(np.mean(confidences))
        loss = loss + alpha * c.temperature**2 * (kd_weights * torch.stack(kds)).mean()
        if labeled:
            loss = loss + (1 - c.alpha) * torch.stack(nlls).mean()
        if is_spans:
            loss = loss + alpha * DEFAULT_TAU * torch.cat(chunks).mean()
    return loss


def gradients(loss: Tensor, model: torch.nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss.backward()
    return loss.item(), {
        name: torch.zeros_like(one) if one.grad is None else one.grad.clone()
        for name, one in model.named_parameters()
    }


ORDERS = [[[0, 1, 2, 3], [4, 5]], [[2], [3, 0], [5], [1], [4]]]


def test_there_is_something_to_align() -> None:
    samples = make_samples(CODECS["topk"])
    assert len(samples) == 6
    found = [fake_aligned(sample) for sample in samples]
    assert sum(int((one.teacher_positions >= 0).sum()) for one in found) > 20
    assert sum(len(one.teacher_chunks) for one in found) > 10
    assert any((one.teacher_positions >= 0).sum() > one.is_one_to_one.sum() for one in found)


@pytest.mark.parametrize("name", CODECS)
def test_map_equals_a_loop_however_the_step_is_cut(name: str, tmp_path: Path) -> None:
    codec = CODECS[name]
    samples = make_samples(codec)
    student = other_student()
    expected = gradients(slow_step(codec, student, samples, fixed_weights()), student)
    data = aligned_data(samples, fake_aligned)
    for order in ORDERS:
        trainer = aligned_trainer(tmp_path, codec, data, other_student())
        assert_same(step(trainer, collated(codec, data, order)), expected)


def test_spans_equal_a_loop_however_the_step_is_cut(tmp_path: Path) -> None:
    codec = CODECS["topk"]
    samples = make_samples(codec)
    student = other_student()
    slow = slow_step(codec, student, samples, fixed_weights(), is_spans=True)
    expected = gradients(slow, student)
    data = aligned_data(samples, fake_aligned, is_spans=True)
    for order in ORDERS:
        trainer = aligned_trainer(tmp_path, codec, data, other_student(), has_chunks=True)
        assert_same(step(trainer, collated(codec, data, order)), expected)
    means = trainer.means()
    assert means["chunks"] > 0 and means["chunks_unlabeled"] > 0


@pytest.mark.parametrize(("at", "share"), [(0, 0.0), (3, 0.5), (9, 1.0)])
def test_projection_equals_a_loop(at: int, share: float, tmp_path: Path) -> None:
    codec = CODECS["topk"]
    samples = make_samples(codec)
    one = other_student()
    model = WithAuxiliaries(one, some_projection())
    assert learned_share_at(at, start=1, end=5) == share
    projection: Any = model.projection
    weights = mixed_weights(projection, share)
    expected = gradients(slow_step(codec, one, samples, weights), model)
    assert (expected[1]["projection.scores"].abs().sum() > 0) == (share > 0)
    data = aligned_data(samples, fake_aligned)
    for order in ORDERS:
        model = WithAuxiliaries(other_student(), some_projection())
        trainer = aligned_trainer(
            tmp_path, codec, data, model, projection=model.projection, between=(1, 5)
        )
        trainer.state.global_step = at
        assert_same(step(trainer, collated(codec, data, order)), expected)
    assert "projection.scores" not in trainer.get_decay_parameter_names(model)
    assert not any("lm_head" in name for name in model.state_dict())


@pytest.mark.parametrize("codec", [DenseCodec(support_size=NUM_IDS),
                                   TopKCodec(support_size=NUM_IDS, top_k=NUM_IDS),
                                   SampledCodec(support_size=NUM_IDS, num_draws=12)])  # fmt: skip
def test_an_identity_map_of_everything_is_no_map(codec: Codec, tmp_path: Path) -> None:
    """K = V, or draws: loss, gradients and held-out figures are those without alignment."""
    samples = make_samples(codec)
    plain = make_data(samples)
    trainer = plain_trainer(tmp_path, codec, plain)
    batches = [PackedCollator(0, codec)([plain[i] for i in batch]) for batch in ORDERS[0]]
    expected = step(trainer, batches)
    held_out = trainer.evaluate()
    data = aligned_data(samples, same_aligned)
    identity = map_of(torch.arange(NUM_IDS), VOCAB_SIZE)
    mapped = aligned_trainer(
        tmp_path, codec, data, make_student(),
        fixed_map=identity, support=SUPPORT,
    )  # fmt: skip
    assert VOCAB_SIZE > NUM_IDS
    assert_same(step(mapped, collated(codec, data, ORDERS[0])), expected)
    found = mapped.evaluate()
    for name in ("eval_loss", "eval_ce", "eval_kl", "eval_agreement", "eval_perplexity"):
        if name not in held_out:  # draws have no most probable id
            assert isinstance(codec, SampledCodec) and name == "eval_agreement"
            assert name not in found
            continue
        assert found[name] == pytest.approx(held_out[name], rel=1e-4), name
    nll = sum(same_aligned(one).teacher_nll for one in samples[:NUM_LABELED])
    num = sum(len(one["input_ids"]) for one in samples[:NUM_LABELED])
    assert found["eval_teacher_bits_per_byte"] == pytest.approx(nll / num / np.log(2))


def test_held_out_positions_of_a_spans_training(tmp_path: Path) -> None:
    """Means over positions, tokens and chunks, in batches of any size."""
    codec = CODECS["topk"]
    objective = replace_objective(conf_power=0.0)
    data = aligned_data(make_samples(codec), fake_aligned, is_spans=True)
    trainer = aligned_trainer(
        tmp_path, codec, data, other_student(), has_chunks=True, objective=objective
    )
    found = trainer.evaluate()
    alone: list[Any] = [[data.labeled[i]] for i in range(NUM_LABELED)]
    one_by_one = [trainer.evaluate(one) for one in alone]
    counts = []
    for i in range(NUM_LABELED):
        batch = AlignedCollator(0, codec)([data.labeled[i]])
        counts.append([int((batch["loss_mask"] & batch["has_teacher"]).sum()),
                       int(batch["loss_mask"].sum()), int(batch["chunk_mask"].sum())])  # fmt: skip
    taught, nexts, chunks = np.array(counts).T
    for name, weights in (("eval_kl", taught), ("eval_ce", nexts), ("eval_chunks", chunks)):
        mean = np.average([one[name] for one in one_by_one], weights=weights)
        assert found[name] == pytest.approx(mean), name
    assert found["eval_bits_per_byte"] > 0


def replace_objective(**changes: Any) -> ObjectiveConfig:
    return OBJECTIVE.model_copy(update=changes)


def test_shares_of_processes_add_up(tmp_path: Path) -> None:
    codec = CODECS["topk"]
    data = aligned_data(make_samples(codec), fake_aligned, is_spans=True)
    batches = collated(codec, data, [[0, 1, 2], [3]])
    trainer = aligned_trainer(tmp_path, codec, data, other_student(), has_chunks=True)
    whole = step(trainer, batches)
    student: Any = trainer.model
    student.zero_grad()
    totals = trainer.step_totals(batches)
    losses = [
        trainer.compute_loss(
            student, share_of(batch, rank=rank, num_processes=2), num_items_in_batch=totals
        )
        for rank in (0, 1)
        for batch in batches
    ]
    assert_same(gradients(torch.stack(losses).sum(), student), whole)


def test_a_sample_without_a_token_and_one_without_a_meeting(tmp_path: Path) -> None:
    """Neither breaks a batch, and neither teaches what it does not know."""
    codec = CODECS["topk"]
    samples = make_samples(codec)

    def poor(sample: Sample) -> AlignedSample:
        found = fake_aligned(sample)
        if sample is samples[0]:
            empty = {name: one[:0] for name, one in vars(found).items()
                     if isinstance(one, np.ndarray)}  # fmt: skip
            return replace(found, **empty)
        never = np.full_like(found.teacher_positions, -1)
        return replace(found, teacher_positions=never, chunk_index=never,
                       teacher_chunks=found.teacher_chunks[:0])  # fmt: skip

    data = aligned_data(samples, poor, is_spans=True)
    trainer = aligned_trainer(tmp_path, codec, data, other_student(), has_chunks=True)
    loss, found = step(trainer, collated(codec, data, [[0], [0, 1, 2]]))
    assert np.isfinite(loss) and all(one.isfinite().all() for one in found.values())
    assert trainer.means()["kd"] == 0
