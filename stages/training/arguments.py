"""From our settings to transformers' TrainingArguments, the same way for student and teacher."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import torch
from transformers import TrainingArguments

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import refuse_changed_settings
from teacher_cache.stages.models.device import dtype_name, resolve_device, resolve_dtype
from teacher_cache.stages.processes import num_local_processes, num_processes
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.measures import ACCURACY, Measure
from teacher_cache.stages.training.run_folder import (
    CHECKPOINTS,
    newest_checkpoint,
    read_run,
    require_committed,
)

logger = logging.getLogger(__name__)


def refuse_what_cannot_start(config: OptimizationConfig) -> None:
    """Refuse what no data is needed for to see, before anything is written or removed.

    Raises:
        UserError: for more processes than GPUs, a log reporter that is not installed, or a named
            checkpoint that is not complete.
    """
    if resolve_device(config).type == "cuda" and num_local_processes() > torch.cuda.device_count():
        raise UserError(
            f"torchrun started {num_local_processes()} processes on a machine with "
            f"{torch.cuda.device_count()} CUDA devices, and each needs one: lower "
            "--nproc-per-node, or give --device cpu"
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(
            f"--report-to {config.report_to} needs the package {config.report_to}, which is not "
            f"installed: pip install {config.report_to}"
        )
    if config.resume not in ("auto", "never"):
        require_committed(Path(config.resume))


def training_arguments(
    config: OptimizationConfig,
    folder: Path,
    *,
    num_steps: int,
    steps_per_epoch: int,
    evaluates: bool,
    keeps_best: bool,
    label_names: list[str],
    measure: Measure = ACCURACY,
    uses_all_weights: bool = False,
) -> TrainingArguments:
    """Arguments of a training whose whole order of batches is one epoch to the Trainer.

    Args:
        config: the run's settings.
        folder: of the run; checkpoints go below it.
        num_steps: optimizer steps of the whole training.
        steps_per_epoch: evaluate and save this often, unless the settings say otherwise.
        evaluates: whether there are held-out samples.
        keeps_best: end with the checkpoint of the best evaluation, not with the last one.
        label_names: keys of the batch that hold targets.
        measure: of how good an evaluation is.
        uses_all_weights: whether every step gives every weight a gradient; several processes
            look for those without one where that is not known.
    """
    device = resolve_device(config)
    dtype = dtype_name(resolve_dtype(config, device))
    checkpoint_steps = min(config.checkpoint_steps or steps_per_epoch, num_steps)
    return TrainingArguments(
        output_dir=str((folder / CHECKPOINTS).resolve()),
        num_train_epochs=1,
        max_steps=num_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type=config.schedule,
        warmup_steps=round(config.warmup * num_steps),
        use_cpu=device.type == "cpu",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        seed=config.seed,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=checkpoint_steps,
        save_strategy="steps",
        save_steps=checkpoint_steps,
        load_best_model_at_end=keeps_best,
        metric_for_best_model=measure.name if keeps_best else None,
        greater_is_better=measure.higher_is_better if keeps_best else None,
        logging_steps=config.log_steps,
        # A loss that is no number must be seen, not replaced by the mean of the others.
        logging_nan_inf_filter=False,
        label_names=label_names,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=not uses_all_weights,
        disable_tqdm=True,
        report_to=[] if config.report_to == "none" else [config.report_to],
    )


def checkpoint_to_resume(config: OptimizationConfig, folder: Path) -> Path | None:
    """The checkpoint that the settings ask to go on from, if there is one.

    Raises:
        UserError: if a checkpoint was named that is not complete, or of other settings.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    else:
        checkpoint = _named_checkpoint(config, folder)
    if checkpoint is not None:
        _compare_processes(checkpoint)
    return checkpoint


def _named_checkpoint(config: OptimizationConfig, folder: Path) -> Path:
    checkpoint = require_committed(Path(config.resume))
    refuse_changed_settings(
        checkpoint,
        read_run(checkpoint.resolve().parent.parent).settings,
        read_run(folder).settings,
        start_again="--resume auto",
    )
    return checkpoint


def _compare_processes(checkpoint: Path) -> None:
    """Say where dropout cannot go on as it would have: each process has its own random state."""
    num_before = len(list(checkpoint.glob("rng_state*.pth")))
    if num_before != num_processes():
        logger.warning(
            "%s was written by %d processes, and %d go on: the same up to rounding without "
            "dropout, other draws with it",
            checkpoint.name,
            num_before,
            num_processes(),
        )
