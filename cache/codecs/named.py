"""From the settings of a manifest to the codec that reads its cache."""

from __future__ import annotations

from typing import Any

from teacher_cache.cache.codecs.dense import DenseCodec
from teacher_cache.cache.codecs.hidden import HiddenCodec
from teacher_cache.cache.codecs.sampled import SampledCodec
from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError, did_you_mean

AnyCodec = TopKCodec | SampledCodec | HiddenCodec | DenseCodec
CODECS: dict[str, type[AnyCodec]] = {
    "topk": TopKCodec,
    "sampled": SampledCodec,
    "hidden": HiddenCodec,
    "dense": DenseCodec,
}


def codec_from(settings: dict[str, Any]) -> AnyCodec:
    """The codec whose `settings` these are.

    Raises:
        UserError: if this release has no such codec.
    """
    name = settings["name"]
    if name not in CODECS:
        raise UserError(
            f"the codec {name!r} is unknown to this release: {did_you_mean(name, CODECS)}"
        )
    values = {key: value for key, value in settings.items() if key != "name"}
    if "temperatures" in values:
        values["temperatures"] = tuple(values["temperatures"])
    return CODECS[name](**values)
