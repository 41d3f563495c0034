"""The base of every stage's configuration, and the settings that all stages share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class StageConfig(BaseModel):
    """Frozen, keyword-only settings that refuse unknown keys; each stage owns its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def comma_separated(value: Any) -> Any:
    """A setting of several values as the command line gives it; others as they are."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def comma_joined(value: Any) -> Any:
    """A setting in commas as the command line gives it, from a number or list of YAML."""
    if isinstance(value, list | tuple):
        return ",".join(str(part) for part in value)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class DeviceConfig(StageConfig):
    """Where a stage computes, and in which number format."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device; auto is CUDA where there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format; auto is float32 on CPU, bfloat16 on CUDA that has it, "
        "else float16.",
    )
