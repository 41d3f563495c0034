"""Settings of the teacher's forward pass and of the cache it fills."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from teacher_cache.cache.stores.named import DEFAULT_STORE
from teacher_cache.stages.codecs.config import FOR_A_CLASSIFIER, CodecConfig
from teacher_cache.stages.config import (
    ComposedConfig,
    DeviceConfig,
    Of,
    Part,
    StageConfig,
    StoreName,
    comma_joined,
)
from teacher_cache.stages.tasks import DEFAULT_TASK, TaskName

AttentionMode = Literal["none", "cls", "mean", "full"]
OF_LANGUAGE_MODELS = Of(task="lm", elsewhere=FOR_A_CLASSIFIER)


class ForwardConfig(DeviceConfig):
    """How the teacher is run."""

    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Longest sample in tokens, special tokens included; longer documents are cut, "
        "counted and reported, or with --task lm go on in the next sample. Default: the teacher's "
        "limit, at most 512.",
    )
    batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="Padded tokens in a forward batch; out of memory halves a batch.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the model code that a hub repository brings."
    )


class TeacherConfig(ForwardConfig):
    """A teacher and how it is run."""

    teacher: str = Field(description="Hub id or folder.")


class AlignmentConfig(StageConfig):
    """For whose token ids a language model's distributions are cached (--task lm)."""

    student_tokenizer: Annotated[str | None, OF_LANGUAGE_MODELS] = Field(
        default=None,
        description="Tokenizer of the student, hub id or folder: the log says how its ids relate "
        "to the teacher's, and --align brings the distributions to them. Default: the preset's.",
    )
    align: Annotated[Literal["none", "truncate", "map"] | None, OF_LANGUAGE_MODELS] = Field(
        default=None,
        description="Over whose ids the distributions are cached: none keeps the teacher's, for "
        "any student; truncate cuts or extends to the student's where equal ids mean equal "
        "strings; map adds them up by exact byte strings, before the codec cuts. A cache that was "
        "aligned serves that student's tokenizer only. Default: none.",
    )


class LayersConfig(StageConfig):
    """What is cached of the teacher's inside."""

    hidden: Annotated[
        str,
        BeforeValidator(comma_joined),
        Of(
            task="classification",
            word="pooled",
            elsewhere="{flag} {value} is of classifiers: leave pooled out with --task lm; last "
            "caches each position's last state",
        ),
    ] = Field(
        default="none",
        description="States to cache besides the logits (float16), comma-separated: none; pooled, "
        "the vector that the teacher's classification head reads, for train-student "
        "--pooled-weight, and the pooled state of each token by itself, for --embeddings "
        "teacher-states; last, each position's last state; numbers, its states behind these "
        "layers, from 0.",
    )
    attention: Annotated[
        AttentionMode,
        Of(
            task="classification",
            word="cls",
            elsewhere="{flag} {value} is of classifiers, which pool at one position: give "
            "--attention mean or full, or leave it out with --task lm",
        ),
    ] = Field(
        default="none",
        description="Attention maps to cache: none; cls, the pooled position's row, mean over "
        "heads, of classifiers; mean, all rows, mean over heads; or full, every head by itself. "
        "All but cls grow with the square of the length; --dry-run says what they take.",
    )
    attention_layers: Annotated[str, BeforeValidator(comma_joined)] | None = Field(
        default=None,
        description="Layers of which maps are cached: last, all, or numbers from 0, "
        "comma-separated. Default: last.",
    )


class ShardConfig(StageConfig):
    """Where the cache goes, how it is cut, and the views in it."""

    format: StoreName = Field(
        default=DEFAULT_STORE,
        description="How shards lie on disk: an Arrow file each, or a Zarr group each, for who "
        "reads them with zarr or xarray. The values are the same.",
    )
    out: Path | None = Field(
        default=None,
        description="Folder of the cache. Default: ./caches/<data>-<fingerprint[:8]>, with -zarr "
        "behind it for --format zarr.",
    )
    overwrite: bool = Field(default=False, description="Start the cache again if it exists.")
    views: Annotated[
        int,
        Of(
            task="classification",
            elsewhere="{flag} {value} is of classifiers, which label a perturbed text as a whole: "
            "leave it out with --task lm",
        ),
    ] = Field(
        default=0,
        ge=0,
        description="Perturbed copies of each document to cache too, as unlabelled text.",
    )
    shard_mb: int = Field(default=64, ge=1, description="Estimated size of a shard, in megabytes.")
    shard_documents: int = Field(
        default=1024,
        ge=1,
        description="At most this many documents in a shard: what a kill can lose of the work.",
    )


class CaptureConfig(ComposedConfig):
    """A teacher, and what is cached of it."""

    task: TaskName = Field(default=DEFAULT_TASK, description="What the teacher does.")
    layers: Part[LayersConfig]
    forward: Part[TeacherConfig]
    kept: Part[CodecConfig]
    aligned: Part[AlignmentConfig]
