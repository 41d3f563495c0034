"""`--dtype bfloat16`: the loss of the float32 run up to rounding, and weights that stay float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    BothKinds,
    CachedSamples,
    SampleCollator,
)
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.trainer import StudentTrainer
from tests.lessons import samples_lesson
from tests.tiny_students import small_student

OBJECTIVE = ObjectiveConfig(alpha=0.5, temperature=2.0, unlabeled_alpha=0.5)
ROUNDOFF = 2.0**-9  # of bfloat16, relative
# Values in half precision between the embedding and the head, one behind the other: in each of two
# layers the projection in, the convolution, its activation, the scan, the gate and the projection
# out. Each adds an error of ROUNDOFF, relative to a state whose norm the next layer takes.
NUM_ROUNDINGS = 2 * 6


def trained(folder: Path, data: BothKinds, dtype: str, accumulation: int) -> StudentTrainer:
    config = OptimizationConfig.model_validate(
        {
            "device": "cpu",
            "dtype": dtype,
            "batch_size": 16 // accumulation,
            "gradient_accumulation": 2 * accumulation,
            "log_steps": 1,
        }
    )
    student = small_student(vocab_size=30522, dropout=0.0)
    trainer = StudentTrainer(
        model=student,
        args=training_arguments(
            config,
            folder,
            num_steps=1,
            steps_per_epoch=1,
            evaluates=False,
            keeps_best=False,
            label_names=["labels", "teacher_logits"],
        ),
        lesson=samples_lesson(OBJECTIVE),
        held_out=HeldOutSamples(),
        batches=AlternatingBatches(
            data,
            batch_size=config.batch_size,
            num_batches=config.gradient_accumulation,
            unlabeled_ratio=1.0,
            seed=0,
        ),
        train_dataset=data,
        data_collator=SampleCollator(0),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("accumulation", [1, 4])
def test_half_precision_gives_the_loss_up_to_its_rounding(
    tmp_path: Path, tiny_cache: Path, accumulation: int
) -> None:
    labeled, unlabeled = (CacheReader(tiny_cache, split) for split in ("labeled", "unlabeled"))
    data = BothKinds(
        CachedSamples(labeled, np.arange(16), labeled=True),
        CachedSamples(unlabeled, np.arange(16), labeled=False),
    )
    whole = trained(tmp_path / "float32", data, "float32", 1).state.log_history[0]
    trainer = trained(tmp_path / "bfloat16", data, "bfloat16", accumulation)
    half = trainer.state.log_history[0]

    assert trainer.model is not None and isinstance(trainer.optimizer, torch.optim.Optimizer)
    dtypes = {weight.dtype for weight in trainer.model.parameters()}
    moments = {
        value.dtype for state in trainer.optimizer.state.values() for value in state.values()
    }
    assert dtypes == moments == {torch.float32}
    # CE moves by at most twice its largest change of a logit, T^2 KD by 2 T times as much, and
    # logits of a fresh head are about 1 at most.
    change = NUM_ROUNDINGS * ROUNDOFF
    c = OBJECTIVE
    bound = ((1 - c.alpha) + (c.alpha + c.unlabeled_alpha) * c.temperature) * 2 * change
    assert half["loss"] != whole["loss"]  # it is on
    assert half["loss"] == pytest.approx(whole["loss"], abs=bound)
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"], rel=2 * change)
