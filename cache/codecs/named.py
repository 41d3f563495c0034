"""From the settings of a manifest to the codec that reads its cache."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from teacher_cache.cache.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from teacher_cache.cache.codecs.interface import Codec


CODECS: dict[str, str | Callable[..., Codec]] = {
    "topk": "TopKCodec",
    "sampled": "sampled_codec",
    "hidden": "HiddenCodec",
    "dense": "DenseCodec",
}
"""Every codec: its class, or what finds that of its version, in the module of its name beside this
one; or one that was registered.

What the stages do with it stands in `stages/codecs`, in the module of the same name.
"""


def codec_class(name: str) -> Callable[..., Codec]:
    """What makes a codec of a name from its settings; loaded here, so that the names are light.

    Raises:
        UserError: if this release has no such codec.
    """
    if name not in CODECS:
        raise UserError(
            f"the codec {name!r} is unknown to this release: {did_you_mean(name, CODECS)}"
        )
    found = CODECS[name]
    if isinstance(found, str):
        return getattr(import_module(f"{__package__}.{name}"), found)
    return found


def codec_from(settings: dict[str, Any]) -> Codec:
    """The codec whose `settings` these are.

    Raises:
        UserError: if this release has no such codec.
    """
    values = {key: value for key, value in settings.items() if key != "name"}
    if "temperatures" in values:
        values["temperatures"] = tuple(values["temperatures"])
    return codec_class(settings["name"])(**values)
