"""Steps of the language model's Trainer against slow ones, written from the definitions.

The slow ones take documents one at a time, unpacked and unpadded, with whole softmaxes in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.sampled import DistinctCodec, SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.data.packing import pack_tokens
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.models.head import LanguageModelHead
from teacher_cache.stages.processes import share_of
from teacher_cache.stages.student import build_language_model
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    Batch,
    BothKinds,
    PackedCollator,
    PackedSamples,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.trainer import StudentTrainer
from tests.lessons import held_out_tokens, tokens_lesson
from tests.tiny_language_models import MAX_LENGTH, WIDTH, cached, tiny_teacher

NUM_IDS, VOCAB_SIZE = 61, 64  # the teacher's, and rows of the student's table
UNUSED = (5, 17)
TEACHER = tiny_teacher(NUM_IDS, unused=UNUSED)
HEAD = LanguageModelHead.of(TEACHER.model).of_support(TEACHER.support)
SUPPORT = torch.tensor([i < NUM_IDS and i not in UNUSED for i in range(VOCAB_SIZE)])
CODECS: dict[str, Codec] = {
    "topk": TopKCodec(support_size=NUM_IDS, top_k=6),
    "nucleus": TopKCodec(support_size=NUM_IDS, top_k=20, top_p=0.6),
    "exact": TopKCodec(support_size=NUM_IDS, top_k=5, is_exact=True),
    "sampled": SampledCodec(support_size=NUM_IDS, num_draws=12),
    "flat": SampledCodec(support_size=NUM_IDS, num_draws=12, draw_temperature=2.0),
    "distinct": DistinctCodec(support_size=NUM_IDS, num_ids=8),
    "flat distinct": DistinctCodec(support_size=NUM_IDS, num_ids=8, draw_temperature=2.0),
    "hidden": HiddenCodec(support_size=NUM_IDS, width=WIDTH, head=HEAD),
    "dense": DenseCodec(support_size=NUM_IDS),
}
LENGTHS = (7, 5, 12, 3, 20, 1, 9, 30, 4, 11, 13, 8)
OBJECTIVE = ObjectiveConfig(
    alpha=0.3, temperature=1.5, conf_power=0.7, label_smoothing=0.1, unlabeled_alpha=0.6
)
NUM_LABELED = 4

Sample = dict[str, np.ndarray]


class Cached:
    """Stands for a reader: samples in memory."""

    def __init__(self, samples: Sequence[Sample]):
        self.sample = samples.__getitem__

    @staticmethod
    def lengths() -> np.ndarray:
        return np.full(100, MAX_LENGTH)


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> Codec:
    return CODECS[request.param]


def make_samples(codec: Codec) -> list[Sample]:
    rng = np.random.default_rng(0)
    used = np.flatnonzero(SUPPORT.numpy())
    documents = [(rng.bytes(16), rng.choice(used, length).astype(np.uint32)) for length in LENGTHS]
    return [cached(TEACHER, codec, one) for one in pack_tokens(documents, max_length=MAX_LENGTH)]


def make_data(samples: list[Sample]) -> BothKinds:
    reader: Any = Cached(samples)
    return BothKinds(
        PackedSamples(reader, np.arange(NUM_LABELED), labeled=True),
        PackedSamples(reader, np.arange(NUM_LABELED, len(samples)), labeled=False),
    )


def make_student(arch: str = "mamba2", *, tied: bool = True) -> MambaStudentForCausalLM:
    config = MambaStudentConfig(
        arch=arch, vocab_size=VOCAB_SIZE, d_model=8, num_layers=2, expand=2, d_state=4, head_dim=8,
        tie_word_embeddings=tied,
    )  # fmt: skip
    student = build_language_model(config, seed=1).double()
    student.lm_head.weight.data *= 10  # so that its distributions are no uniform ones
    return student


def make_trainer(
    folder: Path,
    codec: Codec,
    data: BothKinds,
    *,
    objective: ObjectiveConfig = OBJECTIVE,
    student: torch.nn.Module | None = None,
    held_out_temperature: float = 1.0,
) -> StudentTrainer:
    lesson = tokens_lesson(codec, objective, support=SUPPORT)
    return StudentTrainer(
        model=student or make_student(),
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
        held_out=held_out_tokens(lesson, temperature=held_out_temperature),
        batches=AlternatingBatches(data, batch_size=1, num_batches=1, unlabeled_ratio=1.0, seed=0),
        train_dataset=data,
        eval_dataset=data.labeled,
        data_collator=PackedCollator(0, codec),
    )


def collated(codec: Codec, data: BothKinds, order: Sequence[Sequence[int]]) -> list[Batch]:
    return [PackedCollator(0, codec)([data[i] for i in batch]) for batch in order]


def step(trainer: StudentTrainer, batches: list[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step."""
    student: Any = trainer.model
    student.zero_grad()
    totals = trainer.step_totals(batches)
    loss = 0.0
    for batch in batches:
        share = trainer.compute_loss(student.train(), batch, num_items_in_batch=totals)
        share.backward()
        loss += share.item()
    return loss, {name: one.grad.clone() for name, one in student.named_parameters()}


def slow_divergence(codec: Codec, sample: Sample, place: int, log_q: Tensor, t: float) -> Tensor:
    """KL of one position; `log_q` [V] are the student's over the support at temperature `t`."""
    if isinstance(codec, SampledCodec):
        start = int(sample["sampled_sizes"][:place].sum())
        drawn = slice(start, start + int(sample["sampled_sizes"][place]))
        ids = torch.from_numpy(sample["sampled_ids"][drawn].astype(np.int64))
        counts = torch.from_numpy(sample["sampled_counts"][drawn].astype(np.float64))
        log_draw = torch.from_numpy(sample["sampled_log_probs"][drawn].astype(np.float64))
        lse = sample["sampled_lse"][place].astype(np.float64)
        at_draw, at_t = (codec.temperatures.index(one) for one in (codec.draw_temperature, t))
        log_p = codec.draw_temperature * (log_draw + lse[at_draw]) / t - lse[at_t]
        weights = counts / codec.num_draws * (log_p - log_draw).exp()
        return (weights * (log_p - log_q[ids])).sum()
    if isinstance(codec, DistinctCodec):
        kept = codec.kept(sample, t)
        filled = kept.ids[place] >= 0
        log_p, log_w = (
            torch.from_numpy(x[place][filled]) for x in (kept.log_probs, kept.log_weights)
        )
        return (log_w.exp() * (log_p - log_q[kept.ids[place][filled]])).sum()
    if isinstance(codec, TopKCodec):
        found = codec.decode(codec.expand(sample), t)
        assert found.ids is not None
        filled = found.ids[place] >= 0
        ids = torch.from_numpy(found.ids[place][filled])
        log_p = torch.from_numpy(found.log_probs[place][filled].astype(np.float64))
        log_tail = torch.tensor(float(found.tail_log_prob[place]), dtype=torch.float64)
        rest = torch.ones(len(log_q), dtype=torch.bool)
        rest[ids] = False
        head = (log_p.exp() * (log_p - log_q[ids])).sum()
        return head + log_tail.exp() * (log_tail - log_q[rest].logsumexp(0))
    if isinstance(codec, HiddenCodec):
        states = torch.from_numpy(sample["hidden"][place].astype(np.float64))
        logits = HEAD.weight.double() @ states
    else:
        logits = torch.from_numpy(sample["dense_logits"][place].astype(np.float64))
    used = SUPPORT[:NUM_IDS]
    log_p = (logits[used] / t).log_softmax(0)
    return (log_p.exp() * (log_p - log_q[:NUM_IDS][used])).sum()


def slow_positions(
    codec: Codec, student: torch.nn.Module, sample: Sample, t: float
) -> list[dict[str, Tensor]]:
    """What each counted position costs, a document at a time."""
    found = []
    for document in np.unique(sample["segment"]):
        places = np.flatnonzero(sample["segment"] == document)
        ids = torch.from_numpy(sample["input_ids"][places].astype(np.int64))
        logits = student(input_ids=ids[None]).logits[0]  # [S, V]
        for position, place in enumerate(places[:-1]):
            log_q = logits[position].masked_fill(~SUPPORT, -torch.inf).div(t).log_softmax(0)
            whole = logits[position].log_softmax(0)
            found.append({
                "kd": slow_divergence(codec, sample, int(place), log_q, t),
                "nll": -whole[ids[position + 1]],
                "even": -whole.mean(),
                "top1": torch.tensor(float(sample["top1_log_prob"][place]), dtype=torch.float64),
                "teacher": -torch.tensor(float(sample["next_log_prob"][place])),
                "choice": logits[position].argmax(),
            })  # fmt: skip
    return found


def slow_step(
    codec: Codec, student: torch.nn.Module, samples: list[Sample]
) -> tuple[float, dict[str, Tensor]]:
    """A step over all samples."""
    student.zero_grad()
    c = OBJECTIVE
    loss = torch.zeros((), dtype=torch.float64)
    for kind, chosen in (("labeled", samples[:NUM_LABELED]), ("", samples[NUM_LABELED:])):
        found = [
            one
            for sample in chosen
            for one in slow_positions(codec, student, sample, c.temperature)
        ]
        weights = torch.stack([(c.conf_power * one["top1"]).exp() for one in found])
        kd = (weights / weights.mean() * torch.stack([one["kd"] for one in found])).mean()
        loss = loss + (c.alpha if kind else c.unlabeled_alpha) * c.temperature**2 * kd
        if kind:
            smooth = [
                (1 - c.label_smoothing) * one["nll"] + c.label_smoothing * one["even"]
                for one in found
            ]
            loss = loss + (1 - c.alpha) * torch.stack(smooth).mean()
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in student.named_parameters()}  # pyright: ignore[reportOptionalMemberAccess]


def assert_same(
    found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=2e-4, atol=2e-6, msg=name)


def test_a_step_is_that_of_single_documents_however_it_is_cut(codec: Codec, tmp_path: Path) -> None:
    samples = make_samples(codec)
    data = make_data(samples)
    assert max(int(sample["segment"][-1]) for sample in samples) >= 2
    expected = slow_step(codec, make_student(), samples)
    unlabeled = list(range(NUM_LABELED, len(samples)))
    for order in ([[0, 1, 2, 3], unlabeled], [[2], [3, 0], unlabeled[:1], [1], unlabeled[1:]]):
        trainer = make_trainer(tmp_path, codec, data)
        assert_same(step(trainer, collated(codec, data, order)), expected)


@pytest.mark.parametrize(("arch", "tied"), [("mamba", True), ("mamba2", False)])
def test_other_students(arch: str, tied: bool, tmp_path: Path) -> None:
    codec = CODECS["topk"]
    samples = make_samples(codec)
    data = make_data(samples)
    expected = slow_step(codec, make_student(arch, tied=tied), samples)
    trainer = make_trainer(tmp_path, codec, data, student=make_student(arch, tied=tied))
    order = [[0, 1, 2, 3], list(range(NUM_LABELED, len(samples)))]
    assert_same(step(trainer, collated(codec, data, order)), expected)


def test_shares_of_processes_add_up(tmp_path: Path) -> None:
    """Three samples for two processes, then one, of which the second has none."""
    codec = CODECS["nucleus"]
    data = make_data(make_samples(codec))
    batches = collated(codec, data, [[0, 1, 2], [3]])
    trainer = make_trainer(tmp_path, codec, data)
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
    assert float(losses[3].detach()) == 0
    total = torch.stack(losses).sum()
    total.backward()
    assert_same(
        (total.item(), {name: one.grad for name, one in student.named_parameters()}),
        whole,
    )


def test_alpha_0_is_plain_cross_entropy(tmp_path: Path) -> None:
    codec = CODECS["topk"]
    data = make_data(make_samples(codec))
    (batch,) = batches = collated(codec, data, [[0, 1, 2, 3]])
    trainer = make_trainer(tmp_path, codec, data, objective=ObjectiveConfig(alpha=0.0))
    found = step(trainer, batches)
    student = make_student()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, NO_LABEL)
    loss = student(**{name: batch[name] for name in ("input_ids", "seq_idx")}, labels=labels).loss
    loss.backward()
    assert_same(
        found,
        (loss.item(), {name: one.grad for name, one in student.named_parameters()}),  # pyright: ignore[reportArgumentType]
    )


def test_held_out_positions(codec: Codec, tmp_path: Path) -> None:
    """Means over positions at temperature 1, whatever is trained on, in batches of any size."""
    samples = make_samples(codec)
    trainer = make_trainer(tmp_path, codec, make_data(samples))
    found = trainer.evaluate()
    chosen = samples[:NUM_LABELED]
    with torch.no_grad():
        rows = [one for x in chosen for one in slow_positions(codec, make_student(), x, 1.0)]
    mean = {name: float(torch.stack([row[name] for row in rows]).double().mean())
            for name in ("kd", "nll", "teacher")}  # fmt: skip
    assert found["eval_ce"] == pytest.approx(mean["nll"], rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(mean["nll"]), rel=1e-5)
    assert found["eval_teacher_perplexity"] == pytest.approx(np.exp(mean["teacher"]), rel=1e-5)
    assert found["eval_kl"] == pytest.approx(mean["kd"], rel=1e-4, abs=1e-5)
    if isinstance(codec, SampledCodec):
        assert "eval_agreement" not in found
        return
    dense = make_samples(CODECS["dense"])[:NUM_LABELED]
    tops = [one["dense_logits"][one["loss_mask"]].argmax(-1) for one in dense]
    agreed = np.concatenate(tops) == np.array([int(row["choice"]) for row in rows])
    assert 0 < agreed.mean() < 1 or not agreed.any()
    assert found["eval_agreement"] == pytest.approx(agreed.mean())


def test_says_once_that_draws_are_too_few(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    codec = SampledCodec(support_size=NUM_IDS, num_draws=4)
    trainer = make_trainer(tmp_path, codec, make_data(make_samples(codec)))
    with caplog.at_level("WARNING"):
        trainer.log({"loss": 1.0, "effective_draws": 9.4})
        trainer.log({"loss": 1.0, "effective_draws": 9.3})
    (record,) = caplog.records
    assert "worth 9.4" in record.message
    trainer = make_trainer(tmp_path, codec, make_data(make_samples(codec)))
    data = make_data(make_samples(codec))
    step(trainer, collated(codec, data, [[0], [1]]))
    assert 1 < trainer.means()["effective_draws"] <= 4


def test_a_kl_that_is_not_of_temperature_1_is_named(tmp_path: Path) -> None:
    codec = CODECS["topk"]
    assert isinstance(codec, TopKCodec)
    codec = replace(codec, temperatures=(2.0, 3.0))
    objective = ObjectiveConfig(temperature=2.5)
    trainer = make_trainer(
        tmp_path, codec, make_data(make_samples(codec)),
        objective=objective, held_out_temperature=2.5,
    )  # fmt: skip
    found = trainer.evaluate()
    assert "eval_kl_at_2.5" in found and "eval_kl" not in found
