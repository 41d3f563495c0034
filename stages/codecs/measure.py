"""How far what a codec gives back is from the teacher that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teacher_cache.cache.codecs.interface import Codec, Decoded
from teacher_cache.cache.schema import NO_LABEL, bytes_per_position
from teacher_cache.stages.codecs.capture import reduce_positions
from teacher_cache.stages.codecs.interface import Positions
from teacher_cache.stages.codecs.named import room_of
from teacher_cache.stages.codecs.reductions import on_host
from teacher_cache.stages.data.packing import PackedSample
from teacher_cache.stages.models.head import LanguageModelHead, check_head
from teacher_cache.stages.tokens.support import AnySupport, MappedSupport, states_support


@dataclass(frozen=True, kw_only=True)
class ReconstructionError:
    """Of a codec on probed positions, for the manifest.

    Attributes:
        temperature: of all that follows.
        num_positions: probed.
        kl: nats, mean over positions: from the exact teacher to the decoded one, over the stored
            ids and, for all others together, the ghost. What rounding (and interpolation, off the
            grid) costs; what the ghost cannot tell apart is no part of it.
        largest_kl: the same of the worst position.
        lost_mass: mean exact mass outside the stored ids: what the ghost stands for.
        unused_mass: mean mass of the model's rows that no token has, at T = 1.
        num_ids: mean stored ids of a position.
        bytes_per_token: of the codec's fields at that size.
        coverage: mean mass that has an id of the support; None where all of it has.
    """

    temperature: float
    num_positions: int
    kl: float
    largest_kl: float
    lost_mass: float
    unused_mass: float
    num_ids: float
    bytes_per_token: float
    coverage: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it, to four digits."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }


def reconstruction_error(
    codec: Codec,
    support: AnySupport,
    logits: Tensor,
    *,
    temperature: float,
    states: Tensor | None = None,
    drawn_at: np.ndarray | None = None,
) -> ReconstructionError:
    """Reduce, encode, decode, and compare with the exact distribution in float64.

    For a `sampled` cache this is the error of the log-probs that it keeps (its `coarse` use); the
    noise of the draws themselves has mean 0 and is no error of reconstruction.

    Args:
        codec: as of the cache, with its head if it decodes through one.
        support: ids that count.
        logits: [N, R] of N probed positions, N > 0.
        temperature: to compare at.
        states: [N, D], for a codec that keeps them.
        drawn_at: [N, draws], for one that draws.

    Raises:
        UserError: if logits are not finite, or the codec does not serve the temperature.
    """
    next_ids = torch.full((len(logits),), NO_LABEL, device=logits.device)
    reduced, unused = reduce_positions(
        codec, support, logits, next_ids, states=states, drawn_at=drawn_at
    )
    stored = codec.expand(codec.encode(reduced))
    on_device = {name: torch.from_numpy(one).to(logits.device) for name, one in stored.items()}
    with torch.inference_mode():
        decoded = codec.decode(on_device, temperature)
    exact, unmatched = support.log_probs(logits, temperature)
    kl, lost = kl_to_decoded(exact, unmatched, decoded)
    ids = decoded.ids
    num_ids = float(support.size if ids is None else (on_host(ids) >= 0).sum(-1).mean())
    return ReconstructionError(
        temperature=temperature,
        num_positions=len(logits),
        kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        lost_mass=float(lost.mean()),
        unused_mass=float(unused.mean()),
        num_ids=num_ids,
        bytes_per_token=bytes_per_position(codec.fields, num_ids),
        coverage=float(-torch.expm1(unmatched).mean())
        if isinstance(support, MappedSupport)
        else None,
    )


def kl_to_decoded(
    exact: Tensor, unmatched: Tensor, decoded: Decoded
) -> tuple[np.ndarray, np.ndarray]:
    """[N] KL from exact distributions to decoded ones, and [N] exact mass outside the stored ids.

    Args:
        exact: [N, V] float64 nats, of `log_probs` of the support.
        unmatched: [N] of the same, the log of the mass that has no id.
        decoded: of N positions, in torch, at the same temperature.
    """
    ids = None if decoded.ids is None else on_host(decoded.ids)
    return _divergence(
        on_host(exact),
        np.exp(on_host(unmatched)),
        ids,
        on_host(decoded.log_probs),
        on_host(decoded.tail_log_prob),
    )


def _divergence(
    exact: np.ndarray,
    unmatched: np.ndarray,
    ids: np.ndarray | None,
    log_probs: np.ndarray,
    tail_log_prob: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """[N] KL over head and ghost, and [N] exact mass outside the head.

    Args:
        exact: [N, V] float64, nats.
        unmatched: [N] mass that has no id.
        ids: as of `Decoded`, like the rest.
        log_probs: [N, K].
        tail_log_prob: [N].
    """
    log_q = log_probs.astype(np.float64)
    if ids is None:
        return _terms(exact, log_q).sum(-1), np.zeros(len(exact))
    filled = ids >= 0
    taken = np.where(filled, ids, 0)
    log_p = np.where(filled, np.take_along_axis(exact, taken, axis=1), -np.inf)
    outside = np.ones(exact.shape, bool)
    rows = np.broadcast_to(np.arange(len(exact))[:, None], taken.shape)
    outside[rows[filled], taken[filled]] = False
    lost = unmatched + (np.exp(exact) * outside).sum(-1)  # over the tail itself, never 1 - sum
    has_tail = lost > 0
    log_lost = np.log(lost, out=np.full_like(lost, -np.inf), where=has_tail)
    tail = _terms(log_lost, tail_log_prob.astype(np.float64))
    return _terms(log_p, log_q).sum(-1) + tail, lost


def _terms(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """`p (log p - log q)`, 0 where p is 0."""
    is_zero = np.isneginf(log_p)
    finite = np.where(is_zero, 0.0, log_p)
    return np.exp(log_p) * (finite - np.where(is_zero, 0.0, log_q))


NUM_POSITIONS = 128
USUAL_TEMPERATURES = (1.0, 2.0)  # 1 is the teacher's own, 2 the default of a student's training


@dataclass(frozen=True, kw_only=True)
class CodecLoss:
    """Of a codec, on the first positions of a corpus that predict something.

    Attributes:
        errors: at each probed temperature, the first one 1 where the codec serves it.
        head_difference: of cached states' logits from the teacher's, the largest, nats; None where
            no states are cached.
    """

    errors: tuple[ReconstructionError, ...]
    head_difference: float | None

    @property
    def num_ids(self) -> float:
        """Mean stored ids of a position."""
        return self.errors[0].num_ids

    def to_json(self) -> dict[str, Any]:
        """As the manifest records it."""
        head = {} if self.head_difference is None else {
            "head_difference": float(f"{self.head_difference:.4g}")
        }  # fmt: skip
        return {"reconstruction": [error.to_json() for error in self.errors], **head}


def measure_codec(
    codec: Codec,
    support: AnySupport,
    positions: Positions,
    head: LanguageModelHead | None,
) -> CodecLoss:
    """Reconstruct what a teacher said at a few positions.

    Args:
        codec: of the cache.
        support: ids that count.
        positions: N of them, with states, N > 0.
        head: the teacher's whole one, where states are cached; on the device of the positions.

    Raises:
        UserError: if logits are not finite, or states and head do not give the teacher's logits.
    """
    difference = None
    if head is not None:
        assert positions.states is not None, "states are cached with their head"
        difference = check_head(head, positions.states, positions.logits)
        codec = room_of(codec).with_head(codec, head.of_support(states_support(support)))
    return CodecLoss(
        errors=tuple(
            reconstruction_error(
                codec,
                support,
                positions.logits,
                temperature=temperature,
                states=positions.states,
                drawn_at=positions.drawn_at,
            )
            for temperature in measured_temperatures(codec)
        ),
        head_difference=difference,
    )


def measured_temperatures(codec: Codec) -> tuple[float, ...]:
    """Two temperatures of the codec's grid, 1 and 2 where it has them; fewer if it has fewer."""
    grid = room_of(codec).grid(codec) or USUAL_TEMPERATURES
    by_preference = [*(one for one in USUAL_TEMPERATURES if one in grid), *grid]
    return tuple(dict.fromkeys(by_preference))[:2]


def first_positions(samples: Sequence[PackedSample]) -> tuple[list[PackedSample], np.ndarray]:
    """The first samples, and the indices of the first positions that count among all of theirs."""
    chosen: list[PackedSample] = []
    counts = np.zeros(0, bool)
    for sample in samples:
        if counts.sum() >= NUM_POSITIONS:
            break
        chosen.append(sample)
        counts = np.concatenate([counts, sample.loss_mask])
    return chosen, np.flatnonzero(counts)[:NUM_POSITIONS]
