"""From a settings model to a command's options, and from what is given to one configuration.

The model is the one source of names, types, help and defaults. Defaults, a YAML file, --set and
flags become one frozen configuration, or a sentence.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from teacher_cache.cache.errors import UserError, did_you_mean
from teacher_cache.stages.config import StageConfig

Model = TypeVar("Model", bound=StageConfig)


def config_names() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = files("teacher_cache.configs")
    return sorted(Path(one.name).stem for one in folder.iterdir() if one.name.endswith(".yaml"))


def read_config_file(name: str) -> dict[str, Any]:
    """Read a YAML file, or one of the package's by its name (`demo`).

    Raises:
        UserError: if there is none, or it is no mapping of sections.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"--config {name} is no file: check the path")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--config {name} cannot be read ({error}): expected UTF-8 text that you may read"
            ) from error
    elif name in config_names():
        text = (files("teacher_cache.configs") / f"{name}.yaml").read_text()
    else:
        raise UserError(
            f"--config {name} is neither a YAML file nor a configuration of the package: "
            f"{did_you_mean(name, config_names())}"
        )
    content = _parse(text, f"--config {name}") or {}
    if not isinstance(content, dict):
        raise UserError(f"--config {name} holds a {type(content).__name__}, expected sections")
    return content


def apply_settings(
    content: dict[str, Any], settings: Sequence[str], *, section: str | None = None
) -> None:
    """Apply `--set section.key=value` to nested mappings, in place; values are YAML.

    Args:
        content: of a configuration, by section.
        settings: what `--set` was given.
        section: where a key without a section belongs; none does if this is None.

    Raises:
        UserError: if one is not of that form, or goes through a value that is no mapping.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        *parents, last = path.strip().split(".")
        if section is not None and not parents:
            parents = [section]
        if not equals or not last or not all(parents) or not parents:
            raise UserError(
                f"--set {setting} is not of the form section.key=value"
                + (f" or key=value, which is of {section}" if section else "")
            )
        target = content
        for parent in parents:
            if target.get(parent) is None:  # not there, or a heading with nothing below it
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise UserError(f"--set {setting}: {parent!r} is a value, not a section")
        target[last] = _parse(value, f"--set {setting}")


def _parse(text: str, where: str) -> Any:
    import yaml  # slow to import, and most commands read no YAML

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", error), getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{where} is no YAML: {problem}{line}") from error


def resolve(
    model: type[Model],
    *,
    section: str,
    sections: Sequence[str],
    config_file: str | None,
    settings: Sequence[str],
    flags: Mapping[str, Any],
) -> Model:
    """One command's configuration: defaults, then its section of the file, --set, flags.

    Args:
        model: the command's options.
        section: its section in a file.
        sections: all sections that a file may have.
        config_file: of `--config`.
        settings: of `--set`; `key=value` is of this command, `section.key=value` of a section.
        flags: options that were given on the command line.

    Raises:
        UserError: for an unknown section or key (the nearest name suggested) or a bad value.
    """
    content = read_config_file(config_file) if config_file else {}
    check_sections(content, sections, f"--config {config_file}")
    apply_settings(content, settings, section=section)
    check_sections(content, sections, "--set")
    values = dict(content.get(section) or {}) | dict(flags)
    return validate(model, values, where=section)


def check_sections(content: Mapping[str, Any], sections: Sequence[str], where: str) -> None:
    """Refuse a section that no command reads, or that holds no settings.

    Raises:
        UserError: suggesting the nearest name.
    """
    for name, section in content.items():
        if name not in sections:
            raise UserError(
                f"{where}: there is no section {name!r}: {did_you_mean(str(name), sections)}"
            )
        require_settings(section, f"{where}: the section {name}")


def require_settings(section: Any, where: str) -> None:
    """Refuse a section that is neither empty nor a mapping of keys to values.

    Raises:
        UserError: saying what it holds.
    """
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{where} holds {section!r}, expected keys with values, as in `alpha: 0.9`")


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Build a configuration.

    Raises:
        UserError: one sentence that names each key that is unknown or has a bad value.
    """
    for key in values:
        if key in model.parts():  # which nobody writes
            raise UserError(_unknown(model, key, where))
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(model, one, where) for one in error.errors())) from error


def _unknown(model: type[StageConfig], key: str, where: str) -> str:
    return f"{where} has no setting {key!r}: {did_you_mean(key, model.options())}"


def _explain(model: type[StageConfig], error: Any, where: str) -> str:
    path = error["loc"]
    path = path[1:] if path and path[0] in model.parts() else path
    if not path:  # several settings together
        return f"{where}: {error['msg']}"
    key = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        return _unknown(model, key, where)
    option = "--" + str(path[0]).replace("_", "-")
    if error["type"] == "missing":
        return f"{where} needs {option}"
    return f"{where}: {option} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"


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
