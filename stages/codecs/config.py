"""The options of codecs: what is kept of each position of a language model's teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator

from teacher_cache.cache.codecs.named import CODECS
from teacher_cache.stages.config import (
    ComposedConfig,
    Of,
    Part,
    StageConfig,
    StoreName,
    comma_separated,
)

DEFAULT_CODEC = "topk"
FOR_A_CLASSIFIER = (
    "{flag} is of language models, and this run caches a classifier: leave it out, or give "
    "--task lm"
)

if TYPE_CHECKING:
    CodecName = str
else:
    CodecName = Literal[*CODECS]  # so that the command line lists them


def _or_registered(name: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """A codec that was registered after this module was made is as good as the others."""
    return name if isinstance(name, str) and name in CODECS else check(name)


def of_codecs(**sets: str) -> Of:
    """What an option of language models' codecs belongs to.

    Args:
        **sets: by codec, the attribute that the option sets; none: it is of all of them.
    """
    return Of(task="lm", elsewhere=FOR_A_CLASSIFIER, sets=sets)


class CodecConfig(StageConfig):
    """How a language model's distributions are cached (--task lm)."""

    codec: Annotated[CodecName | None, WrapValidator(_or_registered), of_codecs()] = Field(
        default=None,
        description="What is kept at each position: the most probable ids and the tail's mass "
        "(topk), draws, the hidden states before the head, or all logits (dense). Default: topk.",
    )
    top_k: Annotated[int | None, of_codecs(topk="top_k")] = Field(
        default=None, description="topk: so many of the most probable ids. Default: 64."
    )
    exact: Annotated[bool | None, of_codecs(topk="is_exact")] = Field(
        default=None,
        description="topk: log-probs in float16, 2 bytes an id instead of 1. Default: no.",
    )
    top_p: Annotated[float | None, of_codecs(topk="top_p")] = Field(
        default=None,
        description="topk: of these only the fewest that hold so much mass. Default: all.",
    )
    num_ids: Annotated[int | None, of_codecs(sampled="num_ids")] = Field(
        default=None,
        description="sampled: so many distinct ids a position, 2 to 255, drawn so that as many "
        "estimate best. Default: 32.",
    )
    num_draws: Annotated[int | None, of_codecs(sampled="num_draws")] = Field(
        default=None,
        description="sampled: instead, so many draws with replacement, at most 255. Default: none.",
    )
    temperatures: Annotated[
        Annotated[tuple[float, ...], BeforeValidator(comma_separated)] | None,
        of_codecs(topk="temperatures", sampled="temperatures"),
    ] = Field(
        default=None,
        description="topk, sampled: temperatures that a student can be trained at (topk: and all "
        "between), ascending, comma-separated. Default: 1,1.5,2,3,4.",
    )
    draw_temperature: Annotated[float | None, of_codecs(sampled="draw_temperature")] = Field(
        default=None,
        description="sampled: temperature of the draws, one of --temperatures. Default: 1.",
    )


class ConvertOptions(ComposedConfig):
    """What the new cache differs in; whatever is not given stays as it is."""

    kept: Part[CodecConfig]
    format: StoreName | None = Field(
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
