"""From a codec, its name or its cache to its room."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.codecs.named import CODECS, codec_class, codec_from
from teacher_cache.cache.errors import UserError
from teacher_cache.cache.reader import CacheReader
from teacher_cache.stages.codecs.config import DEFAULT_CODEC, CodecConfig
from teacher_cache.stages.codecs.interface import Room
from teacher_cache.stages.config import owners
from teacher_cache.stages.tokens.support import Support

REGISTERED: dict[str, Room[Any]] = {}
"""Rooms of codecs that are none of this package's own, by their names."""


def register(name: str, codec: Callable[..., Codec], room: Room[Any]) -> None:
    """Add a codec that is none of this package's own.

    Args:
        name: as on the command line and in the manifest.
        codec: its class in what is on disk.
        room: what the stages do with it.
    """
    CODECS[name] = codec
    REGISTERED[name] = room


def room_named(name: str) -> Room[Any]:
    """The room of a codec by its name.

    Raises:
        UserError: if this release has no such codec.
    """
    if name in REGISTERED:
        return REGISTERED[name]
    codec_class(name)
    return import_module(f"{__package__}.{name}").ROOM


def room_of(codec: Codec) -> Room[Any]:
    """The room of a codec."""
    return room_named(codec.name).of(codec)


def chosen_room(config: CodecConfig) -> Room[Any]:
    """The room of the codec that the options name."""
    return room_named(config.codec or DEFAULT_CODEC)


def whole_codecs(*, are_whole: bool) -> list[str]:
    """The names of the codecs that hold all of a distribution, or of those that hold a part."""
    return [name for name in CODECS if (room_named(name).lacks is None) is are_whole]


def given_attributes(config: CodecConfig, name: str) -> dict[str, Any]:
    """What the given options set of a codec, by its attributes."""
    return {
        owner.sets[name]: getattr(config, option)
        for option, owner in owners(CodecConfig).items()
        if name in owner.sets and getattr(config, option) is not None
    }


def codec_of(
    config: CodecConfig, *, support_size: int, width: int, has_unmatched: bool = False
) -> Codec:
    """The codec that the options ask for.

    Args:
        config: whose options are all of this codec.
        support_size: V.
        width: D of the states, for a codec that keeps them.
        has_unmatched: whether some of the teacher's mass may have no id of the support.

    Raises:
        UserError: for a value that the codec cannot have.
    """
    given = given_attributes(config, config.codec or DEFAULT_CODEC)
    return chosen_room(config).made(
        given, support_size=support_size, width=width, has_unmatched=has_unmatched
    )


def open_codec(
    reader: CacheReader,
    device: torch.device | str = "cpu",
    *,
    support: Support | None = None,
) -> Codec:
    """The codec of a language model's cache, ready to decode on a device.

    Args:
        reader: of any split.
        device: where the stored fields will lie.
        support: the ids that count, where they are not those that were cached.

    Raises:
        UserError: if this release does not know the codec, or the cache lacks what it decodes with.
        CheckFailed: if a file of the cache is damaged.
    """
    codec = codec_from(reader.manifest.settings["codec"])
    room = room_of(codec)
    opened = room.opened(codec, cache=reader.cache, manifest=reader.manifest, support=support)
    return room.to(opened, torch.device(device))


def require_temperature(codec: Codec, temperature: float) -> None:
    """Refuse a temperature that the cache does not serve.

    Raises:
        UserError: naming its grid.
    """
    room_of(codec).require_temperature(codec, temperature)


def serves(codec: Codec, temperature: float) -> bool:
    """Whether a cache of this codec can be decoded at a temperature."""
    try:
        require_temperature(codec, temperature)
    except UserError:
        return False
    return True


def plain_temperature(codec: Codec) -> float:
    """1, or the lowest that was stored where 1 was not."""
    grid = room_of(codec).grid(codec)
    return 1.0 if grid is None or 1.0 in grid else grid[0]
