"""Matching pooled states through a projection that trains with the student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.student import MambaStudentForSequenceClassification
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.auxiliaries import WithAuxiliaries
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    CachedSamples,
    SampleCollator,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.run_folder import CHECKPOINTS, read_run
from teacher_cache.stages.training.trainer import StudentTrainer
from tests import reference_losses as reference
from tests.lessons import samples_lesson, with_pooled_projection
from tests.tiny_runs import student_config
from tests.tiny_students import small_student

WIDTH = 32  # of the tiny BERT's pooled states
NUM_LABELED = 20
Order = list[list[int]]


def test_the_projection_depends_on_the_seed_alone() -> None:
    student = small_student()
    torch.manual_seed(5)
    modules: list[Any] = [
        with_pooled_projection(student, teacher_width=WIDTH, seed=seed) for seed in (3, 3, 4)
    ]
    one, again, other = (module.projection.weight for module in modules)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))  # the global state was left alone
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == (WIDTH, 16)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_it_is_the_student_and_its_pooled_state(pooling: str) -> None:
    student = small_student(pooling=pooling)
    module: Any = with_pooled_projection(student, teacher_width=WIDTH, seed=0).eval()
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [2], [4]])).long()
    read: list[torch.Tensor] = []
    student.head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    inputs = {"input_ids": ids, "attention_mask": mask}
    outputs = module(**inputs, next_token_loss=True)
    plain = student(ids, mask, next_token_loss=True)
    assert torch.equal(outputs.logits, plain.logits)
    assert torch.equal(outputs.next_token_loss_sum, plain.next_token_loss_sum)
    assert torch.equal(outputs.projected, read[0] @ module.projection.weight.T)
    assert plain.pooled is None  # unless it is asked for
    assert module.num_next_tokens(mask) == student.num_next_tokens(mask)


def test_under_autocast_the_projection_is_in_full_precision() -> None:
    module: Any = with_pooled_projection(small_student(), teacher_width=WIDTH, seed=0).eval()
    ids = torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        projected = module(input_ids=ids, attention_mask=torch.ones_like(ids)).projected
    assert projected.dtype == torch.float32
    assert not torch.equal(projected.bfloat16().float(), projected)


class FixedBatches(AlternatingBatches):
    """Batches in a given order."""

    def __init__(self, order: Order):
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._order)


@pytest.fixture(scope="module")
def data(pooled_cache: Path) -> BothKinds:
    labeled, unlabeled = (CacheReader(pooled_cache, split) for split in ("labeled", "unlabeled"))
    return BothKinds(
        CachedSamples(labeled, np.arange(NUM_LABELED), labeled=True),
        CachedSamples(unlabeled, np.arange(12), labeled=False),
    )


def make_module() -> WithAuxiliaries:
    student = small_student(vocab_size=30522, dropout=0.0)
    return with_pooled_projection(student, teacher_width=WIDTH, seed=1).double()


OBJECTIVE = ObjectiveConfig(unlabeled_alpha=0.3, conf_power=1.0, lm_weight=0.4, pooled_weight=2.0)


def trained(folder: Path, data: BothKinds, order: Order, accumulation: int) -> StudentTrainer:
    num_steps = len(order) // accumulation
    config = OptimizationConfig(
        device="cpu", gradient_accumulation=accumulation, log_steps=1, lr=0.01, warmup=0.0
    )
    trainer = StudentTrainer(
        model=make_module(),
        args=training_arguments(
            config,
            folder,
            num_steps=num_steps,
            steps_per_epoch=num_steps,
            evaluates=False,
            keeps_best=False,
            label_names=["labels", "teacher_logits"],
        ),
        lesson=samples_lesson(OBJECTIVE),
        held_out=HeldOutSamples(),
        batches=FixedBatches(order),
        train_dataset=data,
        data_collator=SampleCollator(0),
    )
    trainer.train()
    return trainer


# Two steps of eight labelled and four unlabelled samples, cut in three ways.
CUTS: dict[str, tuple[int, Order]] = {
    "whole": (2, [[*range(8)], [*range(20, 24)], [*range(8, 16)], [*range(24, 28)]]),
    "unequal": (
        4,
        [
            [0], [20, 21, 22], [*range(1, 8)], [23],
            [*range(8, 13)], [24], [25, 26, 27], [*range(13, 16)],
        ],
    ),
    "halves": (
        4,
        [
            [*range(4)], [*range(4, 8)], [20, 21], [22, 23],
            [*range(8, 12)], [*range(12, 16)], [24, 25], [26, 27],
        ],
    ),
}  # fmt: skip


def test_however_a_step_is_cut_student_and_projection_are_the_same(
    tmp_path: Path, data: BothKinds
) -> None:
    found = {name: trained(tmp_path / name, data, order, n) for name, (n, order) in CUTS.items()}
    start = make_module().state_dict()
    whole: Any = found["whole"].model
    expected = whole.state_dict()
    for part in ("projection.weight", "student.backbone.norm_f.weight"):
        assert not torch.equal(expected[part], start[part]), part
    for trainer in found.values():
        model: Any = trainer.model
        for name, values in model.state_dict().items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-6)


def test_the_log_is_what_a_slow_loop_finds(tmp_path: Path, data: BothKinds) -> None:
    accumulation, order = CUTS["unequal"]
    trainer = trained(tmp_path, data, order, accumulation)
    module = make_module().eval()
    distances = []
    for position in [*range(8), *range(20, 24)]:  # the first step's, one at a time
        sample = data[position]
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        with torch.no_grad():
            outputs = module(input_ids=ids, attention_mask=torch.ones_like(ids))
        projected = outputs.projected[0].tolist()
        teacher = sample["pooled"].astype(np.float64).tolist()
        distances.append(1 - reference.cosine(projected, teacher))
    line = next(one for one in trainer.state.log_history if "loss" in one)
    assert line["pooled"] == pytest.approx(sum(distances) / 12, rel=1e-6)


OPTIONS: dict[str, Any] = {"pooled_weight": 1.0, "unlabeled_alpha": 0.3, "dropout": 0.2}
OPTIONS["embedding_lr_scale"] = 0.5


class Interruption(Exception):
    """Stands for a kill."""


def test_an_interrupted_run_goes_on_alike_and_exports_the_student_alone(
    pooled_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_student.run(student_config(pooled_cache, whole, **OPTIONS))
    config = student_config(pooled_cache, run, **OPTIONS)
    with monkeypatch.context() as patch:

        def interrupt(*_: Any) -> None:
            raise Interruption

        patch.setattr(train_student, "_saved", interrupt)
        with pytest.raises(Interruption):
            train_student.run(config)
    torch.save({}, run / CHECKPOINTS / "checkpoint-6" / "optimizer.pt")  # so that 4 is the newest
    train_student.run(config)
    for name in ("model.safetensors", f"{CHECKPOINTS}/checkpoint-6/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    lines = [[line.get("pooled") for line in (read_run(one).result or {})["log"]]
             for one in (run, whole)]  # fmt: skip
    assert lines[0] == lines[1] and any(lines[0])

    checkpoint = load_file(run / CHECKPOINTS / "checkpoint-6" / "model.safetensors")
    assert checkpoint["projection.weight"].shape == (WIDTH, 8)
    exported = load_file(run / "model.safetensors")
    assert {f"student.{name}" for name in exported} | {"projection.weight"} == set(checkpoint)
    assert all(torch.equal(exported[name], checkpoint[f"student.{name}"]) for name in exported)
    student = MambaStudentForSequenceClassification.from_pretrained(run)
    assert exported.keys() == student.state_dict().keys()


def test_the_best_weights_are_kept(pooled_cache: Path, tmp_path: Path) -> None:
    config = student_config(pooled_cache, tmp_path, **OPTIONS, early_stopping=2)
    result = train_student.run(config).record.result or {}
    best = load_file(
        tmp_path / CHECKPOINTS / f"checkpoint-{result['best_step']}" / "model.safetensors"
    )
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], best[f"student.{name}"]) for name in exported)


def test_a_weight_of_0_is_off(tiny_cache: Path, pooled_cache: Path, tmp_path: Path) -> None:
    """The states in the cache change no bit, and nothing but the student is trained."""
    for cache in (tiny_cache, pooled_cache):
        train_student.run(student_config(cache, tmp_path / cache.name, unlabeled_alpha=0.3))
    tiny, pooled = ((tmp_path / one.name) for one in (tiny_cache, pooled_cache))
    name = "model.safetensors"
    assert (tiny / name).read_bytes() == (pooled / name).read_bytes()
    assert "projection.weight" not in load_file(pooled / CHECKPOINTS / "checkpoint-6" / name)
    assert all("pooled" not in line for line in (read_run(pooled).result or {})["log"])


def test_a_cache_without_the_states_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    config = student_config(tiny_cache, tmp_path / "run", pooled_weight=0.5)
    with pytest.raises(UserError, match=r"--pooled-weight 0.5 needs .* --hidden pooled"):
        train_student.run(config)
    assert not (tmp_path / "run").exists()
