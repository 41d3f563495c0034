"""Settings of the teacher's forward pass."""

from __future__ import annotations

from pydantic import Field

from teacher_cache.stages.config import DeviceConfig


class TeacherConfig(DeviceConfig):
    """A fine-tuned sequence classifier and how to run it."""

    teacher: str = Field(description="Teacher: hub id or folder of a fine-tuned classifier.")
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest sample in tokens, special tokens included; longer documents are cut, "
        "counted and reported. Default: the teacher's limit, at most 512.",
    )
    batch_tokens: int = Field(
        8192, ge=1, description="Padded tokens in a forward batch; out of memory halves a batch."
    )
    trust_remote_code: bool = Field(
        False, description="Run the model code that a hub repository brings."
    )
