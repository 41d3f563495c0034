"""The base of every stage's configuration, and the settings that all stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from teacher_cache.cache.errors import UserError


class StageConfig(BaseModel):
    """Frozen, keyword-only settings that refuse unknown keys; each stage owns its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True, kw_only=True)
class Of:
    """What an option belongs to; stands in the annotation of its field.

    Attributes:
        task: whose runs take it.
        elsewhere: what a run of another task is told; `{flag}` and `{value}` stand for the option.
        word: of the values in commas, the one that belongs there; None: the whole option.
        sets: by the name of each codec that has it, the codec's attribute that it sets; empty
            where it is of no codec in particular.
    """

    task: str
    elsewhere: str
    word: str | None = None
    sets: Mapping[str, str] = field(default_factory=dict)


def owners(config: type[BaseModel]) -> dict[str, Of]:
    """By option, what it belongs to; options of every run are left out."""
    return {
        name: one
        for name, info in config.model_fields.items()
        for one in info.metadata
        if isinstance(one, Of)
    }


def given_options(config: BaseModel) -> list[str]:
    """The options that a run was given, of those that belong to a task or a codec."""
    fields = type(config).model_fields
    given = []
    for name, owner in owners(type(config)).items():
        value = getattr(config, name)
        words = [part.strip() for part in str(value).split(",")]
        if value != fields[name].default and owner.word in (None, *words):
            given.append(name)
    return given


def refuse_foreign_options(config: BaseModel, *, task: str, codec: str | None = None) -> None:
    """Refuse what task or codec have no use for; nothing is left out in silence.

    Args:
        config: the options.
        task: of the run.
        codec: of the run; None: whatever codec they are of.

    Raises:
        UserError: naming the option and what it belongs to.
    """
    belongs_to = owners(type(config))
    for option in given_options(config):
        owner, flag = belongs_to[option], flag_of(option)
        if owner.task != task:
            raise UserError(owner.elsewhere.format(flag=flag, value=getattr(config, option)))
        if codec is not None and owner.sets and codec not in owner.sets:
            raise UserError(
                f"{flag} is of --codec {' or '.join(owner.sets)}, and this run has --codec "
                f"{codec}: leave it out, or give the other codec"
            )


def flag_of(option: str) -> str:
    """As the command line spells an option."""
    return "--" + option.replace("_", "-")


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
