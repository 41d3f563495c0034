"""A student and the projections that take its layers' outputs to its teacher's width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.student.tied_weights import hold_tied_weights_once
from teacher_cache.stages.training.transfer.cached_layers import CachedLayers


def with_projected_layers(student: nn.Module, layers: CachedLayers | None) -> nn.Module:
    """The student, in `ProjectedLayers` where hidden states are matched.

    Args:
        student: to be trained.
        layers: what is matched, or none.
    """
    if layers is None or layers.hidden is None:
        return student
    return ProjectedLayers(student, widths=layers.hidden_widths, seed=layers.config.seed)


class ProjectedLayers(nn.Module):
    """What is trained where hidden states are matched: a student and a projection for each layer.

    One module with one forward, as `ProjectedStudent`, which may be inside. Only the student is the
    result.

    Args:
        student: a Mamba student, to be trained; shared, not copied.
        widths: D of the states that a layer's output is matched with, by layer.
        seed: of the projections' first weights, which depend on it alone; the global random state
            is neither read nor changed.
    """

    def __init__(self, student: nn.Module, *, widths: Mapping[int, int], seed: int) -> None:
        super().__init__()
        self.student = student
        d_model = self.get_input_embeddings().embedding_dim
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.projections = nn.ModuleDict(
                {
                    str(layer): nn.Linear(d_model, width, bias=False)
                    for layer, width in widths.items()
                }
            )
        hold_tied_weights_once(self)

    def forward(self, **inputs: Any) -> Any:
        """The student's outputs, with `projected_hidden`: [B, S', D] by layer, float32 or wider.

        Args:
            **inputs: as the student takes them.
        """
        outputs = self.student(**inputs, output_hidden_states=True)
        projected: dict[int, torch.Tensor] = {}
        for name, projection in self.projections.items():
            states = outputs.hidden_states[int(name) + 1]  # the first are before all layers
            weight = cast(nn.Linear, projection).weight
            with torch.autocast(states.device.type, enabled=False):  # in full precision
                projected[int(name)] = projection(states.to(weight.dtype))
        outputs["projected_hidden"] = projected  # a key, so that data parallelism finds it
        return outputs

    @property
    def output_head(self) -> LinearHead:
        """A language model's."""
        return cast(LinearHead, self.student.output_head)

    def get_input_embeddings(self) -> nn.Embedding:
        """The student's."""
        return cast(Any, self.student).get_input_embeddings()

    def num_next_tokens(self, attention_mask: torch.Tensor) -> int:
        """As the student counts them."""
        return cast(Any, self.student).num_next_tokens(attention_mask)
