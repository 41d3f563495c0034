"""The Trainer's steps against slow ones: one sample at a time, unpadded, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForSequenceClassification, TrainerCallback, get_scheduler

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.finetune_teacher import LabelTrainer
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.student import MambaStudentForSequenceClassification, build_student
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    CachedSamples,
    SampleCollator,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer
from teacher_cache.stages.training.trainer import StudentTrainer
from tests import reference_losses as reference
from tests.lessons import samples_lesson

NUM_LABELED = 40
OBJECTIVE = ObjectiveConfig(
    alpha=0.3,
    temperature=3.0,
    conf_power=2.0,
    label_smoothing=0.1,
    unlabeled_alpha=0.7,
    lm_weight=0.4,
)
Order = list[list[int]]  # positions of each micro-batch; from NUM_LABELED on they are unlabelled


class FixedBatches(AlternatingBatches):
    """Batches in a given order."""

    def __init__(self, order: Order):
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._order)


class Snapshots(TrainerCallback):
    """Keeps the model as it is before every step."""

    def __init__(self) -> None:
        self.before: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before.append(copy.deepcopy(kwargs["model"]))


@pytest.fixture(scope="module")
def data(tiny_cache: Path) -> BothKinds:
    labeled, unlabeled = (CacheReader(tiny_cache, split) for split in ("labeled", "unlabeled"))
    return BothKinds(
        CachedSamples(labeled, np.arange(NUM_LABELED), labeled=True),
        CachedSamples(unlabeled, np.arange(len(unlabeled)), labeled=False),
    )


def make_student(arch: str = "mamba2") -> MambaStudentForSequenceClassification:
    """A student in float64, without dropout; its logits are spread, so that the terms differ."""
    student = build_student(
        MambaStudentConfig(
            arch=arch,
            vocab_size=30522,
            d_model=8,
            num_layers=1,
            expand=2,
            d_state=4,
            head_dim=8,
            dropout=0.0,
            position_map={"mode": "move_first_to_last"},
        ),
        seed=1,
    ).double()
    last = [module for module in student.head.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.weight.data *= 20
    return student


def make_trainer(
    folder: Path,
    data: BothKinds,
    order: Order,
    accumulation: int = 1,
    *,
    objective: ObjectiveConfig = OBJECTIVE,
    log_steps: int = 1,
    lr: float = 0.01,
    arch: str = "mamba2",
    embedding_lr_scale: float = 1.0,
) -> StudentTrainer:
    config = OptimizationConfig(
        device="cpu",
        gradient_accumulation=accumulation,
        log_steps=log_steps,
        lr=lr,
        schedule="linear",
        warmup=0.0,
        weight_decay=0.1,
    )
    num_steps = len(order) // accumulation
    return StudentTrainer(
        model=make_student(arch),
        args=training_arguments(
            config,
            folder,
            num_steps=num_steps,
            steps_per_epoch=num_steps,
            evaluates=False,
            keeps_best=False,
            label_names=["labels", "teacher_logits"],
        ),
        lesson=samples_lesson(objective),
        held_out=HeldOutSamples(),
        embedding_lr_scale=embedding_lr_scale,
        batches=FixedBatches(order),
        train_dataset=data,
        data_collator=SampleCollator(0),
    )


def steps_log(trainer: OrderedTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def logits_of(model: Any, samples: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Each sample alone, without padding."""
    with torch.no_grad():
        return [model(ids_of(one)[None]).logits[0].tolist() for one in samples]


def ids_of(sample: dict[str, Any]) -> Tensor:
    return torch.from_numpy(sample["input_ids"].astype(np.int64))


def next_token_losses(student: MambaStudentForSequenceClassification, ids: Tensor) -> Tensor:
    """Of one sample's ids [S], in the student's order: [S - 1] nats."""
    moved = torch.cat([ids[1:], ids[:1]])
    states = student.backbone(moved[None]).last_hidden_state[0]
    logits = states[:-1] @ student.backbone.embedding.weight.T
    return F.cross_entropy(logits, moved[1:], reduction="none")


def slow_terms(model: Any, samples: list[dict[str, Any]], c: ObjectiveConfig) -> dict[str, float]:
    """What a log line must say of a step that holds these samples."""
    students = logits_of(model, samples)
    teachers = [one["class_logits"].astype(np.float64).tolist() for one in samples]
    labels = [int(one["label"]) if "label" in one else None for one in samples]
    with torch.no_grad():
        next_tokens = [next_token_losses(model, ids_of(one)).tolist() for one in samples]
    loss = reference.objective(
        students,
        teachers,
        labels,
        alpha=c.alpha,
        temperature=c.temperature,
        conf_power=c.conf_power,
        label_smoothing=c.label_smoothing,
        unlabeled_alpha=c.unlabeled_alpha,
        divergence=c.divergence,
        jsd_beta=c.jsd_beta,
        lm_weight=c.lm_weight,
        next_token_losses=next_tokens,
    )
    positions = [one for sample in next_tokens for one in sample]
    terms = {"loss": loss, "lm": sum(positions) / len(positions)}
    for name, wanted in (("kd", True), ("kd_unlabeled", False)):
        mine = [(s, t) for s, t, y in zip(students, teachers, labels, strict=True)
                if (y is not None) == wanted]  # fmt: skip
        if mine:
            weights = [max(reference.softmax(t)) ** c.conf_power for _, t in mine]
            both = [[reference.softmax(z, c.temperature) for z in (t, s)] for s, t in mine]
            kds = [reference.divergence_of(c.divergence, p, q, c.jsd_beta) for p, q in both]
            weighted = sum(w * kd for w, kd in zip(weights, kds, strict=True))
            terms[name] = weighted / sum(weights)
            if wanted:
                terms["conf_w"] = sum(weights) / len(weights)
                agree = [s.index(max(s)) == t.index(max(t)) for s, t in mine]
                terms["agreement"] = sum(agree) / len(agree)
    pairs = [(s, y) for s, y in zip(students, labels, strict=True) if y is not None]
    if pairs:
        ces = [reference.cross_entropy(s, y, c.label_smoothing) for s, y in pairs]
        terms["ce"] = sum(ces) / len(ces)
    return terms


def logged(line: dict[str, float]) -> dict[str, float]:
    about = {"grad_norm", "learning_rate", "epoch", "step"}
    return {name: value for name, value in line.items() if name not in about}


# A step of both kinds in micro-batches of unequal sizes, then one of labels alone, then the rest.
MIXED: Order = [
    [*range(9)], [*range(40, 45)], [*range(9, 12)],
    [*range(12, 16)], [*range(16, 20)], [20],
    [*range(45, 50)], [*range(50, 56)], [*range(56, 58)],
]  # fmt: skip


@pytest.mark.parametrize("measure", [{}, {"divergence": "jsd", "jsd_beta": 0.2}])
def test_each_line_of_the_log_is_what_slow_loops_find(
    measure: dict[str, Any], tmp_path: Path, data: BothKinds
) -> None:
    objective = OBJECTIVE.model_copy(update=measure)
    trainer = make_trainer(tmp_path, data, MIXED, 3, objective=objective)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    lines = steps_log(trainer)
    assert len(lines) == 3
    for step, (line, model) in enumerate(zip(lines, snapshots.before, strict=True)):
        positions = [position for batch in MIXED[3 * step : 3 * step + 3] for position in batch]
        expected = slow_terms(model.eval(), [data[position] for position in positions], objective)
        assert logged(line) == pytest.approx(expected, rel=1e-6), step
    every = {"loss", "ce", "kd", "kd_unlabeled", "lm", "conf_w", "agreement"}
    assert set(logged(lines[0])) == every
    assert set(logged(lines[1])) == every - {"kd_unlabeled"}
    assert set(logged(lines[2])) == {"loss", "kd_unlabeled", "lm"}


def test_a_line_is_the_mean_over_its_steps(tmp_path: Path, data: BothKinds) -> None:
    each = steps_log(trained(make_trainer(tmp_path / "each", data, MIXED, 3)))
    (line,) = steps_log(trained(make_trainer(tmp_path / "one", data, MIXED, 3, log_steps=3)))
    # Terms of a kind are averaged over the steps that held it.
    for name in ("loss", "ce", "kd", "kd_unlabeled", "lm", "conf_w", "agreement"):
        held = [one[name] for one in each if name in one]
        assert line[name] == pytest.approx(sum(held) / len(held), rel=1e-6), name


def test_a_term_that_is_off_is_not_logged(tmp_path: Path, data: BothKinds) -> None:
    objective = OBJECTIVE.model_copy(update={"conf_power": 0.0, "lm_weight": 0.0})
    (line,) = steps_log(trained(make_trainer(tmp_path, data, [[0, 1, 2]], objective=objective)))
    assert set(logged(line)) == {"loss", "ce", "kd", "agreement"}


def trained(trainer: StudentTrainer) -> StudentTrainer:
    trainer.train()
    return trainer


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: values.detach() for name, values in model.state_dict().items()}


def train_plainly(data: BothKinds, steps: Order) -> MambaStudentForSequenceClassification:
    """AdamW over whole steps, written out; one sample at a time, the weights normalised by hand."""
    student = make_student()
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    others = [p for p in student.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = get_scheduler("linear", optimizer, 0, len(steps))
    c = OBJECTIVE
    for positions in steps:
        next_tokens = torch.cat(
            [next_token_losses(student, ids_of(data[one])) for one in positions]
        )
        loss = c.lm_weight * next_tokens.mean()
        for is_labeled in (True, False):
            mine = [data[one] for one in positions if (one < NUM_LABELED) == is_labeled]
            teacher = torch.tensor([one["class_logits"].tolist() for one in mine]).double()
            raw = teacher.softmax(-1).amax(-1) ** c.conf_power
            for sample, z, weight in zip(mine, teacher, raw / raw.sum(), strict=True):
                s = student(ids_of(sample)[None]).logits[0]
                p = (z / c.temperature).softmax(-1)
                kl = (p * (p.log() - (s / c.temperature).log_softmax(-1))).sum()
                share = c.alpha if is_labeled else c.unlabeled_alpha
                loss = loss + share * c.temperature**2 * weight * kl
                if is_labeled:
                    label = torch.tensor(int(sample["label"]))
                    ce = F.cross_entropy(s, label, label_smoothing=c.label_smoothing)
                    loss = loss + (1 - c.alpha) * ce / len(mine)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return student


def cut(positions: list[int], size: int) -> Order:
    return [positions[at : at + size] for at in range(0, len(positions), size)]


def interleave(labeled: Order, unlabeled: Order) -> Order:
    return [batch for pair in zip(labeled, unlabeled, strict=True) for batch in pair]


def test_however_a_step_is_cut_the_weights_are_the_same(tmp_path: Path, data: BothKinds) -> None:
    labeled, unlabeled = [*range(24)], [*range(NUM_LABELED, NUM_LABELED + 24)]
    cuts: dict[str, tuple[int, Order]] = {
        # Three steps of 8 labelled and 8 unlabelled samples.
        "whole": (2, interleave(cut(labeled, 8), cut(unlabeled, 8))),
        "quarters": (8, interleave(cut(labeled, 2), cut(unlabeled, 2))),
        "unequal": (
            4,
            [
                batch
                for at in (0, 8, 16)
                for batch in (
                    labeled[at : at + 7],
                    unlabeled[at : at + 1],
                    labeled[at + 7 : at + 8],
                    unlabeled[at + 1 : at + 8],
                )
            ],
        ),
    }
    plain = weights(
        train_plainly(data, [labeled[a : a + 8] + unlabeled[a : a + 8] for a in (0, 8, 16)])
    )
    start = weights(make_student())
    moved = max(float((plain[name] - start[name]).abs().max()) for name in plain)
    assert moved > 0.01
    for name, (accumulation, order) in cuts.items():
        trainer = trained(make_trainer(tmp_path / name, data, order, accumulation))
        assert trainer.state.global_step == 3
        found = weights(trainer.model)  # pyright: ignore[reportArgumentType]  (a Module, always)
        for parameter, expected in plain.items():
            # The cache's logits are float32, and so are the weights and log-probs made of them.
            torch.testing.assert_close(found[parameter], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("accumulation", "order"), [
    (1, [[*range(32)]]),
    (4, cut([*range(32)], 8)),
    (3, [[*range(20)], [*range(20, 31)], [31]]),
])  # fmt: skip
def test_a_teachers_step_is_the_mean_over_its_samples(
    tmp_path: Path, tiny_bert: Path, data: BothKinds, accumulation: int, order: Order
) -> None:
    model = BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    samples = [data[position] for position in range(32)]
    pairs = [(s, int(one["label"])) for s, one in zip(logits_of(model, samples), samples)]  # noqa: B905
    expected = sum(reference.cross_entropy(s, y, 0.0) for s, y in pairs) / len(pairs)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = LabelTrainer(
        model=model,
        args=training_arguments(
            OptimizationConfig(device="cpu", gradient_accumulation=accumulation, log_steps=1),
            tmp_path,
            num_steps=1,
            steps_per_epoch=1,
            evaluates=False,
            keeps_best=False,
            label_names=["labels"],
        ),
        batches=FixedBatches(order),
        train_dataset=data,
        data_collator=SampleCollator(0),
    )
    trainer.train()
    (line,) = steps_log(trainer)
    assert line["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arch", ["mamba", "mamba2"])
def test_only_matrices_decay(tmp_path: Path, data: BothKinds, arch: str) -> None:
    trainer = make_trainer(tmp_path, data, [[0]], arch=arch)
    optimizer = trainer.create_optimizer()
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    model = trainer.model
    assert model is not None
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name for name, value in found.items() if value == 0.0} == {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 or name.endswith("A_log")
    }
    assert {value for value in found.values() if value} == {0.1}
    for part in ("A_log", "mixer.D", "norm", "bias"):
        assert any(part in name for name, value in found.items() if value == 0.0), part


def test_a_loss_that_is_no_number_is_shown_and_stops_the_training(
    tmp_path: Path, data: BothKinds
) -> None:
    trainer = make_trainer(tmp_path, data, [[0, 1], [2, 3], [4, 5], [6, 7]], log_steps=2)
    spoil = next(iter(trainer.model.parameters()))  # pyright: ignore[reportOptionalMemberAccess]

    class Spoiler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                spoil.data.fill_(math.nan)

    trainer.add_callback(Spoiler())
    with pytest.raises(UserError, match=r"the loss is nan at step 2: .*--resume never.* --lr"):
        trainer.train()
    assert math.isnan(trainer.state.log_history[-1]["loss"])


def test_embeddings_learn_at_their_own_rate(tmp_path: Path, data: BothKinds) -> None:
    """A first step of AdamW is in proportion to the learning rate, weight decay included."""
    start = make_student().state_dict()
    steps: list[dict[str, Tensor]] = []
    for scale in (1.0, 0.25):
        trainer = make_trainer(tmp_path, data, [[0, 1, 2]], embedding_lr_scale=scale)
        trainer.train()
        model: Any = trainer.model
        steps.append({name: now - start[name] for name, now in model.state_dict().items()})
    plain, scaled = steps
    embedding = "backbone.embedding.weight"
    assert plain[embedding].abs().max() > 0.005
    for name, step in plain.items():
        share = 0.25 if name == embedding else 1.0
        torch.testing.assert_close(scaled[name], share * step, rtol=1e-9, atol=1e-12)
