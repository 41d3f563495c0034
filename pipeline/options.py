"""The options of each command: the stages' own settings, plus how a person names data.

Light to import: `--help` builds itself from these models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from teacher_cache.stages.config import DeviceConfig, Of, StageConfig, comma_separated
from teacher_cache.stages.evaluation.config import EvaluateOptions, GenerationOptions, Length
from teacher_cache.stages.join.config import JoinConfig
from teacher_cache.stages.tasks import TaskName
from teacher_cache.stages.teacher.config import ShardConfig
from teacher_cache.stages.training.config import FinetuneOptions

TxtUnit = Literal["line", "paragraph", "document", "article"]
Names = Annotated[tuple[str, ...], BeforeValidator(comma_separated)]
Lengths = Annotated[tuple[Length, ...], BeforeValidator(comma_separated)]


OF_LABELS = Of(
    task="classification",
    elsewhere="{flag} is of classifiers: leave it out with language models, for which each token "
    "is the label of those before it",
)
OF_CACHES = Of(
    task="lm", elsewhere="{flag} is of language models: give labelled documents with --data"
)


class DataOptions(StageConfig):
    """How a person names labelled data."""

    data: str = Field(
        description="Data: a preset (imdb, sst2, demo; for language models wikitext, openwebtext, "
        "moe-to-mamba, austen), a hub id (id:subset where it has several), a folder (aclImdb's "
        "layout too), or a csv, tsv, jsonl, parquet or txt file (gz and bz2 too)."
    )
    split: str | None = Field(
        default=None, description="Split of the data. Default: the preset's, else train."
    )
    text_column: str | None = Field(
        default=None, description="Column with the texts. Default: the usual names are tried."
    )
    label_column: Annotated[str | None, OF_LABELS] = Field(
        default=None, description="Column with the labels. Default: the usual names are tried."
    )
    label_names: Annotated[Names | None, OF_LABELS] = Field(
        default=None,
        description="Label names in the order of the teacher's class ids, comma-separated.",
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="At most so many labelled documents, of a shuffled order."
    )


class FinetuneTeacherOptions(DataOptions, FinetuneOptions):
    """`pipe finetune-teacher`."""

    model: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description="Base model: hub id or folder of an encoder or decoder. Default: the preset's.",
    )
    validation_split: str | None = Field(
        default=None,
        description="Split to evaluate on. Default: the preset's, else --eval-fraction of the "
        "data.",
    )


class TextOptions(StageConfig):
    """How text files are cut into documents."""

    txt_unit: TxtUnit | None = Field(
        default=None,
        description="What of a txt file is a document: a line, a paragraph (between empty lines) "
        "or the whole document; or an article of WikiText, which a table of its lines may hold "
        "too. Default: the preset's, else line.",
    )


class CacheTeacherOptions(DataOptions, TextOptions, ShardConfig):
    """`pipe cache-teacher`."""

    teacher: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description="Teacher: hub id or folder of a fine-tuned classifier or, with --task lm, of "
        "a causal language model. Default: the preset's.",
    )
    task: TaskName | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description="What the teacher does: classification of documents, or lm, the prediction of "
        "every next token, for which text needs no labels. Default: the preset's, else "
        "classification.",
    )
    unlabeled: str | None = Field(
        default=None,
        description="Unlabelled text: as --data, or none. Default: the preset's, or the folder's "
        "own unlabelled split; none with --task lm, for which it is a second corpus.",
    )
    unlabeled_split: str | None = Field(default=None, description="Split of the unlabelled text.")
    unlabeled_max_samples: int | None = Field(
        default=5000,
        ge=1,
        description="At most so many unlabelled documents; a number beyond what there is takes "
        "all.",
    )
    fallback: Names = Field(
        default=(),
        description="Data to take, in this order, if --data cannot be loaded; comma-separated.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the documents' order.")


class CheckOptions(JoinConfig):
    """`pipe check`."""

    cache: Path | None = Field(
        default=None,
        description="Folder of the cache. Default: the newest complete one in ./caches.",
    )


class EvaluateCommandOptions(DataOptions, TextOptions, EvaluateOptions):
    """`pipe evaluate`."""

    data: str | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]  (optional here)
        default=None,
        description="Data to evaluate on, labelled for classifiers: as for cache-teacher; a "
        "preset's held-out split.",
    )
    cache: Annotated[Path | None, OF_CACHES] = Field(
        default=None,
        description="Of language models, in the place of --data: a cache, which needs no teacher; "
        "of the one that a run was trained on, what it held out. Default: none.",
    )
    latency_lengths: Lengths = Field(
        default=(32, 128, 512), description="Lengths in tokens at which one forward pass is timed."
    )


class PredictOptions(DeviceConfig, GenerationOptions):
    """`pipe predict`."""


class PredictSettings(EvaluateCommandOptions, GenerationOptions):
    """What `pipe predict` may find in the section `evaluate` of a file, and its own options."""
