"""Settings of an evaluation."""

from __future__ import annotations

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig


class EvaluateOptions(DeviceConfig):
    """How to evaluate."""

    teacher: str | None = Field(
        default=None,
        description="Teacher to compare with: folder or hub id, or none. Default: the cache's.",
    )
    batch_tokens: int = Field(default=8192, ge=1, description="Padded tokens in a forward batch.")
    latency_lengths: tuple[int, ...] = Field(
        default=(32, 128, 512),
        description="Lengths, in tokens, at which one forward pass is timed.",
    )
