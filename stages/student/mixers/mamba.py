"""The Mamba-1 mixer; parameter names and shapes are mamba_ssm's `Mamba`'s.

Source: Gu and Dao 2023, arXiv:2312.00752, and `mamba_ssm/modules/mamba_simple.py`, whose
initialisation this repeats.

Letters in shape comments: B batch, S sequence, D inner width (channels), N state, R rank of dt.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.layout import Layout
from teacher_cache.stages.student.mixers.initial_values import (
    inverse_softplus_steps,
    reset_output_projection,
)
from teacher_cache.stages.student.mixers.layer_state import LayerState
from teacher_cache.stages.student.scans import dispatch
from teacher_cache.stages.student.scans.recorded import RecordedMixer, RecordedScan


class MambaDirection(nn.Module):
    """What one direction has for itself: the convolution and the scan's own parameters.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__()
        self.config = config
        inner, num_states, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner)
        # Order of the projection's outputs: dt, B, C.
        self.widths = (rank, num_states, num_states)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, num_states))
        self.D = nn.Parameter(torch.empty(inner))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as mamba_ssm does: S4D-real decay rates, steps within their range."""
        bound = self.config.resolved_dt_rank**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, inverse_softplus_steps(self.dt_proj.bias, self.config))
        rates = torch.arange(1, self.config.d_state + 1, dtype=torch.float32)
        init.copy_(self.A_log, rates.log().expand_as(self.A_log))
        init.ones_(self.D)

    def scan(
        self, x: Tensor, layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, RecordedScan]:
        """Convolve and scan; a position sees itself and those before it.

        Args:
            x: [B, S, D], of the input projection.
            layout: of the rows.
            state: what an earlier call left, and where this one leaves its own; or none.

        Returns:
            [B, S, D], and what the scan ran with.
        """
        if layout.mask is not None:
            x = x * layout.mask[..., None]
        convolved = dispatch.convolve(
            x,
            self.conv1d.weight,
            self.conv1d.bias,
            seq_idx=layout.seq_idx,
            initial_state=None if state is None else state.convolution,
        )
        low_rank, B, C = self.x_proj(convolved).split(self.widths, dim=-1)
        dt = F.linear(low_rank, self.dt_proj.weight)  # its bias is added in float32, with softplus
        if layout.mask is not None:  # padding neither writes a state nor lets it decay
            dt = dt.masked_fill(~layout.mask[..., None], -torch.inf)
        A, dt_bias = -torch.exp(self.A_log), self.dt_proj.bias
        y, final_state = dispatch.selective(
            convolved,
            dt,
            A,
            B,
            C,
            D=self.D,
            dt_bias=dt_bias,
            seq_idx=layout.seq_idx,
            initial_state=None if state is None else state.scan,
        )
        if state is not None:
            state.update(x, final_state, reach=self.config.d_conv - 1)
        return y, RecordedScan(dt=dt, dt_bias=dt_bias, A=A, B=B, C=C, seq_idx=layout.seq_idx)


class Mamba(MambaDirection):
    """Project, convolve causally, scan, gate, project back.

    A bidirectional mixer runs the projected rows in reversed order through `reverse` too, which
    has a convolution and a scan of its own, and adds the two before the gate.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config)
        # Order of the projection's outputs: x, z.
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.reverse = MambaDirection(config) if config.bidirectional else None
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
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        y, forwards = self.scan(x, layout, state)
        backwards = None
        if self.reverse is not None:
            reversed_y, backwards = self.reverse.scan(layout.reverse(x), layout.reversed(), None)
            y = y + layout.reverse(reversed_y)
        if record is not None:
            record.append(RecordedMixer(forwards, backwards, layout.reversed_positions))
        return self.out_proj(y * F.silu(z))
