from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from teacher_cache.cache.errors import BadShardError, CheckFailed, UserError
from teacher_cache.pipeline.reporting import console, reported, working


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """`reported` sets up the project's logger; other tests want theirs back."""
    logger = logging.getLogger("teacher_cache")
    state = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = state[0], state[2]
    logger.setLevel(state[1])


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (CheckFailed, 1), (BadShardError, 1)])
def test_our_errors_are_one_sentence_on_stderr_and_an_exit_code(
    error: type[Exception], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "[bold]x[/] and :eye: " + 40 * "long " + "end"
    with pytest.raises(SystemExit) as raised, reported():
        raise error(sentence)
    assert raised.value.code == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {sentence}\n")


def test_an_interruption_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pipe", "run", "--config", "my run.yaml"])
    with pytest.raises(SystemExit) as raised, reported():
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err.endswith(": pipe run --config 'my run.yaml'\n")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError


def test_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with reported():
        logging.getLogger("teacher_cache.stages.inference").warning("halved [a] batch")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.split() == ["WARNING", "halved", "[a]", "batch"]


def test_what_is_printed_is_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.print("runs/[bold]/x :eye: [unused1]")
    assert capsys.readouterr().out == "runs/[bold]/x :eye: [unused1]\n"


def test_no_spinner_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with working(console, "thinking"):
        pass
    assert capsys.readouterr().out == ""
