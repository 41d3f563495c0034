"""The mixers of Mamba-1 and Mamba-2, and what they must know of a batch's rows.

Parameter names and shapes are mamba_ssm's.

Sources: Gu and Dao 2023, arXiv:2312.00752, and `mamba_ssm/modules/mamba_simple.py`; Dao and Gu
2024, arXiv:2405.21060, and `mamba_ssm/modules/mamba2.py`; their initialisation is repeated here.

Letters in shape comments: B batch, S sequence, N state; of a Mamba-1 D inner width (channels) and R
rank of dt, of a Mamba-2 H heads, P head width and G groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers import initialization as init

from teacher_cache.stages.student.attention import Sight
from teacher_cache.stages.student.config import MambaStudentConfig
from teacher_cache.stages.student.norms import RMSNorm
from teacher_cache.stages.student.position_map import real_first
from teacher_cache.stages.student.scans import dispatch
from teacher_cache.stages.student.scans.recorded import RecordedMixer, RecordedScan


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where samples begin in a batch's rows, where padding stands, and how rows are reversed.

    Attributes:
        seq_idx: [B, S] integers that number the samples packed into a row, or none; nothing
            crosses a change of value.
        mask: [B, S] bool, False where a position neither enters a state nor lets it decay, or
            none. Padding on the right needs no mask: a causal mixer's earlier positions never
            see it.
        reversed_positions: [B, S] int64, where each position of the reversed rows comes from; none
            where no mixer runs backwards.
        sight: of attention layers; none where there are none.
    """

    seq_idx: Tensor | None = None
    mask: Tensor | None = None
    reversed_positions: Tensor | None = None
    sight: Sight | None = None

    def reverse(self, rows: Tensor) -> Tensor:
        """The rows [B, S, ...] with their real part in reversed order; twice is the identity."""
        assert self.reversed_positions is not None, "this layout is of mixers that run forwards"
        index = self.reversed_positions
        return rows.gather(1, index.view(*index.shape, *[1] * (rows.ndim - 2)).expand_as(rows))

    def reversed(self) -> Layout:
        """The layout of the reversed rows."""
        return Layout(
            seq_idx=None if self.seq_idx is None else self.reverse(self.seq_idx),
            mask=None if self.mask is None else self.reverse(self.mask),
        )

    def to(self, device: torch.device | str | int, **how: Any) -> Layout:
        """The layout on another device: accelerate moves a layer's arguments by this name."""
        moved = {name: one.to(device, **how) for name, one in vars(self).items() if one is not None}
        return Layout(**moved)


def reversed_positions(mask: Tensor) -> Tensor:
    """The index that reverses each row's real positions among themselves and leaves the others.

    A flip of the whole row would move the padding, and a row's result would depend on it.

    Args:
        mask: [B, S] bool, True at real positions, wherever in the row they stand.

    Returns:
        [B, S] int64.
    """
    rank = mask.cumsum(dim=1)  # from 1, at real positions
    mirrored = real_first(mask).gather(1, rank[:, -1:] - rank)
    return torch.where(mask, mirrored, torch.arange(mask.shape[1], device=mask.device))


class LayerState:
    """The inputs that the convolution still reaches and the scan's state: constant in the length.

    Args:
        cache: of the whole model, with a linear-attention layer at `layer_idx`.
        layer_idx: of the layer.
    """

    def __init__(self, cache: Cache, layer_idx: int):
        self._cache = cache
        self._layer_idx = layer_idx

    @property
    def convolution(self) -> Tensor | None:
        """[B, W - 1, D] inputs of the convolution before the next position; none at the start."""
        return self._layer.conv_states[0].mT if self._has_begun else None

    @property
    def scan(self) -> Tensor | None:
        """The scan's state before the next position; none at the start."""
        return self._layer.recurrent_states[0] if self._has_begun else None

    @property
    def _layer(self) -> Any:  # the class that transformers takes for linear attention
        return self._cache.layers[self._layer_idx]

    @property
    def _has_begun(self) -> bool:
        return self._layer.has_previous_state[0]  # a reset cache keeps its tensors

    def update(
        self, conv_inputs: Tensor, scan_state: Tensor, *, mask: Tensor | None, reach: int
    ) -> None:
        """Move on behind the positions that were just computed.

        Args:
            conv_inputs: [B, S, D], of the positions just computed.
            scan_state: after the last of them.
            mask: [B, S] bool, False at padding, which stands on the right; or none.
            reach: W - 1, earlier inputs that the convolution sees.
        """
        if mask is not None:  # the last real inputs of each row, and what came before where few are
            before = self.convolution
            if before is None:
                before = conv_inputs.new_zeros(len(mask), reach, conv_inputs.shape[-1])
            window = torch.arange(reach, device=mask.device) + mask.sum(1, keepdim=True)  # [B, W-1]
            index = window[..., None].expand(-1, -1, conv_inputs.shape[-1])
            conv_inputs = torch.cat([before.to(conv_inputs.dtype), conv_inputs], 1).gather(1, index)
        # The convolution's state comes last: it marks the layer as one that has begun.
        self._cache.update_recurrent_state(scan_state.detach(), self._layer_idx)
        self._cache.update_conv_state(
            conv_inputs.detach().mT, self._layer_idx, conv_kernel_size=reach
        )


def inverse_softplus_steps(like: Tensor, config: MambaStudentConfig) -> Tensor:
    """Biases whose softplus is log-uniform between `dt_min` and `dt_max`, and above the floor.

    Args:
        like: gives shape, dtype and device.
        config: of the student.
    """
    dt = torch.empty_like(like).uniform_(math.log(config.dt_min), math.log(config.dt_max))
    dt = dt.exp_().clamp_(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))


def reset_output_projection(projection: nn.Linear, config: MambaStudentConfig) -> None:
    """As torch starts a linear map, over the root of the number of maps that add to one residual.

    Args:
        projection: to the residual stream.
        config: of the student.
    """
    bound = 1 / math.sqrt(projection.in_features * config.num_residuals)
    init.uniform_(projection.weight, -bound, bound)


class CausalConvolution(nn.Module):
    """A convolution per channel that sees W positions up to its own, and its SiLU.

    No `nn.Conv1d`, although its parameters are one's: what adapts or replaces those (PEFT,
    quantisers) would take its input for [B, D, S] and what it adds for what comes before the SiLU.

    Args:
        channels: D.
        width: W.
        activates: whether a SiLU follows.
    """

    def __init__(self, channels: int, width: int, *, activates: bool = True) -> None:
        super().__init__()
        self.activates = activates
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as `nn.Conv1d` does."""
        _reset_as_torch(self.weight, self.bias)

    def forward(self, x: Tensor, seq_idx: Tensor | None, initial_state: Tensor | None) -> Tensor:
        """Of [B, S, D]; `dispatch.convolve` says what the others are."""
        return dispatch.convolve(
            x,
            self.weight,
            self.bias,
            seq_idx=seq_idx,
            initial_state=initial_state,
            activates=self.activates,
        )


class StepProjection(nn.Module):
    """Mamba-1's step sizes from their low rank; the bias is added later, in float32.

    No `nn.Linear`, since an adapter's or a quantiser's takes its bias before it is rounded.

    Args:
        rank: R.
        channels: D.
    """

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, rank))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as `nn.Linear` does, until `Direction` knows better."""
        _reset_as_torch(self.weight, self.bias)

    def forward(self, low_rank: Tensor) -> tuple[Tensor, Tensor]:
        """Of [B, S, R]: [B, S, D] without the bias, and the bias [D]."""
        return F.linear(low_rank, self.weight), self.bias


def _reset_as_torch(weight: Tensor, bias: Tensor) -> None:
    """As torch starts a linear map or a convolution: uniform up to the root of 1 / fan-in."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # torch's, which transformers may silence
    bound = weight[0].numel() ** -0.5
    nn.init.uniform_(bias, -bound, bound)


class Direction(nn.Module, ABC):
    """What one direction has for itself: the convolution and the scan's own parameters.

    A mixer is the direction that runs forwards. The other is a module inside it and is called as
    one: hooks that bring a module's weights (accelerate's offloading) hear of calls alone.

    Args:
        config: of the student.
        width: of what is convolved.
    """

    def __init__(self, config: MambaStudentConfig, width: int) -> None:
        super().__init__()
        self.config = config
        activates = config.conv_activation == "silu"
        self.conv1d = CausalConvolution(width, config.d_conv, activates=activates)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise as mamba_ssm does."""

    @abstractmethod
    def scan(
        self, inputs: tuple[Tensor, ...], layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, RecordedScan]:
        """Convolve and scan; a position sees itself and those before it.

        Args:
            inputs: [B, S, *] each, of the input projection.
            layout: of the rows.
            state: what an earlier call left, and where this one leaves its own; or none.

        Returns:
            [B, S, inner width], and what the scan ran with.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `scan`."""
        return self.scan(*args, **kwargs)

    def convolved(self, x: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """Causal convolution and SiLU of [B, S, width] whose padding is 0."""
        before = None if state is None else state.convolution
        return self.conv1d(x, layout.seq_idx, before)


class BothWays(Direction):
    """Project, convolve causally, scan, gate, project back.

    A bidirectional mixer runs the projected rows in reversed order through `reverse` too, which
    has a convolution and a scan of its own, and adds the two before the gate.
    """

    in_proj: nn.Linear
    reverse: Direction | None
    out_proj: nn.Linear

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise this module's own parameters and the output projection as mamba_ssm does."""
        super().reset_parameters()
        reset_output_projection(self.out_proj, self.config)

    @abstractmethod
    def projected(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """What is scanned, and the gate."""

    @abstractmethod
    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """[B, S, inner width] of what was scanned."""

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
        inputs, z = self.projected(hidden)
        y, forwards = self.scan(inputs, layout, state)
        backwards = None
        if self.reverse is not None:
            turned = tuple(layout.reverse(one) for one in inputs)
            reversed_y, backwards = self.reverse(turned, layout.reversed(), None)
            y = y + layout.reverse(reversed_y)
        if record is not None:
            record.append(RecordedMixer(forwards, backwards, layout.reversed_positions))
        return self.out_proj(self.gated(y, z))


class MambaDirection(Direction):
    """A Mamba-1's, which makes steps and maps of what it convolved."""

    def __init__(self, config: MambaStudentConfig) -> None:
        inner, num_states, rank = config.d_inner, config.d_state, config.resolved_dt_rank
        super().__init__(config, inner)
        # Order of the projection's outputs: dt, B, C.
        self.widths = (rank, num_states, num_states)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_proj = StepProjection(rank, inner)
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
        self, inputs: tuple[Tensor, ...], layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, RecordedScan]:
        """Of x [B, S, D]."""
        (x,) = inputs
        if layout.mask is not None:
            x = x * layout.mask[..., None]
        convolved = self.convolved(x, layout, state)
        low_rank, B, C = self.x_proj(convolved).split(self.widths, dim=-1)
        dt, dt_bias = self.dt_proj(low_rank)  # the scan adds the bias in float32, with softplus
        if layout.mask is not None:  # padding neither writes a state nor lets it decay
            dt = dt.masked_fill(~layout.mask[..., None], -torch.inf)
        A = -torch.exp(self.A_log)
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
            state.update(x, final_state, mask=layout.mask, reach=self.config.d_conv - 1)
        return y, RecordedScan(dt=dt, dt_bias=dt_bias, A=A, B=B, C=C, seq_idx=layout.seq_idx)


class Mamba(BothWays, MambaDirection):
    """The Mamba-1 mixer.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        MambaDirection.__init__(self, config)
        # Order of the projection's outputs: x, z.
        self.in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        self.reverse = MambaDirection(config) if config.bidirectional else None
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def projected(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """X and z, [B, S, D] each."""
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        return (x,), z

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """By SiLU alone."""
        return y * F.silu(z)


class Mamba2Direction(Direction):
    """A Mamba-2's, whose steps and maps are projected before the convolution."""

    def __init__(self, config: MambaStudentConfig) -> None:
        super().__init__(config, config.d_inner + 2 * config.ngroups * config.d_state)
        self.num_heads = config.d_inner // config.head_dim
        self.dt_bias = nn.Parameter(torch.empty(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.D = nn.Parameter(torch.empty(self.num_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as mamba_ssm does."""
        low, high = self.config.initial_decay_rates
        init.copy_(self.dt_bias, inverse_softplus_steps(self.dt_bias, self.config))
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(low, high).log_())
        init.ones_(self.D)

    def scan(
        self, inputs: tuple[Tensor, ...], layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, RecordedScan]:
        """Of xBC [B, S, H P + 2 G N], and dt [B, S, H] before bias and softplus."""
        xBC, dt = inputs
        if layout.mask is not None:  # padding neither writes a state nor lets it decay
            xBC = xBC * layout.mask[..., None]
            dt = dt.masked_fill(~layout.mask[..., None], -torch.inf)
        config = self.config
        states = config.ngroups * config.d_state
        convolved = self.convolved(xBC, layout, state)
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
            state.update(xBC, final_state, mask=layout.mask, reach=config.d_conv - 1)
        return y.flatten(-2), RecordedScan(
            dt=dt, dt_bias=self.dt_bias, A=A, B=B, C=C, seq_idx=layout.seq_idx
        )


class Mamba2(BothWays, Mamba2Direction):
    """The Mamba-2 mixer.

    Args:
        config: of the student.
    """

    def __init__(self, config: MambaStudentConfig) -> None:
        Mamba2Direction.__init__(self, config)
        # Order of the projection's outputs: z, xBC, dt.
        self.widths = (config.d_inner, len(self.conv1d.bias), self.num_heads)
        self.in_proj = nn.Linear(config.d_model, sum(self.widths), bias=config.proj_bias)
        self.reverse = Mamba2Direction(config) if config.bidirectional else None
        self.norm = None
        if config.gated_norm:
            self.norm = RMSNorm(
                config.d_inner, epsilon=config.norm_epsilon, num_groups=config.ngroups
            )
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=config.proj_bias)

    def projected(self, hidden: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """XBC and dt, and z [B, S, H P]."""
        z, xBC, dt = self.in_proj(hidden).split(self.widths, dim=-1)
        return (xBC, dt), z

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """By a norm over the gated, or by SiLU alone."""
        return y * F.silu(z) if self.norm is None else self.norm(y, gate=z)
