"""Settings of the student's architecture and of its training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from teacher_cache.cache.errors import did_you_mean
from teacher_cache.stages.config import (
    ComposedConfig,
    DeviceConfig,
    Of,
    Part,
    StageConfig,
    flag_of,
    owners,
)
from teacher_cache.stages.join.config import JoinConfig, ProjectionConfig
from teacher_cache.stages.losses.config import OF_CLASSIFIERS, ObjectiveConfig, TransferConfig

MAMBA_ARCHITECTURES = ("mamba", "mamba2")
PRETRAINED = "hf:"
UnlabeledFrom = Literal["all", "corpus", "views", "labeled-views"]
SHAPES_CLASSIFIERS = replace(OF_CLASSIFIERS, is_idle=False)


class ArchitectureConfig(StageConfig):
    """The student: a Mamba and its shape, or a pre-trained model."""

    arch: str = Field(
        default="mamba2",
        description="Student: mamba (Mamba-1), mamba2, or hf:ID, the sequence classifier (or, of "
        "a language model's cache, the causal language model) of a hub id or folder, which starts "
        "from its weights, takes none of the options below, and wants a lower --lr, 5e-5 say.",
    )
    d_model: int = Field(default=256, ge=1, description="Width.")
    num_layers: int = Field(default=4, ge=1, description="Layers.")
    expand: int = Field(default=3, ge=1, description="Inner width, as a multiple of the width.")
    d_state: int = Field(default=48, ge=1, description="State size N of each channel.")
    head_dim: int = Field(
        default=96, ge=1, description="Width P of a head of Mamba-2; divides expand * d_model."
    )
    bidirectional: Annotated[bool, OF_CLASSIFIERS] = Field(
        default=False, description="Scan the reversed text too, in every layer."
    )
    pooling: Annotated[Literal["cls", "mean", "last"], SHAPES_CLASSIFIERS] = Field(
        default="cls",
        description="What is classified: the CLS token (moved to the end), the mean, or the "
        "last position.",
    )
    head: Annotated[Literal["mlp", "linear"], SHAPES_CLASSIFIERS] = Field(
        default="mlp", description="Classification head."
    )
    dropout: Annotated[float, SHAPES_CLASSIFIERS] = Field(
        default=0.1, ge=0, lt=1, description="Dropout in the classification head."
    )

    @property
    def pretrained(self) -> str | None:
        """Hub id or folder that a pre-trained student starts from; None for a Mamba."""
        return self.arch.removeprefix(PRETRAINED) if self.arch.startswith(PRETRAINED) else None

    def shape(self, task: str) -> dict[str, Any]:
        """What makes a Mamba of this task, by `MambaStudentConfig`'s names."""
        of_another = {name for name, owner in owners(type(self)).items() if owner.task != task}
        return self.model_dump(
            exclude=of_another | ({"head_dim"} if self.arch == "mamba" else set())
        )

    @model_validator(mode="after")
    def _has_heads_where_they_are_sized(self) -> ArchitectureConfig:
        if self.arch == "mamba" and "head_dim" in self.model_fields_set:
            raise PydanticCustomError(
                "no_heads",
                "--head-dim sizes the heads of a Mamba-2, and --arch mamba has none: leave it out "
                "(in a file with both kinds of student, give it to each Mamba-2)",
            )
        return self

    @field_validator("arch")
    @classmethod
    def _is_known(cls, arch: str) -> str:
        if arch not in MAMBA_ARCHITECTURES and not arch.removeprefix(PRETRAINED).strip():
            raise PydanticCustomError("no_id", "expected a hub id or a folder, as in hf:ID")
        if arch not in MAMBA_ARCHITECTURES and not arch.startswith(PRETRAINED):
            nearest = did_you_mean(arch, (*MAMBA_ARCHITECTURES, f"{PRETRAINED}ID"))
            raise PydanticCustomError("no_such_arch", "{nearest}", {"nearest": nearest})
        return arch


class OptimizationConfig(DeviceConfig):
    """How a model is trained: shared by student and teacher."""

    out: Path | None = Field(default=None, description="Folder of the run.")
    epochs: float = Field(
        default=3, gt=0, allow_inf_nan=False, description="Passes over the labelled samples."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps; replaces --epochs when given."
    )
    batch_size: int = Field(
        default=32,
        ge=1,
        description="Samples in a batch, which the processes that torchrun starts share.",
    )
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches in an optimizer step.")
    lr: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="Peak learning rate (AdamW)."
    )
    weight_decay: float = Field(
        default=0.01, ge=0, allow_inf_nan=False, description="Weight decay."
    )
    warmup: float = Field(default=0.06, ge=0, le=1, description="Share of the steps that warm up.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    eval_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Share of the labelled samples held out for evaluation during training, "
        "chosen by sample id; 0 trains on all and evaluates none.",
    )
    checkpoint_steps: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate and save a checkpoint every so many steps. Default: an epoch.",
    )
    log_steps: int = Field(default=10, ge=1, description="Steps between two lines of the log.")
    seed: int = Field(default=0, ge=0, description="Seed of weights, order and dropout.")
    resume: str = Field(
        default="auto",
        description="auto goes on from the run's newest checkpoint, never starts again, "
        "anything else is the folder of a checkpoint.",
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        default="none", description="Where the log goes besides the run's own."
    )


# Settings that say where to compute and what to print, not what the model becomes.
NOT_RESULTS = frozenset({"out", "device", "resume", "report_to", "log_steps"})


class TrainingConfig(OptimizationConfig):
    """How the student is trained."""

    cache: Path | None = Field(
        default=None,
        description="Folder of the cache. Default: the newest complete one in ./caches.",
    )
    out: Path | None = Field(
        default=None,
        description="Folder of the run. Default: ./runs/<cache>-<hash of the settings>.",
    )
    unlabeled_ratio: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Unlabelled batches for each labelled one (with --unlabeled-alpha).",
    )
    unlabeled_from: Annotated[UnlabeledFrom, OF_CLASSIFIERS] = Field(
        default="all",
        description="Which unlabelled samples take part (with --unlabeled-alpha): the unlabelled "
        "corpus, the views of either corpus, those of the labelled one alone, or all.",
    )
    early_stopping: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations without a better accuracy (of a language "
        "model: a lower held-out objective), and keep the best.",
    )
    embeddings: Annotated[
        Literal["random", "teacher", "teacher-states"],
        Of(
            task="classification",
            word="teacher-states",
            elsewhere="{flag} {value} starts from pooled states, and the cache is of a language "
            "model, which has none: give {flag} teacher, or leave it out",
        ),
    ] = Field(
        default="random",
        description="What a Mamba student's embeddings start from: random values; the teacher's, "
        "cut to the width by a truncated SVD; or these together with the teacher's pooled state of "
        "each token read by itself (cached with --hidden pooled).",
    )
    embedding_lr_scale: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Learning rate of the student's embeddings, as a multiple of --lr; below 1 "
        "they stay closer to what they start from, 0.1 is a good value with --embeddings teacher.",
    )


class TrainStudentConfig(ComposedConfig):
    """Everything stage two needs; the command line finds the newest cache if none is named."""

    objective: Part[ObjectiveConfig]
    transfer: Part[TransferConfig]
    join: Part[JoinConfig]
    projection: Part[ProjectionConfig]
    student: Part[ArchitectureConfig]
    training: Part[TrainingConfig]

    @model_validator(mode="after")
    def _takes_its_own_options(self) -> TrainStudentConfig:
        beside = {"embeddings", "lm_weight", "pooled_weight"} & self.given.keys()
        given = {*self.student.given, *self.transfer.given, *beside} - {"arch"}
        if self.student.pretrained is not None and given:
            raise PydanticCustomError(
                "mamba_only",
                "only a Mamba student takes {options}, and --arch {arch} brings its own shape: "
                "leave out what it does not take (in a file with both kinds of student, give it "
                "to each Mamba student)",
                {"options": _flags(given), "arch": self.student.arch},
            )
        return self

    @model_validator(mode="after")
    def _does_not_stop_before_it_begins(self) -> TrainStudentConfig:
        is_staged = self.transfer.transfer_schedule == "staged"
        if self.training.early_stopping is not None and is_staged:
            raise PydanticCustomError(
                "stops_early",
                "--early-stopping waits for a better accuracy, which the first stages of "
                "--transfer-schedule staged do not train: leave one of the two out",
            )
        return self

    @model_validator(mode="after")
    def _averages_channels_where_there_are(self) -> TrainStudentConfig:
        if self.student.arch != "mamba" and "attention_channels" in self.given:
            raise PydanticCustomError(
                "no_channels",
                "--attention-channels is of --arch mamba, and a Mamba-2 averages all its heads: "
                "leave it out (in a file with both kinds of student, give it to each Mamba-1)",
            )
        return self

    @model_validator(mode="after")
    def _chooses_among_what_takes_part(self) -> TrainStudentConfig:
        chosen = self.training.unlabeled_from
        if chosen != "all" and not self.objective.unlabeled_alpha:
            raise PydanticCustomError(
                "none_take_part",
                "--unlabeled-from {chosen} chooses among unlabelled samples, and none take part "
                "while --unlabeled-alpha is 0: give --unlabeled-alpha, 0.3 say, or leave it out",
                {"chosen": chosen},
            )
        return self

    @model_validator(mode="after")
    def _projects_what_it_configures(self) -> TrainStudentConfig:
        given = self.projection.given
        if given and self.join.align != "projection":
            raise PydanticCustomError(
                "no_projection",
                "only --align projection takes {options}: give it, or leave that out",
                {"options": _flags(given)},
            )
        return self

    @model_validator(mode="after")
    def _reads_no_further_than_it_predicts(self) -> TrainStudentConfig:
        if self.objective.lm_weight and self.student.bidirectional:
            raise PydanticCustomError(
                "reads_ahead",
                "--lm-weight has the student predict the next token, and with --bidirectional it "
                "has read it: leave one of the two out",
            )
        return self


def _flags(options: Iterable[str]) -> str:
    return ", ".join(map(flag_of, sorted(options)))


class FinetuneOptions(OptimizationConfig):
    """How a base model becomes a teacher."""

    out: Path | None = Field(
        default=None, description="Folder of the teacher. Default: ./teachers/<data>-<model>."
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Longest sample in tokens; longer documents are cut. Default: the model's "
        "limit, at most 512.",
    )
    epochs: float = Field(
        default=2, gt=0, allow_inf_nan=False, description="Passes over the labelled samples."
    )
    lr: float = Field(
        default=5e-5, gt=0, allow_inf_nan=False, description="Peak learning rate (AdamW)."
    )
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        default="linear", description="Learning rate after the warm-up."
    )
