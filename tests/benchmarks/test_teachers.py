"""One architecture of each kind through stage one, against a plain forward of each document."""

from __future__ import annotations

import pytest

from benchmarks.teachers import quiet, tried
from teacher_cache.stages.tasks import TaskName

# By how documents share a pass.
KINDS: list[tuple[TaskName, str, str]] = [
    ("lm", "llama", "packed"),
    ("lm", "llama4_text", "packed"),  # whose class names a base that it does not have
    ("lm", "gpt_oss", "padded"),  # attention with sinks
    ("lm", "mamba2", "padded"),  # an infinite number in its configuration
    ("lm", "falcon_h1", "padded"),  # a hybrid whose head asks its base for a multiplier
    ("lm", "recurrent_gemma", "padded"),  # a soft cap of another name
    ("classification", "bert", "padded"),
    ("classification", "fnet", "equal"),
    ("classification", "xlnet", "equal"),  # pads on the left
    ("classification", "t5", "padded"),  # pools at its end mark
    ("classification", "deberta-v2", "padded"),  # makes maps only where it is asked for them
    ("classification", "gpt2", "padded"),
]


@pytest.mark.parametrize(("task", "name", "rows"), KINDS)
def test_cached_is_what_the_model_says_of_each_document_alone(
    task: TaskName, name: str, rows: str
) -> None:
    quiet()
    found = tried(task, name, None)
    assert found is not None, "transformers builds it"
    assert found.said["logits"] == "exact" and found.rows == rows
    assert not found.faults
    assert all(said == "exact" or said.startswith("refused: ") for said in found.said.values())
