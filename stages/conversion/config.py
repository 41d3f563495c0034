"""Settings of `pipe convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from teacher_cache.stages.teacher.config import CodecConfig


class ConvertOptions(CodecConfig):
    """What the new cache differs in; whatever is not given stays as it is."""

    format: Literal["arrow", "zarr"] | None = Field(
        default=None, description="Format of the new cache. Default: that of the old one."
    )
    overwrite: bool = Field(default=False, description="Start the new cache again if it exists.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto",
        description="Where logits are reduced, if they are; auto is CUDA where there is one.",
    )


class ConvertConfig(ConvertOptions):
    """`ConvertOptions` with both caches named."""

    cache: Path = Field(description="Folder of the cache to read, a complete one.")
    out: Path = Field(description="Folder of the new cache.")
