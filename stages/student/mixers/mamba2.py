"""The Mamba-2 mixer on the PyTorch scan; parameter names and shapes are mamba_ssm's `Mamba2`'s.

Source: Dao and Gu 2024, arXiv:2405.21060, and `mamba_ssm/modules/mamba2.py`, whose
initialisation this repeats.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from teacher_cache.stages.student.mixers.convolution import causal_conv
from teacher_cache.stages.student.norms import RMSNorm
from teacher_cache.stages.student.scans.ssd import ssd_scan


class Mamba2(nn.Module):
    """Project, convolve causally, scan, gate, normalise, project back.

    Letters in shape comments: B batch, S sequence, H heads, P head width, G groups, N state.

    Args:
        d_model: width of the input and the output.
        expand: the inner width is `expand * d_model`.
        d_state: N.
        head_dim: P; divides the inner width.
        d_conv: positions that the convolution sees.
        ngroups: G; divides the number of heads.
        chunk_size: positions per chunk of the scan.
        dt_min: smallest initial step size.
        dt_max: largest initial step size.
        dt_init_floor: no initial step size is below this.
        A_init_range: the initial decay rates are drawn uniformly from this interval.
        norm_epsilon: of the gated norm.
        num_residuals: layers that add to one residual; scales the output projection's start.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expand: int,
        d_state: int,
        head_dim: int,
        d_conv: int,
        ngroups: int,
        chunk_size: int,
        dt_min: float,
        dt_max: float,
        dt_init_floor: float,
        A_init_range: tuple[float, float],
        norm_epsilon: float,
        num_residuals: int,
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        self.d_state = d_state
        self.head_dim = head_dim
        self.num_heads = self.d_inner // head_dim
        self.ngroups = ngroups
        self.chunk_size = chunk_size
        self.dt_range = (dt_min, dt_max, dt_init_floor)
        self.A_init_range = A_init_range
        self.num_residuals = num_residuals

        # Order of the projection's outputs: z, x, B, C, dt.
        self.conv_dim = self.d_inner + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + self.conv_dim + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.norm = RMSNorm(self.d_inner, epsilon=norm_epsilon)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise this module's own parameters and the output projection as mamba_ssm does."""
        dt_min, dt_max, dt_floor = self.dt_range
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max))
        dt = dt.exp_().clamp_(min=dt_floor)
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(*self.A_init_range).log_())
        init.ones_(self.D)
        bound = 1 / math.sqrt(self.d_inner * self.num_residuals)
        init.uniform_(self.out_proj.weight, -bound, bound)

    def forward(self, hidden: Tensor, seq_idx: Tensor | None = None) -> Tensor:
        """Mix along the sequence; a position sees itself and those before it.

        Args:
            hidden: [B, S, d_model].
            seq_idx: [B, S] integers; neither state nor convolution crosses a change of value.

        Returns:
            [B, S, d_model].
        """
        z, xBC, dt = self.in_proj(hidden).split(
            (self.d_inner, self.conv_dim, self.num_heads), dim=-1
        )
        xBC = F.silu(causal_conv(xBC, self.conv1d.weight, self.conv1d.bias, seq_idx))
        states = self.ngroups * self.d_state
        x, B, C = xBC.split((self.d_inner, states, states), dim=-1)
        y = ssd_scan(
            x.unflatten(-1, (self.num_heads, self.head_dim)),  # [B, S, H, P]
            F.softplus(dt + self.dt_bias),
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.ngroups, self.d_state)),  # [B, S, G, N]
            C.unflatten(-1, (self.ngroups, self.d_state)),
            D=self.D,
            seq_idx=seq_idx,
            chunk_size=self.chunk_size,
        )
        return self.out_proj(self.norm(y.flatten(-2), gate=z))
