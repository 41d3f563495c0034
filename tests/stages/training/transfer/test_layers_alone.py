"""Layers that are fed the teacher's states, against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from teacher_cache.stages.losses.config import TransferConfig
from teacher_cache.stages.losses.layers import added_distance
from teacher_cache.stages.student import MambaStudentConfig, build_language_model
from teacher_cache.stages.training.layers import HiddenTransfer, LayerPair, Transfer


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_of_the_size_of_what_the_teacher_adds() -> None:
    student, teacher, before = (rows(5, 4, seed=one) for one in range(3))
    before[2] = teacher[2]  # the teacher adds nothing there
    student.requires_grad_()
    found = added_distance(student, teacher, before)
    lists = [one.tolist() for one in (student, teacher, before)]
    for place, (ours, theirs, read) in enumerate(zip(*lists, strict=True)):
        apart = sum((one - other) ** 2 for one, other in zip(ours, theirs, strict=True))
        added = sum((one - other) ** 2 for one, other in zip(theirs, read, strict=True))
        wanted = 0.0 if place == 2 else apart / added
        assert found[place].item() == pytest.approx(wanted, rel=1e-12, abs=0)
    found.sum().backward()
    assert student.grad is not None
    for place in range(5):
        added = (teacher[place] - before[place]).square().sum().item()
        slope = 2 * (student[place] - teacher[place]) / added if place != 2 else 0 * student[place]
        torch.testing.assert_close(student.grad[place], slope.detach(), rtol=1e-12, atol=0)


def test_a_layer_that_adds_nothing_is_at_1() -> None:
    teacher, before = rows(3, 4, seed=0), rows(3, 4, seed=1)
    torch.testing.assert_close(
        added_distance(before, teacher, before), torch.ones(3, dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="states of shape"):
        added_distance(before, teacher[:2], before)


def layers_alone(num_layers: int) -> tuple[Transfer, tuple[str, ...]]:
    names = tuple(f"hidden_{i}" for i in range(num_layers))
    hidden = HiddenTransfer(
        pairs=tuple(LayerPair(i, i) for i in range(num_layers)),
        fields=names,
        widths=(16,) * num_layers,
    )
    config = TransferConfig(hidden_weight=1.0, transfer_schedule="layerwise")
    return Transfer(config=config, hidden=hidden), names


def test_each_layer_reads_what_the_teacher_wrote_below_it() -> None:
    """Padding and neighbours in a row change nothing, and no layer hears of another."""
    config = MambaStudentConfig(
        vocab_size=50, d_model=16, num_layers=3, expand=2, head_dim=8, d_state=8,
        d_intermediate=24, attn_layer_idx=[1],
        attn_cfg={"num_heads": 2, "num_heads_kv": 1, "head_dim": 8},
    )  # fmt: skip
    student = build_language_model(config, seed=0).double()
    transfer, names = layers_alone(3)
    batch = {
        "input_ids": torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(5)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * 7]),
        **{name: rows(2, 7, 16, seed=i) for i, name in enumerate(names)},
    }
    found = transfer.distances_alone(student.backbone, batch)
    wanted = torch.zeros((), dtype=torch.float64)
    for row, part in ((0, slice(0, 3)), (0, slice(3, 7)), (1, slice(0, 5))):
        ids = batch["input_ids"][row : row + 1, part]
        states = [student.backbone.embedding(ids).detach()]
        states += [batch[name][row : row + 1, part] for name in names]
        for i in range(3):
            made = student.backbone.fed({i: states[i]} if i else {}, ids, torch.ones_like(ids))[i][
                1
            ]
            wanted = wanted + added_distance(made[0], states[i + 1][0], states[i][0]).sum()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    found.backward()
    assert all(one.grad is not None for one in student.backbone.layers.parameters())
    assert student.backbone.embedding.weight.grad is None
