"""What forked children do: train as the processes that torchrun starts."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EvalPrediction,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages import train_student as stage_two
from teacher_cache.stages.finetune_teacher import LabelTrainer
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.processes import process_group, rank
from teacher_cache.stages.student import MambaStudentForSequenceClassification, build_student
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.training.arguments import training_arguments
from teacher_cache.stages.training.batches import (
    AlternatingBatches,
    Batch,
    BothKinds,
    CachedSamples,
    SampleCollator,
)
from teacher_cache.stages.training.config import OptimizationConfig, TrainStudentConfig
from teacher_cache.stages.training.held_out import HeldOutSamples
from teacher_cache.stages.training.measures import classification_metrics
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer
from teacher_cache.stages.training.trainer import StudentTrainer
from tests.integration.fork_server import run_child
from tests.integration.train_student_child import Steps
from tests.lessons import samples_lesson, with_pooled_projection
from tests.tiny_runs import read_tokenizers_once

OBJECTIVE = ObjectiveConfig(
    alpha=0.3,
    temperature=3.0,
    conf_power=2.0,
    label_smoothing=0.1,
    unlabeled_alpha=0.7,
    lm_weight=0.4,
    pooled_weight=0.5,
)
# 9 labelled and 6 unlabelled samples make batches of 4, 2 and 1; 21 are held out.
NUM_LABELED, NUM_UNLABELED, NUM_HELD_OUT = 9, 6, 21
BATCH_SIZE, NUM_BATCHES = 4, 9
TEACHER_WIDTH = 32
VOCAB_SIZE = 101


def in_processes(number: int, task: str, arguments: dict[str, Any]) -> None:
    """Fork so many processes that run a function of this module; like torchrun, end all with one.

    Raises:
        SystemExit: with the exit code of the first that failed, or 128 and its signal.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = set[int]()
    for process in range(number):
        child = os.fork()
        if child == 0:
            place = {"RANK": process, "LOCAL_RANK": process, "MASTER_PORT": port}
            place |= {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
            os.environ |= {name: str(value) for name, value in place.items()}
            os.environ["MASTER_ADDR"] = "localhost"
            run_child(globals()[task], arguments)
        children.add(child)
    code = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = failed if failed > 0 else 128 - failed
            for other in children:
                os.kill(other, signal.SIGKILL)
    sys.exit(code)


def warm_up(config: str) -> None:
    """Train once, so that children find everything imported; and join once for all."""
    logging.disable_progress_bar()
    read_tokenizers_once(partial(setattr, stage_two))
    stage_two.save_tokenizer = lambda *_: None  # a second, thirty times
    train_student(config)
    gc.freeze()  # or each child's Trainer goes through all of it


def train_student(config: str, die_at: str | None = None, dying_rank: int = 0) -> None:
    """Stage two, from a configuration in JSON with `out` given; one process may kill itself.

    Raises:
        SystemExit: with 2 where it is refused; the sentence is then in `<out>.<rank>.txt`.
    """
    resolved = TrainStudentConfig.model_validate_json(config)
    out = Path(str(resolved.training.out))
    if rank() == dying_rank:
        Steps(out, Path(f"{out}.log"), die_at).install()
    said = Path(f"{out}.{rank()}.txt")
    try:
        result = stage_two.run(resolved)
    except UserError as error:
        said.write_text(str(error))
        sys.exit(2)
    said.write_text(f"complete before: {result.was_complete}")


class Gradients(TrainerCallback):
    """Keeps what the optimizer is given in the first two steps."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < 2:
            named = kwargs["model"].named_parameters()
            self.steps.append({name: weight.grad.clone() for name, weight in named})


class WideCollator(SampleCollator):
    """With the teacher's values in float64, and ids of few tokens: 30,522 take their time."""

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        batch = super().__call__(samples)
        batch["input_ids"] %= VOCAB_SIZE
        return {name: v.double() if v.is_floating_point() else v for name, v in batch.items()}


def few_samples(cache: Path) -> tuple[BothKinds, CachedSamples]:
    """To train on, and to evaluate on."""
    labeled, unlabeled = (CacheReader(cache, split) for split in ("labeled", "unlabeled"))
    held_out = np.arange(NUM_LABELED, NUM_LABELED + NUM_HELD_OUT)
    training = BothKinds(
        CachedSamples(labeled, np.arange(NUM_LABELED), labeled=True),
        CachedSamples(unlabeled, np.arange(NUM_UNLABELED), labeled=False),
    )
    return training, CachedSamples(labeled, held_out, labeled=True)


def few_batches(data: BothKinds, *, unlabeled_ratio: float) -> AlternatingBatches:
    """Of unequal sizes, the last of a step among the smallest."""
    return AlternatingBatches(
        data,
        batch_size=BATCH_SIZE,
        num_batches=NUM_BATCHES,
        unlabeled_ratio=unlabeled_ratio,
        seed=9,
    )


def train_in_float64(
    cache: str, folder: str, accumulation: int, classifier: str | None = None
) -> None:
    """Distil a tiny student, or fine-tune a classifier; each process keeps what it ends with."""
    torch.set_default_dtype(torch.float64)
    with process_group(torch.device("cpu")):
        trainer = float64_trainer(Path(cache), Path(folder), accumulation, classifier)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        found = {
            "weights": trainer.model.state_dict(),  # pyright: ignore[reportOptionalMemberAccess]
            "gradients": gradients.steps,
            "log": trainer.state.log_history,
        }
        torch.save(found, f"{folder}.{rank()}.pt")


def float64_trainer(
    cache: Path, folder: Path, accumulation: int, classifier: str | None
) -> OrderedTrainer:
    data, held_out = few_samples(cache)
    given = {
        "train_dataset": data,
        "eval_dataset": held_out,
        "batches": few_batches(data, unlabeled_ratio=0.0 if classifier else 1.0),
        "data_collator": WideCollator(0),
        "args": training_arguments(
            OptimizationConfig(
                device="cpu",
                batch_size=BATCH_SIZE,
                gradient_accumulation=accumulation,
                log_steps=2,
                lr=0.01,
                checkpoint_steps=3,
            ),
            folder,
            num_steps=NUM_BATCHES // accumulation,
            steps_per_epoch=3,
            evaluates=True,
            keeps_best=False,
            label_names=["labels"] if classifier else ["labels", "teacher_logits"],
            uses_all_weights=classifier is None,
        ),
    }
    if classifier:
        set_seed(0)
        config = AutoConfig.from_pretrained(classifier, vocab_size=VOCAB_SIZE)
        model = AutoModelForSequenceClassification.from_config(config).double()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return LabelTrainer(model=model, compute_metrics=metrics, **given)
    model = with_pooled_projection(spread_student(), teacher_width=TEACHER_WIDTH, seed=0).double()
    return StudentTrainer(
        model=model, lesson=samples_lesson(OBJECTIVE), held_out=HeldOutSamples(), **given
    )


def spread_student() -> MambaStudentForSequenceClassification:
    """Without dropout; its logits are spread, so that the terms differ."""
    student = build_student(
        MambaStudentConfig(
            vocab_size=VOCAB_SIZE,
            d_model=8,
            num_layers=1,
            expand=2,
            d_state=4,
            head_dim=8,
            dropout=0.0,
            position_map={"mode": "move_first_to_last"},
        ),
        seed=1,
    )
    last = [module for module in student.head.modules() if isinstance(module, torch.nn.Linear)][-1]
    last.weight.data *= 20
    return student


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    labels = prediction.label_ids
    labels = labels[0] if isinstance(labels, tuple) else labels
    return classification_metrics(np.asarray(prediction.predictions), labels)
