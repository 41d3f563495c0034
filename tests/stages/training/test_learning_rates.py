"""A learning rate of their own for some parameters: against optimizing them apart."""

from __future__ import annotations

import copy

import torch
from torch import nn

from teacher_cache.stages.training.trainer import scale_learning_rate


class Model(nn.Module):
    """An embedding and a linear map."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 3).double()
        self.linear = nn.Linear(3, 2).double()

    def loss(self) -> torch.Tensor:
        return self.linear(self.embedding(torch.tensor([0, 1, 3, 3]))).square().sum()


def test_equals_two_optimizers() -> None:
    model = Model()
    apart = copy.deepcopy(model)
    matrices = [model.embedding.weight, model.linear.weight]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.3}, {"params": [model.linear.bias]}], lr=0.1
    )
    scale_learning_rate(optimizer, model.embedding.weight, 0.25)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.025, 0.1, 0.1]
    references = [
        torch.optim.AdamW([apart.embedding.weight], lr=0.025, weight_decay=0.3),
        torch.optim.AdamW([apart.linear.weight], lr=0.1, weight_decay=0.3),
        torch.optim.AdamW([apart.linear.bias], lr=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
        for one in (optimizer, *references)
    ]
    for _ in range(5):
        for each, optimizers in ((model, [optimizer]), (apart, references)):
            each.zero_grad()
            each.loss().backward()
            for one in optimizers:
                one.step()
        for schedule in schedules:
            schedule.step()
    for found, expected in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_parameter_that_is_not_optimized_stays_out() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.linear.parameters(), lr=0.1)
    scale_learning_rate(optimizer, model.embedding.weight, 0.25)
    assert len(optimizer.param_groups) == 1
