"""Settings of the teacher's forward pass and of the cache it fills."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig


class TeacherConfig(DeviceConfig):
    """A fine-tuned sequence classifier and how to run it."""

    teacher: str = Field(description="Teacher: hub id or folder of a fine-tuned classifier.")
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Longest sample in tokens, special tokens included; longer documents are cut, "
        "counted and reported. Default: the teacher's limit, at most 512.",
    )
    batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="Padded tokens in a forward batch; out of memory halves a batch.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the model code that a hub repository brings."
    )


class ShardConfig(TeacherConfig):
    """What is cached besides the logits, where the cache goes and how it is cut."""

    hidden: Literal["none", "pooled"] = Field(
        default="none",
        description="States to cache besides the logits: none, or pooled, the vector that the "
        "teacher's classification head reads (float16), for train-student --pooled-weight; and "
        "the pooled state of each token by itself, for --embeddings teacher-states.",
    )
    out: Path | None = Field(
        default=None, description="Folder of the cache. Default: ./caches/<data>-<fingerprint[:8]>."
    )
    overwrite: bool = Field(default=False, description="Start the cache again if it exists.")
    views: int = Field(
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
