from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from teacher_cache.pipeline import options
from teacher_cache.pipeline.cli import app
from teacher_cache.pipeline.settings import argument, switch, value, with_options
from teacher_cache.stages.codecs.config import ConvertOptions
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.training.config import TrainStudentConfig

COMMANDS: dict[str, type[StageConfig] | None] = {
    "finetune-teacher": options.FinetuneTeacherOptions,
    "cache-teacher": options.CacheTeacherOptions,
    "train-student": TrainStudentConfig,
    "check": options.CheckOptions,
    "inspect": None,
    "convert": ConvertOptions,
    "import-log-probs": options.ImportOptions,
    "verify": None,
    "evaluate": options.EvaluateCommandOptions,
    "export": None,
    "predict": options.PredictOptions,
    "push": None,
    "report": None,
    "run": None,
}
FIELDS = [
    (command, name) for command, model in COMMANDS.items() if model for name in model.options()
]


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` says, a line an option, without the frames."""
    found = {}
    for command in COMMANDS:
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"})
        assert result.exit_code == 0
        found[command] = re.sub(r"[ ]+", " ", result.stdout.replace("│", " "))
    return found


def test_there_are_no_other_commands() -> None:
    listed = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert set(listed) == set(COMMANDS)


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_every_setting_is_an_option_with_help_and_default(
    command: str, name: str, helps: dict[str, str]
) -> None:
    model = COMMANDS[command]
    assert model is not None
    field = model.options()[name]
    flag = f"--{name.replace('_', '-')}"
    (line,) = re.findall(rf"^ (?:\* )?{flag} .*$", helps[command], re.MULTILINE)
    assert field.description and " ".join(field.description.split()) in line
    if field.is_required() or field.default is None or field.default == ():
        assert "[default:" not in line and "None" not in line
        return
    shown = field.default
    shown = ",".join(map(str, shown)) if isinstance(shown, tuple) else str(shown)
    assert f"[default: {shown}]" in line


@pytest.mark.parametrize(("command", "name"), FIELDS)
def test_a_setting_without_a_default_says_what_happens(command: str, name: str) -> None:
    model = COMMANDS[command]
    assert model is not None
    field = model.options()[name]
    if not field.is_required() and field.default is None:
        says = "efault|top after|replaces|t most|comma-separated|not given|Split of the|evaluate on"
        assert re.search(says, field.description or ""), field.description


def test_no_option_is_cut_short_on_a_narrow_terminal() -> None:
    for command, model in COMMANDS.items():
        result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
        for name in model.options() if model else ():
            assert f"--{name.replace('_', '-')} " in result.stdout, f"{command} --{name}"


def test_help_loads_nothing_slow() -> None:
    program = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from teacher_cache.pipeline.cli import app\n"
        f"for command in {list(COMMANDS)}:\n"
        "    assert CliRunner().invoke(app, [command, '--help']).exit_code == 0\n"
        "slow = {'torch', 'transformers', 'datasets', 'numpy', 'pyarrow', 'huggingface_hub'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


class Given(StageConfig):
    """Settings of a made-up command, of every kind that there is."""

    text: str = Field(default="x", description="a text")
    path: Path | None = Field(default=None, description="a path")
    number: int = Field(default=1, description="an integer")
    share: float | None = Field(default=None, description="a float")
    flag: bool = Field(default=True, description="a flag")
    choice: Literal["a", "b"] = Field(default="a", description="a choice")
    names: options.Names = Field(default=(), description="some names")


@pytest.fixture
def calls() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def made_up(calls: list[dict[str, Any]]) -> typer.Typer:
    made = typer.Typer()

    def handler(**given: Any) -> None:
        """What the command does."""
        calls.append(given)

    leading = [
        argument("where", Path, "a place"),
        switch("dry_run", "only look"),
        value("json", Path, "a file"),
    ]
    made.command()(with_options(Given, leading=leading)(handler))
    return made


def test_only_what_was_given_is_passed_on(made_up: typer.Typer, calls: list[dict]) -> None:
    assert CliRunner().invoke(made_up, ["here"]).exit_code == 0
    (given,) = calls
    assert given == {
        "where": Path("here"),
        "dry_run": False,
        "json": None,
        "config_file": None,
        "settings": [],
        "flags": {},
    }


def test_a_flag_that_says_the_default_is_passed_on_too(
    made_up: typer.Typer, calls: list[dict]
) -> None:
    # It must win over a file that says otherwise.
    CliRunner().invoke(made_up, ["here", "--number", "1", "--flag", "--choice", "a"])
    assert calls[0]["flags"] == {"number": 1, "flag": True, "choice": "a"}


def test_every_kind_of_option(made_up: typer.Typer, calls: list[dict]) -> None:
    line = (
        "here --dry-run --json out.json --config c.yaml --set a=1 --set b.c=2 --text t --path p "
        "--number 2 --share 0.5 --no-flag --choice b --names u,v"
    )
    assert CliRunner().invoke(made_up, line.split()).exit_code == 0
    (given,) = calls
    flags = given.pop("flags")
    assert given == {
        "where": Path("here"),
        "dry_run": True,
        "json": Path("out.json"),
        "config_file": "c.yaml",
        "settings": ["a=1", "b.c=2"],
    }
    assert flags == {
        "text": "t", "path": "p", "number": 2, "share": 0.5, "flag": False, "choice": "b",
        "names": "u,v",
    }  # fmt: skip
    assert Given(**flags).names == ("u", "v")


def test_a_command_keeps_its_own_help(made_up: typer.Typer) -> None:
    assert "What the command does." in CliRunner().invoke(made_up, ["--help"]).stdout


def test_options_are_keywords_of_the_command() -> None:
    command = with_options(Given)(lambda **given: None)
    assert {"text", "config", "set_"} <= set(inspect.signature(command).parameters)
