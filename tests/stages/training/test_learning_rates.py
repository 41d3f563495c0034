"""A learning rate of their own for some parameters: against optimizing them apart."""

from __future__ import annotations

import copy

import torch
from torch import nn

from teacher_cache.stages.training.learning_rates import scale_learning_rate


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.tensor([0, 1, 3, 3])).square().sum()


def test_equals_two_optimizers() -> None:
    model = make_model()
    apart = copy.deepcopy(model)
    embedding, linear = model[0].weight, list(model[1].parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [embedding, linear[0]], "weight_decay": 0.3}, {"params": [linear[1]]}], lr=0.1
    )
    scale_learning_rate(optimizer, embedding, 0.25)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [0.025, 0.1, 0.1]
    references = [
        torch.optim.AdamW([apart[0].weight], lr=0.025, weight_decay=0.3),
        torch.optim.AdamW([apart[1].weight], lr=0.1, weight_decay=0.3),
        torch.optim.AdamW([apart[1].bias], lr=0.1),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
        for one in (optimizer, *references)
    ]
    for _ in range(5):
        for each, optimizers in ((model, [optimizer]), (apart, references)):
            each.zero_grad()
            loss_of(each).backward()
            for one in optimizers:
                one.step()
        for schedule in schedules:
            schedule.step()
    for found, expected in zip(model.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_a_parameter_that_is_not_optimized_stays_out() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    scale_learning_rate(optimizer, model[0].weight, 0.25)
    assert len(optimizer.param_groups) == 1
