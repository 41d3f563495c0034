from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.training.run_folder import RUN_NAME, RunRecord, open_run, read_run

RECORD = RunRecord(settings={"lr": 0.1, "seed": 0}, about={"teacher": "t"})


def test_a_new_run(tmp_path: Path) -> None:
    assert open_run(tmp_path / "run", RECORD, start_again=False) == RECORD
    assert read_run(tmp_path / "run") == RECORD


def test_a_run_is_found_again(tmp_path: Path) -> None:
    done = RunRecord(settings=RECORD.settings, about={}, complete=True, result={"num_steps": 3})
    done.write(tmp_path)
    assert open_run(tmp_path, RECORD, start_again=False) == done


def test_other_settings_are_refused(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    other = RunRecord(settings={"lr": 0.2, "seed": 0}, about={})
    with pytest.raises(UserError, match=r"lr is 0\.1 there and 0\.2 in .*--resume never"):
        open_run(tmp_path, other, start_again=False)
    assert read_run(tmp_path) == RECORD


def test_starting_again_drops_the_checkpoints_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RECORD.write(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    other = RunRecord(settings={"lr": 0.2, "seed": 0}, about={})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # Killed while they are removed, they still belong to the recorded settings.
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path, other, start_again=True)
    assert read_run(tmp_path) == RECORD

    assert open_run(tmp_path, other, start_again=True) == other
    assert not (tmp_path / "checkpoints").exists()
    assert read_run(tmp_path) == other


@pytest.mark.parametrize("start_again", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, start_again: bool) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"is not empty and holds no run\.json"):
        open_run(tmp_path, RECORD, start_again=start_again)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_killed_before_its_first_record(tmp_path: Path) -> None:
    (tmp_path / f".{RUN_NAME}.tmp").write_text('{"settings":')
    assert open_run(tmp_path, RECORD, start_again=False) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [RUN_NAME]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        read_run(tmp_path)


@pytest.mark.parametrize("text", ['{"settings": {}, ', '{"colour": 1}', "[1]"])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN_NAME).write_text(text)
    with pytest.raises(UserError, match=r"is damaged .*--resume never"):
        read_run(tmp_path)


def test_what_is_no_number_is_a_word(tmp_path: Path) -> None:
    log = [{"step": 1, "grad_norm": math.inf}, {"step": 2, "grad_norm": math.nan, "loss": 0.5}]
    RunRecord(settings={}, about={}, result={"log": log}).write(tmp_path)
    text = (tmp_path / RUN_NAME).read_text()
    assert json.loads(text)["result"]["log"] == [
        {"step": 1, "grad_norm": "inf"},
        {"step": 2, "grad_norm": "nan", "loss": 0.5},
    ]
