"""The Mamba-2 mixer; parameter names and shapes are mamba_ssm's `Mamba2`'s.

Source: Dao and Gu 2024, arXiv:2405.21060, and `mamba_ssm/modules/mamba2.py`, whose
initialisation this repeats.

Letters in shape comments: B batch, S sequence, H heads, P head width, G groups, N state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.layout import Layout
from teacher_cache.stages.student.mixers.initial_values import (
    inverse_softplus_steps,
    reset_output_projection,
)
from teacher_cache.stages.student.mixers.layer_state import LayerState
from teacher_cache.stages.student.norms import RMSNorm
from teacher_cache.stages.student.scans import dispatch
from teacher_cache.stages.student.scans.recorded import RecordedMixer, RecordedScan


class Mamba2Direction(nn.Module):
    """What one direction has for itself: the convolution and the scan's own parameters.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.d_inner // config.head_dim
        conv_dim = config.d_inner + 2 * config.ngroups * config.d_state
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, config.d_conv, groups=conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as mamba_ssm does."""
        low, high = self.config.A_init_range
        init.copy_(self.dt_bias, inverse_softplus_steps(self.dt_bias, self.config))
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(low, high).log_())
        init.ones_(self.D)

    def scan(
        self, xBC: Tensor, dt: Tensor, layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, RecordedScan]:
        """Convolve and scan; a position sees itself and those before it.

        Args:
            xBC: [B, S, H P + 2 G N], of the input projection.
            dt: [B, S, H] step sizes before bias and softplus.
            layout: of the rows.
            state: what an earlier call left, and where this one leaves its own; or none.

        Returns:
            [B, S, H P], and what the scan ran with.
        """
        if layout.mask is not None:  # padding neither writes a state nor lets it decay
            xBC = xBC * layout.mask[..., None]
            dt = dt.masked_fill(~layout.mask[..., None], -torch.inf)
        config = self.config
        convolved = dispatch.convolve(
            xBC,
            self.conv1d.weight,
            self.conv1d.bias,
            seq_idx=layout.seq_idx,
            initial_state=None if state is None else state.convolution,
        )
        states = config.ngroups * config.d_state
        x, B, C = convolved.split((config.d_inner, states, states), dim=-1)
        A = -torch.exp(self.A_log)
        B, C = (maps.unflatten(-1, (config.ngroups, config.d_state)) for maps in (B, C))
        y, final_state = dispatch.ssd(
            x.unflatten(-1, (self.num_heads, config.head_dim)),  # [B, S, H, P]
            dt,
            A,
            B,  # [B, S, G, N]
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            seq_idx=layout.seq_idx,
            initial_state=None if state is None else state.scan,
            chunk_size=config.chunk_size,
        )
        if state is not None:
            state.update(xBC, final_state, reach=config.d_conv - 1)
        return y.flatten(-2), RecordedScan(
            dt=dt, dt_bias=self.dt_bias, A=A, B=B, C=C, seq_idx=layout.seq_idx
        )


class Mamba2(Mamba2Direction):
    """Project, convolve causally, scan, gate, normalise, project back.

    A bidirectional mixer runs the projected rows in reversed order through `reverse` too, which
    has a convolution and a scan of its own, and adds the two before the gate.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        # Order of the projection's outputs: z, xBC, dt.
        self.widths = (config.d_inner, self.conv1d.in_channels, self.num_heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=False)
        self.reverse = Mamba2Direction(config) if config.bidirectional else None
        self.norm = RMSNorm(config.d_inner, epsilon=config.norm_epsilon, num_groups=config.ngroups)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise this module's own parameters and the output projection as mamba_ssm does."""
        super().reset_parameters()
        reset_output_projection(self.out_proj, self.config)

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        state: LayerState | None = None,
        record: list[RecordedMixer] | None = None,
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            hidden: [B, S, d_model].
            layout: of the rows.
            state: of incremental decoding, or none.
            record: where to leave what the scans ran with, or none.

        Returns:
            [B, S, d_model].
        """
        z, xBC, dt = self.in_proj(hidden).split(self.widths, dim=-1)
        y, forwards = self.scan(xBC, dt, layout, state)
        backwards = None
        if self.reverse is not None:
            reversed_y, backwards = self.reverse.scan(
                layout.reverse(xBC), layout.reverse(dt), layout.reversed(), None
            )
            y = y + layout.reverse(reversed_y)
        if record is not None:
            record.append(RecordedMixer(forwards, backwards, layout.reversed_positions))
        return self.out_proj(self.norm(y, gate=z))
