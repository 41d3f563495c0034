"""The MLP of a student's layer, as mamba_ssm names it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.activations import ACT2FN

from teacher_cache.stages.student.config import MambaStudentConfig


class MLP(nn.Module):
    """Two projections about an activation, with a gate (Shazeer 2020, arXiv:2002.05202) or none.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp == "gated"
        # Order of a gated one's outputs: what is gated, the gate.
        width = config.d_intermediate * (2 if self.is_gated else 1)
        self.fc1 = nn.Linear(config.d_model, width, bias=config.mlp_bias)
        self.activation = ACT2FN[config.mlp_activation]
        self.fc2 = nn.Linear(config.d_intermediate, config.d_model, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Of each position by itself, [..., d_model]."""
        inner = self.fc1(hidden)
        if self.is_gated:
            value, gate = inner.chunk(2, dim=-1)
            return self.fc2(value * self.activation(gate))
        return self.fc2(self.activation(inner))
