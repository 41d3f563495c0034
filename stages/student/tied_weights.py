"""Weights of several names in a module's state: checkpoints hold each once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def hold_tied_weights_once(module: nn.Module) -> Mapping[str, str]:
    """Leave all names but the first out of a module's state, and fill them in on loading.

    safetensors refuses two names for one weight, and a Trainer saves what is trained, which may be
    more than the model of transformers that would see to it. A module inside may do the same.

    Args:
        module: with all its parameters.

    Returns:
        The names that are left out, each with the one under which its weight is held.
    """
    first: dict[int, str] = {}
    tied = {
        name: first[id(one)]
        for name, one in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(one), name) != name
    }

    def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in tied:
            state.pop(prefix + name, None)  # a module inside may have left it out

    def fill_in(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name, held in tied.items():
            state[prefix + name] = state[prefix + held]

    module.register_state_dict_post_hook(leave_out)
    module.register_load_state_dict_pre_hook(fill_in)
    return tied
