"""The codecs' options: of which codec each is, and the codec that they name."""

from __future__ import annotations

from typing import Any

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.codecs.config import CodecConfig

DEFAULT_CODEC = "topk"


# The attribute of the codec that each option sets.
_TOPK = {
    "top_k": "top_k",
    "exact": "is_exact",
    "top_p": "top_p",
    "temperatures": "temperatures",
}


_SAMPLED = {
    "num_draws": "num_draws",
    "temperatures": "temperatures",
    "draw_temperature": "draw_temperature",
}


OPTIONS_OF: dict[str, dict[str, str]] = {
    "topk": _TOPK,
    "sampled": _SAMPLED,
    "hidden": {},
    "dense": {},
}


def given_options(config: CodecConfig) -> list[str]:
    """The options of codecs that a run was given."""
    return [name for name in CodecConfig.model_fields if getattr(config, name) is not None]


def refuse_foreign_options(config: CodecConfig, name: str) -> None:
    """Refuse what is of other codecs than the run's.

    Args:
        config: the options.
        name: of the run's codec.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    for option in given_options(config):
        if option != "codec" and option not in OPTIONS_OF[name]:
            codecs = " or ".join(one for one, options in OPTIONS_OF.items() if option in options)
            raise UserError(
                f"{flag_of(option)} is of --codec {codecs}, and this run has --codec {name}: leave "
                "it out, or give the other codec"
            )


def codec_of(
    config: CodecConfig, *, support_size: int, width: int, has_unmatched: bool = False
) -> AnyCodec:
    """The codec that the options ask for.

    Args:
        config: that `check_options` let pass.
        support_size: V.
        width: D of the states, for `hidden`.
        has_unmatched: whether some of the teacher's mass may have no id of the support.

    Raises:
        UserError: for a value that the codec cannot have.
    """
    name = config.codec or DEFAULT_CODEC
    values: dict[str, Any] = {
        attribute: getattr(config, option)
        for option, attribute in OPTIONS_OF[name].items()
        if getattr(config, option) is not None
    }
    if name == "topk":
        return TopKCodec(support_size=support_size, **values)
    if name == "sampled":
        return SampledCodec(support_size=support_size, has_unmatched=has_unmatched, **values)
    if name == "hidden":
        return HiddenCodec(support_size=support_size, width=width)
    return DenseCodec(support_size=support_size)


def flag_of(option: str) -> str:
    """As the command line spells an option."""
    return "--" + option.replace("_", "-")
