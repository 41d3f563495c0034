from __future__ import annotations

import sys

import pytest

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


def test_what_has_no_state_has_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pipe", "verify", "somewhere"])
    with pytest.raises(SystemExit), reported():
        raise KeyboardInterrupt
    assert capsys.readouterr().err.strip() == "interrupted"
