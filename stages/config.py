"""The base of every stage's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StageConfig(BaseModel):
    """Frozen, keyword-only settings that refuse unknown keys; each stage owns its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
