"""Where in a model its attention maps are made: the modules to listen to, found by one small pass.

transformers' `output_attentions=True` holds the maps of all layers and heads of a batch until its
end. A hook on the module that makes a map sees one layer's at a time, so a batch needs the memory
of one layer. Which modules those are is not written down anywhere that holds for every
architecture: a short text goes through the model once with the maps asked for, and the innermost
module that put out the very tensor of a layer's map is the one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.teacher.load import Teacher

PROBE_TEXT = "It was a fine film, and then it was not."
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, kw_only=True, eq=False)
class MapSource:
    """The calls of a forward pass that make maps, in their order.

    Attributes:
        modules: called; a model that shares its layers calls one several times.
        places: of the map in what each call puts out.
        layers: of each call, from 0.
        num_heads: H of each.
        is_causal: whether no position looks behind itself, in any layer.
    """

    modules: tuple[nn.Module, ...]
    places: tuple[int, ...]
    layers: tuple[int, ...]
    num_heads: tuple[int, ...]
    is_causal: bool


def find_maps(teacher: Teacher) -> MapSource:
    """Run the teacher on a short text and look where its maps come from.

    Args:
        teacher: loaded `with_maps`, on its device.

    Raises:
        UserError: if it gives no attention maps, or they cannot be traced to modules.
    """
    base = teacher.model.base_model
    ids = torch.tensor([teacher.tokenizer(PROBE_TEXT)["input_ids"]], device=teacher.device)
    seen: list[tuple[nn.Module, int, Tensor]] = []

    def remember(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple):
            seen.extend(
                (module, place, one)
                for place, one in enumerate(output)
                if isinstance(one, Tensor) and one.shape[2:] == (ids.shape[1], ids.shape[1])
            )

    hooks = [module.register_forward_hook(remember) for module in base.modules()]
    try:
        with torch.inference_mode():
            output = base(input_ids=ids, output_attentions=True)
        maps = [one for one in getattr(output, "attentions", None) or () if one is not None]
    except TypeError:  # of a model that knows no such argument
        maps = []
    finally:
        for hook in hooks:
            hook.remove()
    if not maps:
        raise UserError(
            f"{teacher.name} ({type(teacher.model).__name__}) gives no attention maps: leave "
            "--attention out, or give a transformer as the teacher"
        )
    # Inner modules end before those around them, so the first is the innermost.
    found = [next((one for one in seen if one[2] is wanted), None) for wanted in maps]
    calls = [one for one in found if one is not None]
    if len(calls) < len(maps):
        raise UserError(
            f"the attention maps of {teacher.name} ({type(teacher.model).__name__}) cannot be "
            "traced to the parts of it that make them: leave --attention out"
        )
    names = {id(module): name for name, module in base.named_modules()}
    return MapSource(
        modules=tuple(module for module, _, _ in calls),
        places=tuple(place for _, place, _ in calls),
        layers=_layers([names[id(module)] for module, _, _ in calls]),
        num_heads=tuple(one.shape[1] for _, _, one in calls),
        is_causal=all(not one.triu(diagonal=1).any() for _, _, one in calls),
    )


def _layers(names: Sequence[str]) -> tuple[int, ...]:
    """By the modules' names, where these number them; hybrids have layers without maps between."""
    matches = [_NUMBER.search(name) for name in names]
    numbers = [int(match.group(1)) for match in matches if match is not None]
    ascend = all(a < b for a, b in pairwise(numbers))
    return tuple(numbers if len(numbers) == len(names) and ascend else range(len(names)))
