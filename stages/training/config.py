"""Settings of the student's architecture and of its training."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
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
MIXERS = (*MAMBA_ARCHITECTURES, "attention")
PRETRAINED = "hf:"
UnlabeledFrom = Literal["all", "corpus", "views", "labeled-views"]
SHAPES_CLASSIFIERS = replace(OF_CLASSIFIERS, is_idle=False)


def layer_kinds(value: Any) -> Any:
    """`mamba2:0-5,attention:6` as mixer, first and last layer of each part."""
    if not isinstance(value, str):
        return value
    found: list[tuple[str, int, int]] = []
    for part in filter(None, (one.strip() for one in value.split(","))):
        match = re.fullmatch(r"([\w-]+)\s*:\s*(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (-1, -1) if match is None else (int(match[2]), int(match[3] or match[2]))
        if match is None or match[1] not in MIXERS or last < first:
            raise PydanticCustomError(
                "no_layers",
                "{part} is no part of --layers: give mixers ({mixers}) and their layers, as in "
                "mamba2:0-5,attention:6",
                {"part": part, "mixers": ", ".join(MIXERS)},
            )
        if any(first <= other and last >= start for _, start, other in found):
            raise PydanticCustomError(
                "layer_twice",
                "{part} names a layer that another part of --layers has named: name each once",
                {"part": part},
            )
        found.append((match[1], first, last))
    return tuple(found)


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
    d_intermediate: int = Field(
        default=0, ge=0, description="Width of a gated MLP behind each mixer; 0 for none."
    )
    layers: Annotated[tuple[tuple[str, int, int], ...], BeforeValidator(layer_kinds)] = Field(
        default=(),
        description="Mixers by layer, from 0, as in mamba2:0-5,attention:6; layers that are not "
        "named have that of --arch. Default: all have.",
    )
    init: Annotated[
        Literal["random", "teacher"],
        Of(
            task="lm",
            elsewhere="{flag} {value} copies a causal language model, and the cache is of a "
            "classifier: leave {flag} out",
        ),
    ] = Field(
        default="random",
        description="What a Mamba-2's layers start from: random values, or the teacher's "
        "(docs/training.md), whose sizes they then have; attention stays where --layers keeps it, "
        "else it becomes a mixer.",
    )
    teacher_folder: Path | None = Field(
        default=None,
        description="Folder of the teacher for --init teacher; its weights must be those that "
        "made the cache. Default: where the cache says it was.",
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
        """What makes a Mamba of this task with random weights, by `MambaStudentConfig`'s names."""
        left_out = {name for name, owner in owners(type(self)).items() if owner.task != task}
        left_out |= {"layers", "init", "teacher_folder"}
        if self.arch == "mamba":
            left_out.add("head_dim")
        if not self.d_intermediate:  # older runs know no such name
            left_out.add("d_intermediate")
        shape = self.model_dump(exclude=left_out)
        kept = self.attention_layers
        return shape | {"attn_layer_idx": kept} if kept else shape

    @property
    def attention_layers(self) -> list[int]:
        """The layers whose mixer is attention."""
        return [
            layer
            for kind, first, last in self.layers
            for layer in range(first, last + 1)
            if kind == "attention"
        ]

    @property
    def copies_teacher(self) -> bool:
        """Whether its layers, and so its sizes, are the teacher's."""
        return self.init == "teacher"

    @model_validator(mode="after")
    def _names_layers_that_are_there(self) -> ArchitectureConfig:
        beyond = [last for _, _, last in self.layers if last >= self.num_layers]
        if beyond and not self.copies_teacher:
            raise PydanticCustomError(
                "no_such_layer",
                "--layers names layer {layer}, and the student has {num}, counted from 0: name one "
                "of these, or give --num-layers",
                {"layer": beyond[0], "num": self.num_layers},
            )
        return self

    @model_validator(mode="after")
    def _has_the_mixers_of_its_kind(self) -> ArchitectureConfig:
        others = sorted({kind for kind, _, _ in self.layers} - {self.arch, "attention"})
        if others:
            raise PydanticCustomError(
                "other_mixers",
                "--layers names {other}, and --arch is {arch}: a student has mixers of one kind, "
                "and attention",
                {"other": others[0], "arch": self.arch},
            )
        return self

    @model_validator(mode="after")
    def _has_the_sizes_of_what_it_copies(self) -> ArchitectureConfig:
        if not self.copies_teacher:
            if self.teacher_folder is not None:
                raise PydanticCustomError(
                    "copies_nothing",
                    "--teacher-folder is of --init teacher, which is not given: give it too, or "
                    "leave --teacher-folder out",
                )
            return self
        if self.arch != "mamba2":
            raise PydanticCustomError(
                "no_such_copy",
                "--init teacher makes a Mamba-2 of the teacher's layers, and --arch is {arch}: "
                "leave one of the two out",
                {"arch": self.arch},
            )
        sizes = {"d_model", "num_layers", "expand", "d_state", "head_dim", "d_intermediate"}
        given = sizes & self.model_fields_set
        if given:
            raise PydanticCustomError(
                "has_sizes",
                "--init teacher takes the teacher's sizes: leave {options} out",
                {"options": _flags(given)},
            )
        return self

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
    def _starts_from_one_thing(self) -> TrainStudentConfig:
        if self.student.copies_teacher and self.training.embeddings != "random":
            raise PydanticCustomError(
                "two_starts",
                "--init teacher brings the teacher's embeddings as they are: leave --embeddings "
                "out",
            )
        return self

    @model_validator(mode="after")
    def _does_not_stop_before_it_begins(self) -> TrainStudentConfig:
        is_staged = self.transfer.transfer_schedule != "together"
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
