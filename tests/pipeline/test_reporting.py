from __future__ import annotations

import sys

import pytest

from teacher_cache.cache.errors import UserError
from teacher_cache.pipeline import reporting
from teacher_cache.pipeline.reporting import EXIT_INTERRUPTED, reported


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("cache-teacher --data imdb --overwrite", "pipe cache-teacher --data imdb"),
        ("train-student --resume never --lr 0.1", "pipe train-student --lr 0.1"),
        ("train-student --resume=never", "pipe train-student"),
        ("train-student --resume auto", "pipe train-student --resume auto"),
        ("run --config demo", "pipe run --config demo"),
    ],
)
def test_the_line_that_resumes_never_starts_again(
    words: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipe", *words.split()])
    with pytest.raises(SystemExit) as caught, reported():
        raise KeyboardInterrupt
    assert caught.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err.strip().endswith(f"with: {line}")


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Be the second of two processes; returns how long it waits before it says something."""
    waits: list[float] = []
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(reporting.time, "sleep", waits.append)
    return waits


def test_another_process_lets_the_main_one_speak_first(
    second: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, reported(in_processes=True):
        raise UserError("its own disk is full")
    assert (caught.value.code, second) == (2, [reporting.GRACE_S])
    assert capsys.readouterr().err == "error: its own disk is full\n"
    # What follows from the main one's end, a broken connection, waits too.
    with pytest.raises(RuntimeError), reported(in_processes=True):
        raise RuntimeError("connection closed by peer")
    assert second == [reporting.GRACE_S] * 2


def test_another_process_leaves_the_interruption_to_the_main_one(
    second: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporting.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as caught, reported(in_processes=True):
        raise KeyboardInterrupt
    assert (caught.value.code, second) == (EXIT_INTERRUPTED, [])
    assert capsys.readouterr().err == ""


def test_a_command_that_runs_in_one_process(
    second: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, reported():
        raise AssertionError("it must not run")
    assert caught.value.code == 2
    assert "2 processes, and this command runs in one" in capsys.readouterr().err


def test_what_has_no_state_has_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipe", "verify", "somewhere"])
    with pytest.raises(SystemExit), reported():
        raise KeyboardInterrupt
    assert capsys.readouterr().err.strip() == "interrupted"
