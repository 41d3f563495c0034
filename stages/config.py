"""The base of every stage's configuration, and the settings that all stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.stores.named import STORES

if TYPE_CHECKING:
    StoreName = str
else:
    StoreName = Literal[*STORES]  # so that the command line lists them


class StageConfig(BaseModel):
    """Frozen, keyword-only settings that refuse unknown keys; each stage owns its own subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @classmethod
    def parts(cls) -> dict[str, type[StageConfig]]:
        """By name, what this is composed of."""
        return {}

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """By name, all that a person can set."""
        return cls.model_fields

    @property
    def given(self) -> dict[str, Any]:
        """By name, what was set, at its default or not."""
        return {name: getattr(self, name) for name in self.model_fields_set}


_PART = object()
_Part = TypeVar("_Part", bound=StageConfig)
Part = Annotated[_Part, _PART]
"""A part of a `ComposedConfig`."""


class ComposedConfig(StageConfig):
    """Settings in parts, each what some rooms need; flat where a person reads or writes them.

    `Whole.of(alpha=0.9)` is `Whole(objective=ObjectiveConfig(alpha=0.9))`, and a dump of either
    says `alpha`. No name stands twice among the settings of all parts and those of the whole.
    """

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """Made of flat settings.

        Raises:
            ValidationError: as pydantic's.
        """
        return cls.model_validate(settings)

    @classmethod
    def parts(cls) -> dict[str, type[StageConfig]]:
        """By name, what this is composed of."""
        return {
            name: info.annotation
            for name, info in cls.model_fields.items()
            if _PART in info.metadata and isinstance(info.annotation, type)
        }

    @classmethod
    def options(cls) -> dict[str, FieldInfo]:
        """Those of the whole, then of each part."""
        parts = cls.parts()
        found = {name: info for name, info in cls.model_fields.items() if name not in parts}
        return found | {
            name: one for part in parts.values() for name, one in part.options().items()
        }

    @property
    def given(self) -> dict[str, Any]:
        """Of the whole and of all parts."""
        parts = type(self).parts()
        own = {name: getattr(self, name) for name in self.model_fields_set if name not in parts}
        return own | {
            name: one for part in parts for name, one in getattr(self, part).given.items()
        }

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """As pydantic's, the changes flat."""
        changes = dict(update or {})
        for name, part in type(self).parts().items():
            own = {one: changes.pop(one) for one in part.options() if one in changes}
            if own:
                changes[name] = getattr(self, name).model_copy(update=own)
        return super().model_copy(update=changes, deep=deep)

    @model_validator(mode="before")
    @classmethod
    def _in_parts(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        found = dict(values)
        for name, part in cls.parts().items():
            own = {one: found.pop(one) for one in part.options() if one in found}
            found.setdefault(name, own)
        return found

    @model_serializer(mode="wrap")
    def _flat(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found = dump(self)
        for name in type(self).parts():
            found |= found.pop(name, {})
        return found


@dataclass(frozen=True, kw_only=True)
class Of:
    """What an option belongs to; stands in the annotation of its field.

    Attributes:
        task: whose runs take it.
        elsewhere: what a run of another task is told; `{flag}` and `{value}` stand for the option.
        word: of the values in commas, the one that belongs there; None: the whole option.
        sets: by the name of each codec that has it, the codec's attribute that it sets; empty
            where it is of no codec in particular.
        is_idle: whether its default does nothing, so that it may be given anywhere.
    """

    task: str
    elsewhere: str
    word: str | None = None
    sets: Mapping[str, str] = field(default_factory=dict)
    is_idle: bool = True


def owners(config: type[StageConfig]) -> dict[str, Of]:
    """By option, what it belongs to; options of every run are left out."""
    return {
        name: one
        for name, info in config.options().items()
        for one in info.metadata
        if isinstance(one, Of)
    }


def given_options(config: StageConfig) -> list[str]:
    """The options that a run was given, of those that belong to a task or a codec."""
    fields, given = type(config).options(), config.given
    found = []
    for name, owner in owners(type(config)).items():
        if name not in given or (owner.is_idle and given[name] == fields[name].default):
            continue
        words = [part.strip() for part in str(given[name]).split(",")]
        if owner.word in (None, *words):
            found.append(name)
    return found


def refuse_foreign_options(config: StageConfig, *, task: str, codec: str | None = None) -> None:
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
            raise UserError(owner.elsewhere.format(flag=flag, value=config.given[option]))
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
