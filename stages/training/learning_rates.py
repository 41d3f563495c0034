"""Learning rates that differ between the parameters of one optimizer."""

from __future__ import annotations

import torch


def scale_learning_rate(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor, scale: float
) -> None:
    """Move a parameter to a group of its own, with all options of its old one but the rate.

    To be called before a schedule is made, which takes each group's rate for its peak, and before
    the first step. A parameter that the optimizer does not have, being frozen, stays so.

    Args:
        optimizer: with groups that have an `lr`.
        parameter: to move.
        scale: its learning rate, as a multiple of its group's.
    """
    for group in optimizer.param_groups:
        others = [one for one in group["params"] if one is not parameter]
        if len(others) < len(group["params"]):
            group["params"] = others
            moved = {**group, "params": [parameter], "lr": scale * group["lr"]}
            optimizer.add_param_group(moved)
            return
