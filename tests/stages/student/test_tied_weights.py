"""Weights of several names are in a state once, also where one module holds another."""

from __future__ import annotations

import torch
from safetensors.torch import load, save
from torch import nn

from teacher_cache.stages.models.pretrained import hold_tied_weights_once


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.other = nn.Linear(3, 3)
        self.tied = hold_tied_weights_once(self)


def test_each_weight_is_held_once_and_found_again() -> None:
    for depth in (1, 2):
        module, fresh = Tied(), Tied()
        for _ in range(depth):
            module, fresh = Holder(module), Holder(fresh)
        assert isinstance(module, Holder) and isinstance(fresh, Holder)
        inner = "inner." * depth
        assert module.tied == {f"{inner}head.weight": f"{inner}table.weight"}
        state = module.state_dict()
        assert f"{inner}head.weight" not in state and f"{inner}table.weight" in state
        fresh.load_state_dict(load(save(state)))  # strict, and safetensors refuses shared memory
        for one, other in zip(fresh.parameters(), module.parameters(), strict=True):
            assert torch.equal(one, other)


def test_a_module_without_ties_keeps_its_state() -> None:
    module = Holder(nn.Linear(3, 3))
    assert (
        module.tied == {} and module.state_dict().keys() == dict(module.named_parameters()).keys()
    )
