"""From our settings to transformers' TrainingArguments, the same way for student and teacher."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from transformers import TrainingArguments

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.fingerprint import refuse_changed_settings
from teacher_cache.stages.device import dtype_name, resolve_device, resolve_dtype
from teacher_cache.stages.training.checkpoints import newest_checkpoint, require_committed
from teacher_cache.stages.training.config import OptimizationConfig
from teacher_cache.stages.training.run_folder import CHECKPOINTS, read_run


def refuse_what_cannot_start(config: OptimizationConfig) -> None:
    """Refuse what no data is needed for to see, before anything is written or removed.

    Raises:
        UserError: for several processes, a log reporter that is not installed, or a named
            checkpoint that is not complete.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise UserError(
            f"training was started in {num_processes} processes and runs in one: start it without "
            "torchrun"
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
) -> TrainingArguments:
    """Arguments of a training whose whole order of batches is one epoch to the Trainer.

    Args:
        config: the run's settings.
        folder: of the run; checkpoints go below it.
        num_steps: optimizer steps of the whole training.
        steps_per_epoch: evaluate and save this often, unless the settings say otherwise.
        evaluates: whether there are held-out samples.
        keeps_best: end with the checkpoint of the best accuracy, not with the last one.
        label_names: keys of the batch that hold targets.

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
        metric_for_best_model="accuracy" if keeps_best else None,
        greater_is_better=True if keeps_best else None,
        logging_steps=config.log_steps,
        # A loss that is no number must be seen, not replaced by the mean of the others.
        logging_nan_inf_filter=False,
        label_names=label_names,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
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
        return newest_checkpoint(folder / CHECKPOINTS)
    checkpoint = require_committed(Path(config.resume))
    refuse_changed_settings(
        checkpoint,
        read_run(checkpoint.resolve().parent.parent).settings,
        read_run(folder).settings,
        start_again="--resume auto",
    )
    return checkpoint
