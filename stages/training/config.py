"""Settings of the student's architecture and of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig, StageConfig
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.losses.config import ObjectiveConfig


class ArchitectureConfig(StageConfig):
    """The Mamba student's shape."""

    arch: Literal["mamba2"] = Field("mamba2", description="Student architecture.")
    d_model: int = Field(256, ge=1, description="Width.")
    num_layers: int = Field(4, ge=1, description="Layers.")
    expand: int = Field(3, ge=1, description="Inner width, as a multiple of the width.")
    d_state: int = Field(48, ge=1, description="State size N of each head.")
    head_dim: int = Field(96, ge=1, description="Width P of a head; divides expand * d_model.")
    pooling: Literal["cls", "mean", "last"] = Field(
        "cls",
        description="What is classified: the CLS token (moved to the end), the mean, or the "
        "last position.",
    )
    head: Literal["mlp", "linear"] = Field("mlp", description="Classification head.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout in the classification head.")


class OptimizationConfig(DeviceConfig):
    """How a model is trained: shared by student and teacher."""

    out: Path | None = Field(None, description="Folder of the run.")
    epochs: float = Field(3, gt=0, description="Passes over the labelled samples.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; replaces --epochs when given."
    )
    batch_size: int = Field(32, ge=1, description="Samples in a batch.")
    gradient_accumulation: int = Field(1, ge=1, description="Batches in an optimizer step.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate (AdamW).")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay.")
    warmup: float = Field(0.06, ge=0, le=1, description="Share of the steps that warm up.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    eval_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the labelled samples held out for evaluation during training, "
        "chosen by sample id; 0 trains on all and evaluates none.",
    )
    checkpoint_steps: int | None = Field(
        None,
        ge=1,
        description="Evaluate and save a checkpoint every so many steps. Default: an epoch.",
    )
    log_steps: int = Field(10, ge=1, description="Steps between two lines of the log.")
    seed: int = Field(0, ge=0, description="Seed of weights, order and dropout.")
    resume: str = Field(
        "auto",
        description="auto goes on from the run's newest checkpoint, never starts again, "
        "anything else is the folder of a checkpoint.",
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="Where the log goes besides the run's own."
    )


# Settings that say where to compute and what to print, not what the model becomes.
NOT_RESULTS = frozenset({"out", "device", "resume", "report_to", "log_steps"})


class TrainingConfig(OptimizationConfig):
    """How the student is trained."""

    cache: Path | None = Field(
        None, description="Folder of the cache. Default: the newest complete one in ./caches."
    )
    out: Path | None = Field(
        None, description="Folder of the run. Default: ./runs/<cache>-<hash of the settings>."
    )
    unlabeled_ratio: float = Field(
        1.0, gt=0, description="Unlabelled batches for each labelled one (with --unlabeled-alpha)."
    )
    early_stopping: int | None = Field(
        None,
        ge=1,
        description="Stop after so many evaluations without a better accuracy, and keep the best.",
    )


class TrainStudentConfig(ObjectiveConfig, JoinConfig, ArchitectureConfig, TrainingConfig):
    """Everything stage two needs; the command line finds the newest cache if none is named."""


class FinetuneOptions(OptimizationConfig):
    """The base model and how it becomes a teacher."""

    model: str = Field(description="Base model: hub id or folder of an encoder or decoder.")
    out: Path | None = Field(
        None, description="Folder of the teacher. Default: ./teachers/<data>-<model>."
    )
    max_length: int = Field(
        512, ge=2, description="Longest sample in tokens; longer documents are cut."
    )
    epochs: float = Field(2, gt=0, description="Passes over the labelled samples.")
    lr: float = Field(5e-5, gt=0, description="Peak learning rate (AdamW).")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "linear", description="Learning rate after the warm-up."
    )
