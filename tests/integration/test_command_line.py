"""`pipe` as a process of its own: exit codes, what goes to which stream; and `pipe run`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
import yaml

from teacher_cache.pipeline import cli
from tests.command_line import done, refused
from tests.integration.conftest import Copy, contents

PIPE = (sys.executable, "-c", "from teacher_cache.pipeline.cli import main; main()")


def start(*args: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pipe` as a process of its own."""
    command = [*PIPE, *(str(one) for one in args)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=100)


def test_the_command_is_installed_under_its_name() -> None:
    (pipe,) = [one for one in entry_points(group="console_scripts") if one.name == "pipe"]
    assert pipe.load() is cli.main


def test_help_goes_to_stdout_and_is_no_error() -> None:
    for args in (("--help",), ("train-student", "-h")):
        ended = start(*args)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert "Usage: " in ended.stdout


def test_commands_stand_in_the_order_of_work() -> None:
    said = start("--help").stdout
    groups = ("Make a cache", "Train students from it", "Look at what there is", "Use a student")
    commands = ("cache-teacher", "train-student", "evaluate", "predict")
    places = [said.index(one) for pair in zip(groups, commands, strict=True) for one in pair]
    assert places == sorted(places)
    assert "─ Commands" not in said, "each command is in a group"
    assert start("--version").stdout == f"teacher-cache {version('teacher-cache')}\n"


@pytest.mark.parametrize(
    ("words", "expected"), [("pipe imp", "import-log-probs"), ("pipe convert --top", "--top-k")]
)
def test_a_shell_completes_commands_and_options(words: str, expected: str) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    ended = subprocess.run(
        [Path(sys.executable).with_name("pipe")],
        env=os.environ | asked | {"_PIPE_COMPLETE": "complete_bash"},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert expected in ended.stdout.split()


def test_results_go_to_stdout_and_what_runs_the_student_to_stderr(bert_run: Path) -> None:
    ended = start("predict", bert_run, text="A fine film.\nA bore.\n")
    assert ended.returncode == 0
    said = " ".join(ended.stderr.split())
    assert said == "INFO mamba2 on cpu: the PyTorch scan (tensors are on cpu)"
    assert [line.split("\t")[2] for line in ended.stdout.splitlines()] == [
        "A fine film.",
        "A bore.",
    ]


@pytest.mark.parametrize(("damaged", "code"), [(True, 1), (False, 2)])
def test_errors_are_one_sentence_on_stderr(
    damaged: bool, code: int, own: Copy, bert_cache: Path
) -> None:
    cache = own(bert_cache)
    (cache / ("labeled/000/000001.arrow" if damaged else "manifest.json")).unlink()
    ended = start("verify", cache)
    assert ended.returncode == code
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stdout + ended.stderr
    assert ("000001.arrow has no bytes" in ended.stdout) == damaged


def test_a_reader_that_leaves_early_sees_no_traceback(bert_cache: Path) -> None:
    # As in `pipe inspect CACHE --json | head -1`, with more to print than a pipe holds.
    reading, writing = os.pipe()
    os.close(reading)
    command = [*PIPE, "inspect", str(bert_cache), "--json"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=100)
    os.close(writing)
    assert "Traceback" not in ended.stderr
    assert ended.returncode != 0


@pytest.fixture(scope="module")
def whole_run(
    tmp_path_factory: pytest.TempPathFactory, acl_imdb: Path, tiny_bert: Path
) -> tuple[Path, str]:
    """The folder of a whole run, from a base model to the evaluation, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    quick = {"batch_size": 16, "max_steps": 2, "checkpoint_steps": 1}
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "finetune_teacher": {"data": str(acl_imdb), "model": str(tiny_bert), **quick},
                "cache_teacher": {"data": str(acl_imdb), "max_samples": 60},
                "train_student": {"d_model": 16, "num_layers": 1, "head_dim": 48, **quick},
                "students": {"labels only": {"alpha": 0}, "distilled": {"alpha": 0.9}},
                "evaluate": {"data": str(acl_imdb), "latency_lengths": [8]},
            },
            sort_keys=False,
        )
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        return folder, done("run", "--config", "run.yaml")


def test_a_whole_run_ends_with_the_table(whole_run: tuple[Path, str]) -> None:
    folder, printed = whole_run
    (teacher,) = (folder / "teachers").iterdir()
    (cache,) = (folder / "caches").iterdir()
    runs = sorted(path.name for path in (folder / "runs").iterdir() if path.is_dir())
    assert runs == [f"{cache.name}-distilled", f"{cache.name}-labels-only"]
    for stage in ("fine-tuning the teacher", "stage one", "stage two: distilled", "evaluation"):
        assert stage in printed
    assert f"✓ teacher teachers/{teacher.name} fine-tuned" in printed
    (file,) = (folder / "runs").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows] == ["majority", "teacher", runs[1], runs[0]]
    for name in ("majority", "teacher", "labels only", "distilled"):
        assert f"│ {name} " in printed


def test_the_students_differ_in_what_their_entries_say(whole_run: tuple[Path, str]) -> None:
    folder, _ = whole_run
    settings = [
        json.loads((run / "run.json").read_text())["settings"]
        for run in sorted((folder / "runs").iterdir())
        if run.is_dir()
    ]
    differing = {name for name in settings[0] if settings[0][name] != settings[1][name]}
    assert differing == {"alpha"}


def test_a_whole_run_again_computes_nothing(
    whole_run: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole_run
    monkeypatch.chdir(folder)
    before = contents(folder)
    printed = done("run", "--config", "run.yaml")
    assert "was fine-tuned before" in printed
    assert "0 shards computed" in printed
    assert printed.count("was trained before") == 2
    after = contents(folder)
    changed = {path.suffix for path in after if after[path] != before.get(path)}
    assert changed <= {".json", ".html"}  # the figures: latencies are measured anew
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("setting", "saying"),
    [
        ("students.distilled.alpah=1", "students.distilled has no setting 'alpah': did you mean"),
        ("students.distilled.head_dim=7", "head_dim 7 does not divide"),
        ("students.Labels-Only.alpha=1", "two students would have the folder name 'labels-only'"),
        ("students.1.cache=x", "trains from the cache that it makes"),
        ("cache_teacher.data=imbd", "'imbd': did you mean 'imdb'"),
        ("evaluate.data=imbd", "'imbd': did you mean 'imdb'"),
    ],
)
def test_a_whole_run_refuses_before_it_begins(
    setting: str,
    saying: str,
    whole_run: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = whole_run
    monkeypatch.chdir(tmp_path)
    refused("run", "--config", folder / "run.yaml", "--set", setting, saying=saying)
    assert not list(tmp_path.iterdir())
