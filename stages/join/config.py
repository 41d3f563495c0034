"""Settings of the join; importable without numpy and torch, so that `--help` stays quick."""

from __future__ import annotations

from pydantic import Field

from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.join.report import OnMismatch


class JoinConfig(StageConfig):
    """What the student uses in place of the cache's own, and how strict the join is."""

    student_tokenizer: str | None = Field(
        default=None, description="hub id or folder; the cache's own when not given"
    )
    max_length: int | None = Field(
        default=None,
        ge=1,
        description="tokens at which the student will truncate new text; the cache's by default. "
        "Cached samples stay as they are.",
    )
    on_mismatch: OnMismatch = Field(
        default="error",
        description="warn lets differences of files, normaliser, lengths and sides pass; ids that "
        "mean other strings are always refused",
    )
