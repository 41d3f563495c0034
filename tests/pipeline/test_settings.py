from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline.cli import SECTIONS
from teacher_cache.pipeline.options import (
    CacheTeacherOptions,
    EvaluateCommandOptions,
    FinetuneTeacherOptions,
    ImportOptions,
)
from teacher_cache.pipeline.settings import (
    apply_settings,
    config_names,
    read_config_file,
    resolve,
    validate,
)
from teacher_cache.stages.codecs.config import ConvertOptions
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.training.config import TrainStudentConfig

ROOT = Path(__file__).parents[2]


class Options(StageConfig):
    """Settings of a made-up command, one for each place that can set it."""

    of_default: int = Field(default=0, description="set nowhere")
    of_file: int = Field(default=0, description="set in the file")
    of_set: int = Field(default=0, description="set in the file and by --set")
    of_flag: int = Field(default=0, description="set everywhere")


def resolved(**given: Any) -> Options:
    values: dict[str, Any] = {"config_file": None, "settings": [], "flags": {}}
    return resolve(Options, section="here", sections=("here", "there"), **(values | given))


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("here: {of_file: 1, of_set: 1, of_flag: 1}\nthere: {unread: 1}\n")
    return str(path)


def test_defaults_give_way_to_the_file_to_set_and_to_flags(config_file: str) -> None:
    options = resolved(
        config_file=config_file, settings=["of_set=2", "here.of_flag=2"], flags={"of_flag": 3}
    )
    assert options == Options(of_default=0, of_file=1, of_set=2, of_flag=3)


def test_set_of_another_section_is_not_read(config_file: str) -> None:
    assert resolved(config_file=config_file, settings=["there.of_set=2"]).of_set == 1


def test_the_last_set_wins() -> None:
    assert resolved(settings=["of_set=1", "of_set=2"]).of_set == 2


@pytest.mark.parametrize("content", ["", "here:\n", "there:\n"])
def test_an_empty_file_or_section_sets_nothing(tmp_path: Path, content: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert resolved(config_file=str(path), settings=["of_set=2"]) == Options(of_set=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("heer: {}", r"--config .*run.yaml: there is no section 'heer': did you mean 'here'\?"),
        ("here: {of_fiel: 1}", r"here has no setting 'of_fiel': did you mean 'of_file'\?"),
        ("here: {1: 1}", r"here: --1 is 1; keys should be strings"),
        ("here: {of_file: one}", r"here: --of-file is 'one'; input should be a valid integer"),
        ("here: 5", r"--config .*: the section here holds 5, expected keys with values"),
        ("- here", r"--config .* holds a list, expected sections"),
        ("here: {", r"--config .*run.yaml is no YAML: .*line 1"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        resolved(config_file=str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("heer.of_set=1", r"--set: there is no section 'heer': did you mean 'here'\?"),
        ("of_sett=1", r"here has no setting 'of_sett': did you mean 'of_set'\?"),
        ("here.of_sett=1", r"here has no setting 'of_sett': did you mean 'of_set'\?"),
        ("of_set", r"--set of_set is not of the form .*key=value"),
        ("=1", r"--set =1 is not of the form"),
        ("here.=1", r"--set here.=1 is not of the form"),
        (".of_set=1", r"--set .of_set=1 is not of the form"),
        ("of_set=[1", r"--set of_set=\[1 is no YAML"),
        ("here=1", r"here has no setting 'here'"),
        ("here.of_set.x=1", r"--of-set is \{'x': 1\}; input should be a valid integer"),
    ],
)
def test_a_wrong_set_is_refused_in_a_sentence(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        resolved(settings=[setting])
    assert "\n" not in str(raised.value)


def test_set_does_not_go_through_a_value() -> None:
    with pytest.raises(UserError, match="'key' is a value, not a section"):
        apply_settings({"here": {"key": 1}}, ["here.key.inner=2"])


def test_set_takes_any_yaml_value() -> None:
    content: dict[str, Any] = {}
    values = ("a=0.9", "b=1e-3", "c=text", "d=[1, 2]", "e=", "f=true", "g=x=y")
    apply_settings(content, values, section="here")
    assert content["here"] == {
        "a": 0.9, "b": "1e-3", "c": "text", "d": [1, 2], "e": None, "f": True, "g": "x=y",
    }  # fmt: skip


def test_numbers_that_yaml_takes_for_text_are_numbers() -> None:
    # YAML 1.1 reads 1e-3 as a string, for it wants 1.0e-3.
    config = resolve(
        TrainStudentConfig,
        section="train_student",
        sections=SECTIONS,
        config_file=None,
        settings=["lr=1e-3"],
        flags={},
    )
    assert config.training.lr == 1e-3


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"--config nowhere/run.yaml is no file: check the path"):
        read_config_file("nowhere/run.yaml")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"run.yaml cannot be read .*UTF-8"):
        read_config_file(str(path))


def test_an_unknown_configuration_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"--config dmeo is neither .* did you mean 'demo'\?"):
        read_config_file("dmeo")


def test_several_wrong_keys_are_one_sentence() -> None:
    with pytest.raises(UserError) as raised:
        validate(TrainStudentConfig, {"alpah": 1, "epochs": -1}, where="train_student")
    assert "did you mean 'alpha'?" in str(raised.value) and "--epochs is -1" in str(raised.value)


MODELS = {
    "finetune_teacher": FinetuneTeacherOptions,
    "cache_teacher": CacheTeacherOptions,
    "train_student": TrainStudentConfig,
    "evaluate": EvaluateCommandOptions,
    "convert": ConvertOptions,
    "import_log_probs": ImportOptions,
}


def test_every_configuration_of_the_package_is_valid_and_begins_with_its_command() -> None:
    assert config_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    for name in config_names():
        text = (ROOT / "configs" / f"{name}.yaml").read_text()
        assert text.startswith(f"# pipe run --config {name}\n")
        content = read_config_file(name)
        assert set(content) <= set(SECTIONS)
        for section, values in content.items():
            if section == "students":
                shared = content.get("train_student") or {}
                for student, own in values.items():
                    validate(TrainStudentConfig, shared | own, where=student)
            else:
                validate(MODELS[section], values, where=section)


def test_every_section_has_a_model() -> None:
    assert set(MODELS) | {"students"} == set(SECTIONS)


def test_configurations_say_nothing_that_a_default_says() -> None:
    # A YAML that repeats a default would hide the day on which the default changes.
    for name in config_names():
        for section, values in read_config_file(name).items():
            for key, value in (values if section in MODELS else {}).items():
                default = MODELS[section].options()[key].default
                assert value != default, f"{name}: {section}.{key}"


def test_the_documented_set_of_imdb_works() -> None:
    text = (ROOT / "configs" / "imdb.yaml").read_text()
    content = read_config_file("imdb")
    apply_settings(content, re.findall(r"--set (\S+)", text))
    assert content["cache_teacher"]["teacher"] == "/path/to/teacher"
    assert content["evaluate"]["data"] == "/path/to/aclImdb"
