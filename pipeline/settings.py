"""From defaults, a YAML file, --set and flags to one frozen configuration, or a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from teacher_cache.cache.errors import UserError, did_you_mean

Model = TypeVar("Model", bound=BaseModel)


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
        text = path.read_text()
    elif name in config_names():
        text = (files("teacher_cache.configs") / f"{name}.yaml").read_text()
    else:
        raise UserError(
            f"--config {name} is neither a YAML file nor a configuration of the package: "
            f"{did_you_mean(name, config_names())}"
        )
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"--config {name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {name} holds a {type(content).__name__}, expected sections")
    return content


def apply_settings(content: dict[str, Any], settings: Sequence[str]) -> None:
    """Apply `--set a.b=value` to nested mappings, in place; values are YAML.

    Raises:
        UserError: if one is not of that form, or goes through a value that is no mapping.
    """
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not path:
            raise UserError(f"--set {setting} is not of the form key=value or section.key=value")
        *parents, last = path.strip().split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise UserError(f"--set {setting}: {parent!r} is a value, not a section")
        target[last] = yaml.safe_load(value)


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
    refuse_unknown_sections(content, sections, config_file or "")
    own = [one if one.split(".")[0] in sections else f"{section}.{one}" for one in settings]
    apply_settings(content, own)
    refuse_unknown_sections(content, sections, "--set")
    values = dict(content.get(section) or {}) | dict(flags)
    return validate(model, values, where=section)


def refuse_unknown_sections(
    content: Mapping[str, Any], sections: Sequence[str], where: str
) -> None:
    """Refuse a section that no command reads.

    Raises:
        UserError: suggesting the nearest name.
    """
    for name in content:
        if name not in sections:
            raise UserError(f"{where} has no section {name!r}: {did_you_mean(name, sections)}")


def validate(model: type[Model], values: Mapping[str, Any], *, where: str) -> Model:
    """Build a configuration.

    Raises:
        UserError: one sentence that names each key that is unknown or has a bad value.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError("; ".join(_explain(model, one, where) for one in error.errors())) from error


def _explain(model: type[BaseModel], error: Any, where: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{where} has no setting {key!r}: {did_you_mean(key, model.model_fields)}"
    option = "--" + key.replace("_", "-")
    if error["type"] == "missing":
        return f"{where} needs {option}"
    return f"{where}: {option} is {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"
