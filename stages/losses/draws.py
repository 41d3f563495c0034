"""A teacher known by draws from it: random sampling distillation (RS-KD), and distinct ids.

Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870. N draws with
replacement from a proposal, the teacher's distribution at the capture temperature or a flatter one
(which is the teacher at a higher temperature: `p_T0 ** tau`, normalised, is `p` at `T0 / tau`). A
draw counts with the ratio of teacher to proposal, so what is linear in the teacher's probabilities
(forward KL, cross-entropy) and its gradient are estimated without bias, at any temperature. Or
distinct ids, drawn with probabilities of their own: each stands for its probability over that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher_cache.cache.codecs.sampled import with_ghost
from teacher_cache.stages.losses.distributions import TeacherDistribution, head_log_probs, widened

MIN_EFFECTIVE_DRAWS = 10
"""Below this effective sample size the estimate is mostly noise, and a person should hear of it."""


def log_probs_at(
    log_probs: Tensor, *, temperature: float, lse: Tensor, new_temperature: float, new_lse: Tensor
) -> Tensor:
    """The teacher's log-probs of known outcomes at another temperature.

    `z - z_max = T0 (log p + lse_T0)` gives the logits back, up to the largest.

    Args:
        log_probs: [..., D] nats, at `temperature`; -inf stays -inf.
        temperature: T0.
        lse: [...] logsumexp of `(z - z_max) / T0` over the whole support.
        new_temperature: T.
        new_lse: [...] the same at T.

    Returns:
        [..., D] nats, float32 or wider.
    """
    relative = temperature * (widened(log_probs) + widened(lse).unsqueeze(-1))  # z - z_max
    return relative / new_temperature - widened(new_lse).unsqueeze(-1)


class Draws(ABC):
    """Draws from a teacher at some positions, by which its forward KL is estimated without bias.

    Attributes:
        temperature: at which teacher and student are compared.
    """

    temperature: float

    @abstractmethod
    def at_positions(self, where: Any) -> Draws:
        """The same at a part of the positions; `where` indexes their dimensions."""

    @abstractmethod
    def forward_kl(self, student_logits: Tensor, *, support: Tensor | None = None) -> Tensor:
        """[...] nats, an estimate whose gradient is unbiased."""

    @abstractmethod
    def coarse(self) -> TeacherDistribution:
        """The drawn outcomes as a head with exact probabilities, for all other divergences."""

    @abstractmethod
    def num_effective(self) -> Tensor:
        """[...] effective sample size."""

    def top_ids(self) -> Tensor | None:
        """[...] the teacher's most probable id; None where draws may have missed it."""
        return None


@dataclass(frozen=True, kw_only=True)
class SampledTargets(Draws):
    """The distinct ids that were drawn at each position, and how often.

    Attributes:
        ids: [..., D] int64, distinct along D; -1 for an empty slot.
        counts: [..., D] times drawn, 0 in an empty slot; their sum is N.
        log_probs: [..., D] nats, float32 or wider, the teacher's at `temperature`; exact, not the
            counts' shares. -inf in an empty slot.
        proposal_log_probs: [..., D] the same of the distribution that was drawn from, at any
            temperature; `log_probs` itself where that is the teacher's at `temperature`.
        temperature: at which teacher and student are compared.
        support_size: outcomes that could be drawn.

    Raises:
        ValueError: if the shapes disagree or `temperature` is not positive.
    """

    ids: Tensor
    counts: Tensor
    log_probs: Tensor
    proposal_log_probs: Tensor
    temperature: float
    support_size: int

    def __post_init__(self) -> None:
        """Broadcasting would hide a wrong shape."""
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, but must be positive")
        arrays = (self.ids, self.counts, self.log_probs, self.proposal_log_probs)
        shapes = [tuple(one.shape) for one in arrays]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"ids, counts, log-probs and proposal's log-probs of shapes {shapes}: all [..., D]"
            )

    def at_temperature(self, temperature: float, *, lse: Tensor, new_lse: Tensor) -> SampledTargets:
        """The same draws for another temperature; they keep their proposal.

        Args:
            temperature: the new one, T.
            lse: [...] logsumexp of `(z - z_max) / T0` over the support, T0 being the present one.
            new_lse: [...] the same at T.
        """
        return SampledTargets(
            ids=self.ids,
            counts=self.counts,
            log_probs=log_probs_at(
                self.log_probs,
                temperature=self.temperature,
                lse=lse,
                new_temperature=temperature,
                new_lse=new_lse,
            ),
            proposal_log_probs=self.proposal_log_probs,
            temperature=temperature,
            support_size=self.support_size,
        )

    def at_positions(self, where: Any) -> SampledTargets:
        """The same at a part of the positions; `where` indexes the dimensions before D."""
        return SampledTargets(
            ids=self.ids[where],
            counts=self.counts[where],
            log_probs=self.log_probs[where],
            proposal_log_probs=self.proposal_log_probs[where],
            temperature=self.temperature,
            support_size=self.support_size,
        )

    def weights(self) -> Tensor:
        """[..., D] what stands for the teacher's probabilities: `count / N * p / proposal`.

        1 in the mean over draws, not at each position; to renormalise would put a bias back. 0 in
        empty slots.
        """
        counts = self.counts.to(self.log_probs.dtype)
        share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
        return share * self._ratios()

    def num_effective(self) -> Tensor:
        """[...] effective sample size, `(sum w)^2 / sum w^2` over the N draws; 0 of none.

        N where the proposal is the teacher itself (Kong 1992).
        """
        ratios = self._ratios()
        counts = self.counts.to(ratios.dtype)
        squares = (counts * ratios.square()).sum(dim=-1)
        none = squares == 0
        return (counts * ratios).sum(dim=-1).square() / torch.where(none, 1.0, squares)

    def coarse(self) -> TeacherDistribution:
        """The distinct drawn ids as a head with their exact probabilities, the rest as its ghost.

        What divergences other than forward KL are taken on: they are not linear in the teacher's
        probabilities, so the counts would bias them. As the codec decodes them: the tail is what
        the head's probabilities leave of 1, known to their rounding only and never below it, but
        for a head of all that there is.
        """
        is_whole = (self.ids >= 0).sum(dim=-1) == self.support_size
        head, tail = with_ghost(self.log_probs, is_whole)
        return TeacherDistribution(
            log_probs=head, temperature=self.temperature, head_ids=self.ids, tail_log_prob=tail
        )

    def forward_kl(self, student_logits: Tensor, *, support: Tensor | None = None) -> Tensor:
        """`sampled_kl` from these draws."""
        return sampled_kl(student_logits, self, support=support)

    def _ratios(self) -> Tensor:
        """[..., D] of the teacher's probability to the proposal's; 0 in empty slots."""
        drawn = self.counts > 0
        log_p = torch.where(drawn, self.log_probs, -torch.inf)
        return (log_p - torch.where(drawn, self.proposal_log_probs, 0.0)).exp()


@dataclass(frozen=True, kw_only=True)
class WeightedTargets(Draws):
    """Distinct ids, and the mass that each stands for: an unbiased estimate of the distribution.

    Attributes:
        ids: [..., M] int64, distinct along M; -1 for an empty slot.
        log_probs: [..., M] nats, the teacher's, float32 or wider; -inf in an empty slot.
        shares: [..., M], what stands for the teacher's probabilities; 0 in an empty slot. They
            sum to 1 at the temperature of the draws, elsewhere in the mean.
        num_heads: [...], the first of them, which were certain to be kept.
        head: the same ids with their exact probabilities, the most probable first, and a ghost, at
            the temperature at which teacher and student are compared.

    Raises:
        ValueError: if the shapes disagree.
    """

    ids: Tensor
    log_probs: Tensor
    shares: Tensor
    num_heads: Tensor
    head: TeacherDistribution

    def __post_init__(self) -> None:
        """Broadcasting would hide a wrong shape."""
        arrays = (self.ids, self.log_probs, self.shares, self.head.log_probs)
        shapes = [tuple(one.shape) for one in arrays]
        if len(set(shapes)) > 1:
            raise ValueError(f"ids, log-probs, shares and a head of shapes {shapes}: all [..., M]")

    @property
    def temperature(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At which teacher and student are compared."""
        return self.head.temperature

    def at_positions(self, where: Any) -> WeightedTargets:
        """The same at a part of the positions; `where` indexes the dimensions before M."""
        return WeightedTargets(
            ids=self.ids[where],
            log_probs=self.log_probs[where],
            shares=self.shares[where],
            num_heads=self.num_heads[where],
            head=self.head.at_positions(where),
        )

    def weights(self) -> Tensor:
        """[..., M] the shares."""
        return self.shares

    def coarse(self) -> TeacherDistribution:
        """The head."""
        return self.head

    def forward_kl(self, student_logits: Tensor, *, support: Tensor | None = None) -> Tensor:
        """`sampled_kl` from these ids."""
        return sampled_kl(student_logits, self, support=support)

    def num_effective(self) -> Tensor:
        """[...], how many count: those of the head, and of the others `(sum w)^2 / sum w^2`.

        All M at the temperature of the draws, at which the others count alike.
        """
        places = torch.arange(self.ids.shape[-1], device=self.ids.device)
        others = torch.where(places < self.num_heads.unsqueeze(-1), 0.0, self.shares)
        squares = others.square().sum(dim=-1)
        none = squares == 0
        return self.num_heads + others.sum(dim=-1).square() / torch.where(none, 1.0, squares)

    def top_ids(self) -> Tensor:
        """[...] the first of the head, which is always kept."""
        return self.head.top_ids()


def sampled_kl(
    student_logits: Tensor,
    targets: SampledTargets | WeightedTargets,
    *,
    support: Tensor | None = None,
) -> Tensor:
    """Unbiased estimate of the forward KL, `sum w_i (log p_i - log q_i)` over the drawn ids.

    float32 or wider; not scaled: the objective applies T**2 once. A single estimate can be
    negative. Its gradient is unbiased too: `(sum w) q - w`, over T.

    Args:
        student_logits: [..., V], before temperature; -inf excludes an outcome. inf comes back
            where a drawn one is excluded.
        targets: of the same positions.
        support: [V] bool, False for ids that are no outcome at all.

    Returns:
        [...] nats.

    Raises:
        ValueError: if the positions disagree.
    """
    if student_logits.shape[:-1] != targets.ids.shape[:-1]:
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} against drawn ids of shape "
            f"{tuple(targets.ids.shape)}: they must agree but for the last dimension"
        )
    log_q = head_log_probs(student_logits, targets.ids, targets.temperature, support)
    return kl_of_drawn(log_q, targets)


def kl_of_drawn(log_q: Tensor, targets: SampledTargets | WeightedTargets) -> Tensor:
    """`sampled_kl`, of the student's log-probs of the drawn ids and of all others, [..., D+1]."""
    log_q = log_q[..., :-1]
    weights = targets.weights()
    drawn = weights != 0  # as in `kl`: 0 * inf is NaN
    log_p = torch.where(drawn, targets.log_probs, 0.0)
    log_q = torch.where(drawn, log_q, 0.0)
    return torch.where(drawn, weights * (log_p - log_q), 0.0).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class MappedDraws(Draws):
    """The student's ids that were drawn at each position, and how much each counts.

    Attributes:
        ids: [..., D] int64, distinct along D; -1 for an empty slot.
        weights: [..., D] what stands for the teacher's probabilities, as `SampledTargets.weights`;
            0 in an empty slot.
        ghost_weight: [...] the same of all draws without an id.
        information: [...] nats, `sum w log p` of the draws that have an id. No gradient depends on
            it; exact where one of the teacher's ids maps to each.
        ghost_information: [...] the same of those without.
        reached: [V] bool, the student's ids that any of the teacher's maps to.
        effective_draws: [...] effective sample size.
        head: the drawn ids with their exact probabilities and a ghost, for other divergences than
            the forward KL.
    """

    ids: Tensor
    weights: Tensor
    ghost_weight: Tensor
    information: Tensor
    ghost_information: Tensor
    reached: Tensor
    effective_draws: Tensor
    head: TeacherDistribution

    @property
    def temperature(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """At which teacher and student are compared."""
        return self.head.temperature

    def forward_kl(self, student_logits: Tensor, *, support: Tensor | None = None) -> Tensor:
        """`mapped_draws_kl` from these draws."""
        return mapped_draws_kl(student_logits, self, support=support)

    def coarse(self) -> TeacherDistribution:
        """The head."""
        return self.head

    def num_effective(self) -> Tensor:
        """As it was before the draws were mapped."""
        return self.effective_draws

    def at_positions(self, where: Any) -> MappedDraws:
        """The same at a part of the positions; `where` indexes the dimensions before D."""
        return MappedDraws(
            ids=self.ids[where],
            weights=self.weights[where],
            ghost_weight=self.ghost_weight[where],
            information=self.information[where],
            ghost_information=self.ghost_information[where],
            reached=self.reached,
            effective_draws=self.effective_draws[where],
            head=self.head.at_positions(where),
        )


def mapped_draws_kl(
    student_logits: Tensor, targets: MappedDraws, *, support: Tensor | None = None
) -> Tensor:
    """Estimate of the forward KL over the student's ids and the ghost, from draws.

    The gradient is unbiased; the value is where `information` is exact. Not scaled: the objective
    applies T**2 once. Where every id of the student's is reached the ghost is no outcome of its,
    and its draws count for nothing, as missing ids do.

    Args:
        student_logits: [..., V], before temperature.
        targets: of the same positions.
        support: [V] bool, False for ids that are no outcome at all.

    Returns:
        [...] nats, float32 or wider.

    Raises:
        ValueError: if the positions or the outcomes disagree.
    """
    shape, num = student_logits.shape[:-1], student_logits.shape[-1]
    if shape != targets.ids.shape[:-1] or targets.reached.shape != (num,):
        raise ValueError(
            f"student logits of shape {tuple(student_logits.shape)} against drawn ids of shape "
            f"{tuple(targets.ids.shape)} of {tuple(targets.reached.shape)} outcomes"
        )
    log_q = head_log_probs(student_logits, targets.ids, targets.temperature, support)[..., :-1]
    drawn = targets.weights != 0  # as in `kl`: 0 * inf is NaN
    cross = torch.where(drawn, targets.weights * torch.where(drawn, log_q, 0.0), 0.0).sum(dim=-1)
    value = targets.information - cross
    has_ghost = targets.ghost_weight != 0
    if not has_ghost.any():
        return value
    outcomes = torch.ones_like(targets.reached) if support is None else support
    unreached = outcomes & ~targets.reached
    if not unreached.any():
        return value
    scaled = widened(student_logits[has_ghost]) / targets.temperature
    of_all = scaled.masked_fill(~outcomes, -torch.inf).logsumexp(dim=-1)
    log_ghost = scaled[:, unreached].logsumexp(dim=-1) - of_all
    ghost = targets.ghost_information[has_ghost] - targets.ghost_weight[has_ghost] * log_ghost
    return value.index_put((has_ghost,), ghost, accumulate=True)
