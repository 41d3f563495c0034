"""Settings of an evaluation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig

Length = Annotated[int, Field(ge=1)]  # tokens


class EvaluateOptions(DeviceConfig):
    """How to evaluate."""

    teacher: str | None = Field(
        default=None,
        description="Teacher to compare with: folder or hub id, or none. Default: the cache's.",
    )
    batch_tokens: int = Field(default=8192, ge=1, description="Padded tokens in a forward batch.")
    latency_lengths: tuple[Length, ...] = Field(
        default=(32, 128, 512),
        description="Lengths, in tokens, at which one forward pass is timed.",
    )
