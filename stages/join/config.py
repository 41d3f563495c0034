"""Settings of the join; importable without numpy and torch, so that `--help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from teacher_cache.stages.config import Of, StageConfig
from teacher_cache.stages.join.report import OnMismatch

AlignMode = Literal["auto", "truncate", "pad", "map", "spans", "projection"]


class JoinConfig(StageConfig):
    """What the student uses in place of the cache's own, and how strict the join is."""

    student_tokenizer: str | None = Field(
        default=None, description="hub id or folder; the cache's own when not given"
    )
    align: Annotated[
        AlignMode,
        Of(
            task="lm",
            elsewhere="{flag} {value} is of language models, and the cache is a classifier's: "
            "leave the option out, and give the student the cache's own tokenizer",
        ),
    ] = Field(
        default="auto",
        description="of a language model's cache, how its ids become those of another tokenizer: "
        "auto takes the same ids, padded where the student has more, and stops otherwise; truncate "
        "and pad need ids that mean the same; map, spans and projection read the text again with "
        "the student's tokenizer",
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


class ProjectionConfig(StageConfig):
    """The learned projection of --align projection."""

    projection_candidates: int = Field(
        default=4,
        ge=1,
        description="student ids over which a teacher id may spread (with --align projection)",
    )
    projection_embeddings: str | None = Field(
        default=None,
        description="hub id or folder of a language model with the student's tokenizer: what its "
        "token embeddings and the teacher's find alike is where the "
        "learned rows begin. Default: the strings say it (with --align projection).",
    )
    projection_start: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the steps with the fixed map alone (with --align projection)",
    )
    projection_end: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the steps from which the learned projection alone counts; in "
        "between one passes into the other (with --align projection)",
    )

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> ProjectionConfig:
        if self.projection_end < self.projection_start:
            raise PydanticCustomError(
                "ends_before_it_starts",
                "--projection-end {end} comes before --projection-start {start}: give one that "
                "is not lower",
                {"start": self.projection_start, "end": self.projection_end},
            )
        return self
