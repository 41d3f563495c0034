"""The options of stage one: what does not go together is refused, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.codecs.config import DEFAULT_CODEC, CodecConfig
from teacher_cache.stages.codecs.named import chosen_room, whole_codecs
from teacher_cache.stages.config import refuse_foreign_options
from teacher_cache.stages.teacher.config import AlignmentConfig, CaptureConfig, LayersConfig

NO_ALIGNMENT = "none"


def check_options(config: CaptureConfig) -> None:
    """Refuse what the task or the codec has no use for, before anything is loaded.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    refuse_foreign_options(config, task=config.task, codec=config.kept.codec or DEFAULT_CODEC)
    _check_alignment(config.aligned, config.kept)
    _check_layers(config.layers, config.kept)


def _check_alignment(config: AlignmentConfig, kept: CodecConfig) -> None:
    """Refuse an alignment to no ids, or of a distribution that is kept whole.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    align = config.align or NO_ALIGNMENT
    if align != NO_ALIGNMENT and config.student_tokenizer is None:
        raise UserError(
            f"--align {align} needs the ids that it aligns to: give --student-tokenizer, the "
            "student's tokenizer"
        )
    if align == "map" and chosen_room(kept).lacks is None:
        partial = " and ".join(whole_codecs(are_whole=False))
        raise UserError(
            f"--align map is of --codec {partial}, which keep a part of what they map; "
            f"--codec {kept.codec} keeps the teacher's whole distribution, which loses nothing "
            "by being mapped later: leave --align out, or give the other codec"
        )


DEFAULT_LAYERS = "last"
_NUMBERS = re.compile(r"\d+( *, *\d+)*")


@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Which states are asked for.

    Attributes:
        pooled: what a classification head reads.
        last: each position's last state.
        layers: each position's states behind these, ascending, from 0.
        all_layers: whether those behind every layer are asked for.
    """

    pooled: bool = False
    last: bool = False
    layers: tuple[int, ...] = ()
    all_layers: bool = False

    def numbered(self, num_layers: int) -> HiddenOptions:
        """With the numbers of a teacher's layers in place of `all_layers`."""
        if not self.all_layers:
            return self
        return replace(self, layers=tuple(range(num_layers)), all_layers=False)

    def named(self) -> str | None:
        """In one order, for the fingerprint; None where nothing is asked for."""
        names = [name for name, asked in (("pooled", self.pooled), ("last", self.last)) if asked]
        return ",".join([*names, *map(str, self.layers)]) or None


def hidden_options(config: LayersConfig) -> HiddenOptions:
    """What `--hidden` asks for.

    Raises:
        UserError: if it is not of its form.
    """
    if config.hidden == "none":
        return HiddenOptions()
    parts = [part.strip() for part in config.hidden.split(",")]
    numbers = [part for part in parts if part.isdecimal()]
    if set(parts) - {"pooled", "last", "all", *numbers}:
        raise UserError(
            f"--hidden is {config.hidden!r}, expected none or, comma-separated, pooled, last, all "
            "and numbers of layers from 0, as in last,0,5"
        )
    return HiddenOptions(
        pooled="pooled" in parts,
        last="last" in parts,
        layers=tuple(sorted({int(number) for number in numbers})),
        all_layers="all" in parts,
    )


def _check_layers(config: LayersConfig, kept: CodecConfig) -> None:
    """Refuse maps and states that cannot be meant, before anything is loaded.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    hidden = hidden_options(config)
    if config.attention == "none" and config.attention_layers is not None:
        raise UserError(
            f"--attention-layers {config.attention_layers} is of attention maps, and this run "
            "caches none: leave it out, or give --attention mean"
        )
    asked = config.attention_layers
    if asked not in (None, "last", "all") and not _NUMBERS.fullmatch(asked):
        raise UserError(
            f"--attention-layers is {asked!r}, expected last, all or numbers of layers from 0, "
            "comma-separated, as in 0,5"
        )
    if hidden.last and kept.codec is not None and chosen_room(kept).keeps_states:
        raise UserError(
            f"--hidden {config.hidden} with --codec {kept.codec} would cache the last states "
            "twice: leave last out"
        )


def chosen_layers(asked: str | None, available: Sequence[int], teacher: str) -> tuple[int, ...]:
    """The layers of which maps are cached.

    Args:
        asked: of `--attention-layers`, that `check_options` let pass.
        available: layers that give maps, ascending.
        teacher: its name, for a message.

    Raises:
        UserError: if one of them gives no map.
    """
    asked = asked or DEFAULT_LAYERS
    if asked == "last":
        return (available[-1],)
    if asked == "all":
        return tuple(available)
    wanted = sorted({int(part) for part in asked.split(",")})
    _require(wanted, available, f"--attention-layers {asked}", teacher, "give attention maps")
    return tuple(wanted)


def require_states(hidden: HiddenOptions, num_layers: int, teacher: str) -> None:
    """Refuse layers that the teacher does not have.

    Raises:
        UserError: naming the layers.
    """
    option = f"--hidden {hidden.named()}"
    _require(hidden.layers, range(num_layers), option, teacher, "have states")


def _require(
    wanted: Sequence[int], available: Sequence[int], option: str, teacher: str, what: str
) -> None:
    missing = [layer for layer in wanted if layer not in available]
    if missing:
        is_range = list(available) == list(range(len(available)))
        known = f"0 to {len(available) - 1}" if is_range else ", ".join(map(str, available))
        raise UserError(
            f"{option} names layer {missing[0]}, and of {teacher} the layers {known} {what}: give "
            "some of these"
        )
