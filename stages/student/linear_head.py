"""A student's language-model head as a loss takes it: its own parameters, not their logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from teacher_cache.stages.teacher.language_model_head import LanguageModelHead


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """`logits = cap(scale * (states @ weight.T + bias))`; `cap` as in `LanguageModelHead`.

    Attributes:
        weight: [V, D], the parameter itself: it gets the gradient.
        bias: [V], likewise, or None.
        scale: of what stands before the soft cap.
        soft_cap: nats, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> LinearHead:
        """The head of a causal language model whose output layer is linear.

        Raises:
            UserError: if it is not.
        """
        stored = LanguageModelHead.of(model)
        layer = model.get_output_embeddings()
        assert layer is not None, "its weight was found"
        return cls(
            weight=layer.weight,  # pyright: ignore[reportArgumentType]  (of a linear layer)
            bias=layer.bias,  # pyright: ignore[reportArgumentType]
            scale=stored.scale,
            soft_cap=stored.soft_cap,
        )
