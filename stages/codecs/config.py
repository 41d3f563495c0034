"""What is kept of each position of a language model's teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from teacher_cache.stages.config import (
    StageConfig,
    comma_separated,
)


class CodecConfig(StageConfig):
    """How a language model's distributions are cached (--task lm)."""

    codec: Literal["topk", "sampled", "hidden", "dense"] | None = Field(
        default=None,
        description="What is kept at each position: the most probable ids and the tail's mass "
        "(topk), draws, the hidden states before the head, or all logits (dense). Default: topk.",
    )
    top_k: int | None = Field(
        default=None, description="topk: so many of the most probable ids. Default: 64."
    )
    exact: bool | None = Field(
        default=None,
        description="topk: log-probs in float16, 2 bytes an id instead of 1. Default: no.",
    )
    top_p: float | None = Field(
        default=None,
        description="topk: of these only the fewest that hold so much mass. Default: all.",
    )
    num_draws: int | None = Field(
        default=None, description="sampled: draws a position, at most 255. Default: 50."
    )
    temperatures: Annotated[tuple[float, ...], BeforeValidator(comma_separated)] | None = Field(
        default=None,
        description="topk, sampled: temperatures that a student can be trained at (topk: and all "
        "between), ascending, comma-separated. Default: 1,1.5,2,3,4.",
    )
    draw_temperature: float | None = Field(
        default=None,
        description="sampled: temperature of the draws, one of --temperatures. Default: 1.",
    )


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
