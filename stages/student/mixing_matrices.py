"""A selective scan written as a matrix over positions: the student's counterpart of attention.

A scan is linear in its (post-convolution) input x: before the direct path `D x` and the gate,
`y = M x` with a lower-triangular M that depends on the text. Mamba-2 has one per head,

    M_ij = C_i . B_j exp(A (sum of dt over (j, i])) dt_j

Mamba-1, whose A is diagonal, one per channel: the same with the decay inside the sum over states.
A bidirectional mixer's is the forward scan's plus the backward scan's with both axes reversed over
the valid part. Sources: Ali et al. 2024, "The Hidden Attention of Mamba Models",
arXiv:2403.01590; Bick et al. 2024, "Transformers to SSMs", section 3, arXiv:2408.10189.

The entries come from the very tensors that the forward pass scanned with (`RecordedMixer`). Sums of
step sizes are taken and subtracted in float64 and exponents masked before `exp`, so none is ever
positive and none overflows. What exists at a time is one block of samples, rows and heads (or
channels); its entries are computed again in the backward pass.

Letters in shape comments: B batch, S sequence, H heads, G groups, D channels, N state, U heads or
channels asked for, R rows of the matrix asked for; lower case where a block holds a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from teacher_cache.stages.student.scans.recorded import RecordedMixer, RecordedScan, step_sizes
from teacher_cache.stages.student.scans.ssd import exp_, wide

MAX_ENTRIES = 2**22
"""Numbers of a block's largest tensor; a few of that size exist at a time."""

Part = tuple[slice, slice, slice]  # of samples, units and rows


def num_units(mixer: RecordedMixer) -> int:
    """H of Mamba-2, D of Mamba-1: how many matrices each sample has."""
    return len(mixer.forwards.A)


def chosen_units(mixer: RecordedMixer, num_channels: int) -> Tensor:
    """Whose matrices stand for the layer: all heads of Mamba-2, some channels of Mamba-1.

    Args:
        mixer: as recorded.
        num_channels: how many of Mamba-1's channels, evenly spaced: the same in every step.

    Returns:
        [U] int64.
    """
    num = num_units(mixer)
    units = torch.arange(num, device=mixer.forwards.A.device)
    if mixer.forwards.A.ndim == 1 or num <= num_channels:
        return units
    spaced = torch.arange(num_channels, device=units.device)
    return (2 * spaced + 1) * num // (2 * num_channels)


def mixing_matrices(
    mixer: RecordedMixer, units: Tensor | None = None, rows: Tensor | None = None
) -> Tensor:
    """Rows of the matrices of some heads or channels, whole in memory.

    Args:
        mixer: as recorded.
        units: [U] int64 which heads or channels; all if none.
        rows: [B, R] int64 which positions' rows of each sample; all if none.

    Returns:
        [B, U, R, S], float32 or wider; `y_i = sum_j M_ij x_j`.
    """
    prepared = _Prepared.of(mixer, units, rows)
    everything = (slice(None), slice(None), slice(None))
    return prepared.block(everything)


def mean_absolute_mixing(
    mixer: RecordedMixer,
    units: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    max_entries: int = MAX_ENTRIES,
) -> Tensor:
    """The mean of `|M|` over heads or channels.

    Beside the result and memory linear in the length, no more than a block exists, in the
    backward pass neither.

    Args:
        mixer: as recorded.
        units: [U] int64 which heads or channels; all if none.
        rows: [B, R] int64 which positions' rows of each sample; all if none.
        max_entries: numbers of a block's largest tensor; one row of one matrix is always held.

    Returns:
        [B, R, S], float32 or wider; not normalised.
    """
    prepared = _Prepared.of(mixer, units, rows)
    size = prepared.size
    stripes = []
    for samples in _parts(size.batch, max_entries // (size.row * size.rows)):
        pieces = []
        most_rows = max_entries // (size.row * (samples.stop - samples.start))
        for span in _parts(size.rows, most_rows):
            held = (samples.stop - samples.start) * (span.stop - span.start) * size.row
            total: Tensor | None = None
            for heads in _parts(size.units, max_entries // held):
                added = cast(
                    Tensor,
                    checkpoint(
                        prepared.absolute_sum,
                        (samples, heads, span),
                        use_reentrant=False,
                        preserve_rng_state=False,
                    ),
                )
                total = added if total is None else total + added
            assert total is not None, "there is a head or a channel"
            pieces.append(total)
        stripes.append(torch.cat(pieces, dim=1))
    return torch.cat(stripes) / size.units


def _parts(num: int, most: int) -> Iterator[slice]:
    """Runs that cover 0..num, of `most` each, at least 1."""
    most = max(1, most)
    for start in range(0, num, most):
        yield slice(start, min(num, start + most))


@dataclass(frozen=True, kw_only=True)
class _Size:
    batch: int
    units: int
    rows: int
    row: int  # numbers that one row of one matrix needs: S, or S N of Mamba-1


@dataclass(frozen=True, kw_only=True)
class _Direction:
    """One scan, reduced to the units asked for, with its sums of step sizes.

    Attributes:
        dt: [B, S, U] step sizes, 0 where a position leaves the state alone.
        sums: [B, S, U] float64, of `dt A` of Mamba-2, of `dt` of Mamba-1.
        A: [U, N] of Mamba-1; none of Mamba-2, whose decay is in `sums`.
        B: [B, S, G, N] or [B, S, N].
        C: of B's shape.
        group: [U] int64, whose B and C a head of Mamba-2 takes.
        segment: [B, S] how often the state was reset up to a position; or none.
        rows: [B, R] int64 positions of the rows, in this scan's order.
    """

    dt: Tensor
    sums: Tensor
    A: Tensor | None
    B: Tensor
    C: Tensor
    group: Tensor
    segment: Tensor | None
    rows: Tensor

    @classmethod
    def of(cls, scan: RecordedScan, units: Tensor, rows: Tensor) -> _Direction:
        dt = step_sizes(scan.dt[..., units], scan.dt_bias[units])
        A, B, C = (tensor.to(dt.dtype) for tensor in (scan.A[units], scan.B, scan.C))
        dtype = wide(dt.device)
        segment = None
        if scan.seq_idx is not None:
            changes = scan.seq_idx[:, 1:] != scan.seq_idx[:, :-1]
            segment = torch.nn.functional.pad(changes, (1, 0)).cumsum(dim=1)
        per_head = A.ndim == 1
        # As in the scan: a step below -100 decays to 0 whatever its size, and a huge one would
        # swallow the later steps of the sum.
        steps = (dt.to(dtype) * A.to(dtype)).clamp(min=-100) if per_head else dt.to(dtype)
        groups = B.shape[2] if per_head else 1
        return cls(
            dt=dt,
            sums=steps.cumsum(dim=1),
            A=None if per_head else A,
            B=B,
            C=C,
            group=units * groups // len(scan.A),
            segment=segment,
            rows=rows,
        )

    def block(self, part: Part) -> Tensor:
        """[b, u, r, S] entries, in this scan's order."""
        samples, units, span = part
        rows = self.rows[samples, span]  # [b, r]
        sums = self.sums[samples, :, units].transpose(1, 2)  # [b, u, S]
        at_rows = sums.gather(2, rows[:, None].expand(-1, sums.shape[1], -1))
        passed = at_rows[..., None] - sums[:, :, None]  # [b, u, r, S], since the column
        seen = torch.arange(sums.shape[2], device=rows.device) <= rows[..., None]  # [b, r, S]
        if self.segment is not None:
            segment = self.segment[samples]
            seen = seen & (segment.gather(1, rows)[..., None] == segment[:, None])
        seen = seen[:, None]  # [b, 1, r, S]
        # Masked before exp: what a row does not see would have a positive exponent.
        passed = passed.masked_fill(~seen, 0).to(self.dt.dtype)
        steps = self.dt[samples, :, units].transpose(1, 2)[:, :, None]  # [b, u, 1, S]
        if self.A is None:
            entries = exp_(passed) * self._scores(part, rows) * steps
        else:
            entries = self._through_states(part, rows, passed) * steps
        return entries.masked_fill(~seen, 0)

    def _through_states(self, part: Part, rows: Tensor, passed: Tensor) -> Tensor:
        """The sum over states of `C_i B_j` and its decay, of Mamba-1: [b, u, r, S]."""
        samples, units, _ = part
        assert self.A is not None, "of Mamba-1"
        decay = exp_(passed[..., None] * self.A[units][:, None, None])  # [b, u, r, S, N]
        C = self.C[samples].gather(1, rows[..., None].expand(-1, -1, self.C.shape[-1]))
        maps = C[:, :, None] * self.B[samples][:, None]  # [b, r, S, N]
        return (decay * maps[:, None]).sum(-1)

    def _scores(self, part: Part, rows: Tensor) -> Tensor:
        """`C_i . B_j` of each head's group, of Mamba-2: [b, u, r, S]."""
        samples, units, _ = part
        index = rows[..., None, None].expand(-1, -1, *self.C.shape[2:])
        C = self.C[samples].gather(1, index).transpose(1, 2)  # [b, G, r, N]
        scores = C @ self.B[samples].permute(0, 2, 3, 1)  # [b, G, r, S]
        return scores[:, self.group[units]]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    forwards: _Direction
    backwards: _Direction | None
    reversed_positions: Tensor | None
    size: _Size

    @classmethod
    def of(cls, mixer: RecordedMixer, units: Tensor | None, rows: Tensor | None) -> _Prepared:
        scan = mixer.forwards
        batch, length = scan.dt.shape[:2]
        device = scan.dt.device
        if units is None:
            units = torch.arange(num_units(mixer), device=device)
        if rows is None:
            rows = torch.arange(length, device=device).expand(batch, length)
        backwards = None
        with torch.autocast(device.type, enabled=False):
            forwards = _Direction.of(scan, units, rows)
            if mixer.backwards is not None:
                assert mixer.reversed_positions is not None, "of a bidirectional mixer"
                # The reversal is its own inverse, so it also says where a position went.
                reversed_rows = mixer.reversed_positions.gather(1, rows)
                backwards = _Direction.of(mixer.backwards, units, reversed_rows)
        width = length if scan.A.ndim == 1 else length * scan.A.shape[1]
        return cls(
            forwards=forwards,
            backwards=backwards,
            reversed_positions=mixer.reversed_positions,
            size=_Size(batch=batch, units=len(units), rows=rows.shape[1], row=width),
        )

    def block(self, part: Part) -> Tensor:
        """[b, u, r, S] entries of the whole mixer."""
        with torch.autocast(self.forwards.dt.device.type, enabled=False):
            entries = self.forwards.block(part)
            if self.backwards is None or self.reversed_positions is None:
                return entries
            columns = self.reversed_positions[part[0]][:, None, None].expand(entries.shape)
            return entries + self.backwards.block(part).gather(3, columns)

    def absolute_sum(self, part: Part) -> Tensor:
        """[b, r, S] of `|M|` over the block's heads or channels."""
        return self.block(part).abs().sum(1)
