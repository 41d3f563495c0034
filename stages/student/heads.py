"""Classification heads: from one pooled vector a sample to its logits."""

from __future__ import annotations

from torch import nn


def build_head(kind: str, *, d_model: int, num_labels: int, dropout: float) -> nn.Sequential:
    """A head from [B, d_model] to [B, num_labels].

    Args:
        kind: "mlp" (norm, linear, GELU, dropout, linear) or "linear" (dropout, linear).
        d_model: width of the pooled vector, and of the hidden layer.
        num_labels: C.
        dropout: probability.
    """
    if kind == "linear":
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(d_model, num_labels))
    return nn.Sequential(
        nn.LayerNorm(d_model),
        nn.Linear(d_model, d_model),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(d_model, num_labels),
    )
