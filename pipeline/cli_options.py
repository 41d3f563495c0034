"""Turn a settings model into a command's options: one source of names, types, help and defaults."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from teacher_cache.stages.config import StageConfig

CONFIG_HELP = "YAML file, or the name of one that comes with the package; flags win over it."
SET_HELP = "Set one key, as in --set alpha=0.9; may be given several times."


def with_options(
    model: type[StageConfig], leading: list[inspect.Parameter] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a handler so that Typer sees an option for each field of `model`.

    The handler is called with its leading parameters, then `config_file`, `settings` and `flags`:
    a dict of the options that were given. Every option's real default stays with the model, so a
    flag that was not given never overrides a file.

    Args:
        model: the command's settings.
        leading: parameters that are no settings (arguments, switches of the command itself).
    """
    names = list(model.options())
    own = leading or []

    def decorate(handler: Callable[..., None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            flags = {name: values[name] for name in names if values[name] is not None}
            handler(
                **{parameter.name: values[parameter.name] for parameter in own},
                config_file=values["config"],
                settings=values["set_"] or [],
                flags=flags,
            )

        parameters = [*own, *_common(), *_options(model)]
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        command.__doc__ = handler.__doc__
        return command

    return decorate


def argument(name: str, kind: Any, help_text: str, default: Any = ...) -> inspect.Parameter:
    """A positional argument of a command."""
    return _keyword(name, Annotated[kind, typer.Argument(help=help_text)], default)


def switch(name: str, help_text: str) -> inspect.Parameter:
    """An on/off option of the command itself, off by default."""
    flag = "--" + name.replace("_", "-")
    return _keyword(name, Annotated[bool, typer.Option(flag, help=help_text)], False)


def value(name: str, kind: Any, help_text: str) -> inspect.Parameter:
    """An option with a value, of the command itself; None unless given."""
    flag = "--" + name.replace("_", "-")
    return _keyword(name, Annotated[kind | None, typer.Option(flag, help=help_text)], None)


def _common() -> list[inspect.Parameter]:
    config = Annotated[str | None, typer.Option("--config", help=CONFIG_HELP)]
    settings = Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)]
    return [_keyword("config", config, None), _keyword("set_", settings, None)]


def _options(model: type[StageConfig]) -> list[inspect.Parameter]:
    """One for each field, by part and by the class that declares it: the command's own first."""
    parts = model.parts()
    found: dict[str, inspect.Parameter] = {}
    for part in (model, *parts.values()):
        for owner in part.__mro__:
            title = None if owner is model else _title(owner)
            for name in vars(owner).get("__annotations__", {}):
                if name in part.model_fields and name not in parts and name not in found:
                    found[name] = _parameter(name, part.model_fields[name], title)
    return list(found.values())


def _parameter(name: str, field: FieldInfo, title: str | None) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    kind = _kind(field.annotation)
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=_help(field, kind),
        # A list of all choices would leave no room for the option's own name.
        metavar="<choice>" if get_origin(kind) is Literal else None,
        show_default=False,
        rich_help_panel=title,
    )
    return _keyword(name, Annotated[kind | None, option], None)


def _title(owner: type) -> str:
    """The first line of the class's docstring, without its full stop."""
    return (owner.__doc__ or owner.__name__).splitlines()[0].rstrip(".")


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is ... else default
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _kind(annotation: Any) -> Any:
    """What Typer parses: bool, int, float and Literal as they are, the rest as text."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        inner = [one for one in get_args(annotation) if one is not type(None)]
        return _kind(inner[0]) if len(inner) == 1 else str
    if origin is Literal or annotation in (bool, int, float):
        return annotation
    return str


def _help(field: FieldInfo, kind: Any) -> str:
    """The description, the choices, and the default as a reader types it.

    No default where the description explains it. Typer's own would be None for every option,
    since it is the model that knows the defaults.
    """
    parts = [field.description or ""]
    if get_origin(kind) is Literal:
        parts.append(f"[dim]\\[{', '.join(map(str, get_args(kind)))}][/dim]")
    default = field.default
    if not field.is_required() and default is not None and default != ():
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        parts.append(f"[dim]\\[default: {shown}][/dim]")
    return " ".join(parts)
