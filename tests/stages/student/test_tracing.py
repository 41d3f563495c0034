"""The student's forward under torch.compile and torch.export, for lengths that were not traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.tiny_students import small_student

STUDENTS = pytest.mark.parametrize(
    "changes",
    [
        {"arch": "mamba"},
        {"arch": "mamba2"},
        {"arch": "mamba2", "bidirectional": True, "pooling": "mean"},
    ],
)
LENGTHS = (9, 64, 130)  # less than a chunk, one, and more than two


def batch(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return torch.randint(0, 50, (3, length)), mask


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({"arch": "mamba"}, "aot_eager"),
        ({"arch": "mamba2"}, "inductor"),
        ({"arch": "mamba2", "bidirectional": True, "pooling": "mean"}, "aot_eager"),
    ],
)
def test_compiles_as_one_graph(changes, backend) -> None:
    student = small_student(
        num_layers=1, position_map={"mode": "append", "token_id": 3}, **changes
    ).double()
    torch.compiler.reset()
    compiled: Any = torch.compile(student, fullgraph=True, dynamic=True, backend=backend)
    parameters = list(student.parameters())
    for length in LENGTHS:
        ids, mask = batch(length)
        expected, got = student(ids, mask).logits, compiled(ids, mask).logits
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
        for theirs, ours in zip(
            torch.autograd.grad(expected.square().sum(), parameters),
            torch.autograd.grad(got.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@STUDENTS
def test_exports_with_a_named_and_bounded_length(changes) -> None:
    student = small_student(num_layers=1, **changes)
    sizes = {0: Dim("batch", max=64), 1: Dim("length", min=1, max=4096)}
    exported = torch.export.export(student, batch(20), dynamic_shapes=(sizes, sizes)).module()
    for length in (1, *LENGTHS):
        ids, mask = batch(length)
        mask[:, 0] = 1
        expected = student(ids, mask).logits
        torch.testing.assert_close(exported(ids, mask).logits, expected, rtol=0, atol=1e-6)


@STUDENTS
def test_exports_for_any_batch_and_length(changes) -> None:
    student = small_student(num_layers=1, position_map={"mode": "move_first_to_last"}, **changes)
    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    exported = torch.export.export(student, batch(20), dynamic_shapes=(sizes, sizes)).module()
    for length in LENGTHS:
        for rows in (slice(0, 3), slice(0, 2)):
            ids, mask = (tensor[rows] for tensor in batch(length))
            expected = student(ids, mask).logits
            torch.testing.assert_close(exported(ids, mask).logits, expected, rtol=0, atol=1e-6)
