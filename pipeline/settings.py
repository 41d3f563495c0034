"""From defaults, a YAML file, --set and flags to one frozen configuration, or a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

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
