"""The distillation objective: what one micro-batch adds to the loss of its optimizer step.

A sample has positions at which a teacher spoke: a classifier's has one, a language model's many.
Labelled positions cost `alpha T^2 KD + (1 - alpha) CE`, unlabelled ones `unlabeled_alpha T^2 KD`
(Hinton et al. 2015, section 2, arXiv:1503.02531). Each term is a mean over its own counted
positions of the whole optimizer step, all micro-batches and ranks, so a micro-batch adds `sum over
its positions / count of the step`, and the sum over micro-batches is the step's loss however the
step was cut.

What a classifier's outputs cost depends on the kind of its head (`stages/heads.py`): one of several
classes is compared as a distribution over them. Each of several labels is an outcome of two, and a
sample costs the mean over its labels: binary divergences at the temperature, with T^2 outside as
for classes (the gradient of one label's term falls with T^2 likewise), and binary cross-entropies
(Yang et al. 2023, arXiv:2308.06453, which sums them). A number costs its squared distance from the
teacher's and from the label, without a temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.schema import NO_LABEL
from teacher_cache.stages.heads import Head, MultiLabel, Regression, SingleLabel
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.distributions import TeacherDistribution, widened
from teacher_cache.stages.losses.divergences import chosen_measure, divergence
from teacher_cache.stages.losses.draws import Draws


@torch.no_grad()
def top1_log_prob(teacher_logits: Tensor) -> Tensor:
    """Log-prob of the teacher's most probable outcome at T = 1.

    Args:
        teacher_logits: [..., C], before temperature.

    Returns:
        [...] nats, float32 or wider, without gradient.
    """
    return torch.log_softmax(widened(teacher_logits), dim=-1).amax(dim=-1)


@torch.no_grad()
def confidence_weights(top1_log_prob: Tensor, conf_power: float) -> Tensor:
    """Raw weights, `max_c p(c) ** conf_power` at T = 1, whatever the distillation temperature.

    Raw: the objective divides them by their mean over the optimizer step. At `conf_power` 0 every
    weight is 1, but a product with 1 and a division by a sum of ones need not give the same bits
    as no weighting, so callers skip the weighting instead of calling this.

    Args:
        top1_log_prob: [...] nats, of the full distribution; float16 as cached will do.
        conf_power: at least 0.

    Returns:
        [...] in (0, 1], float32 or wider, without gradient.

    Raises:
        ValueError: if `conf_power` is negative.
    """
    if conf_power < 0:
        raise ValueError(f"conf_power is {conf_power}, but must be at least 0")
    return (conf_power * widened(top1_log_prob)).exp()


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What one optimizer step holds, over all its micro-batches and ranks.

    Known from the cache before the step's first backward. Totals of parts add up:
    `sum((StepTotals.of(...), ...), StepTotals())`, and an all-reduce of these numbers.

    What is counted are positions at which a teacher spoke: one in each of a classifier's samples.

    Attributes:
        num_labeled: those of the corpus whose labels are learned, too.
        num_unlabeled: those of others.
        conf_weight_sum_labeled: sum of the labelled ones' raw confidence weights; unused when
            `conf_power` is 0.
        conf_weight_sum_unlabeled: the same for the unlabelled ones.
        num_labels: positions that have a label to learn, a class or a next token; of the labelled
            kind, with a teacher or without.
        num_next_tokens: tokens of both kinds that a classifier predicts besides.
        num_attention_rows: rows of attention maps that are matched, over all layers, of both kinds.
        num_hidden_states: hidden states that are matched, over all layers, of both kinds.
        num_chunks_labeled: chunks of text whose likelihoods are compared, in labelled samples.
        num_chunks_unlabeled: the same in unlabelled ones.
    """

    num_labeled: int = 0
    num_unlabeled: int = 0
    conf_weight_sum_labeled: float = 0.0
    conf_weight_sum_unlabeled: float = 0.0
    num_labels: int = 0
    num_next_tokens: int = 0
    num_attention_rows: int = 0
    num_hidden_states: int = 0
    num_chunks_labeled: int = 0
    num_chunks_unlabeled: int = 0

    def __add__(self, other: StepTotals) -> StepTotals:
        """The totals of both parts together."""
        names = [one.name for one in fields(self)]
        return StepTotals(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def of(
        cls,
        num: int,
        *,
        labeled: bool,
        num_labels: int | None = None,
        conf_weights: Tensor | None = None,
    ) -> StepTotals:
        """The totals of one micro-batch.

        Args:
            num: positions at which there is a teacher.
            labeled: which kind the batch is; all its samples are of one kind.
            num_labels: positions with a label to learn; of an unlabelled batch there is none, of a
                labelled one every counted position has one unless this says otherwise.
            conf_weights: [num] raw, the very ones that the objective will apply; None where
                `conf_power` is 0.
        """
        # Summed in float64 on the CPU, since not every device has it.
        weight_sum = 0.0 if conf_weights is None else conf_weights.cpu().double().sum().item()
        if not labeled:
            return cls(num_unlabeled=num, conf_weight_sum_unlabeled=weight_sum)
        return cls(
            num_labeled=num,
            conf_weight_sum_labeled=weight_sum,
            num_labels=num if num_labels is None else num_labels,
        )

    def num(self, *, labeled: bool) -> int:
        """How many there are of one kind."""
        return self.num_labeled if labeled else self.num_unlabeled

    def num_chunks(self, *, labeled: bool) -> int:
        """How many chunks of text of one kind."""
        return self.num_chunks_labeled if labeled else self.num_chunks_unlabeled

    def check_covers(self, num: int, *, labeled: bool) -> None:
        """Refuse a batch that the step does not count.

        Raises:
            ValueError: if the step counts fewer of that kind than `num`.
        """
        if self.num(labeled=labeled) < num:
            raise ValueError(f"a batch of {num} in a step that counts {self.num(labeled=labeled)}")

    def mean(
        self, values: Tensor, weights: Tensor | None, *, labeled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A batch's share of the step's mean of a distillation term over one kind.

        Args:
            values: [B], one of each of the batch's.
            weights: [B] raw confidence weights, or None where `conf_power` is 0. Normalised by
                their mean over the step's samples *of the same kind*.
            labeled: the batch's kind.

        Returns:
            Its share of the mean, and of the mean raw weight where there are weights.

        Raises:
            UserError: if `conf_power` is so high that nothing keeps any weight.
        """
        # A step of nothing of that kind has a sum of 0.
        num = max(1, self.num(labeled=labeled))
        if weights is None:
            return values.sum() / num, None
        weight_sum = self.conf_weight_sum_labeled if labeled else self.conf_weight_sum_unlabeled
        if not len(values):
            weight_sum = 1.0
        if not weight_sum > 0:
            raise UserError(
                "The confidence weights leave nothing in a step any weight: the teacher's top "
                "probabilities to the power of --conf-power underflow; choose a lower --conf-power"
            )
        # sum_i (w_i / mean w) kl_i / num: the counts cancel.
        return (weights * values).sum() / weight_sum, weights.sum() / num


Targets = TeacherDistribution | Draws
"""A teacher at some positions: its distribution, or draws from it."""


class TargetsByPosition(Protocol):
    """A teacher's targets, or what makes them of a few positions at a time."""

    def at_positions(self, where: Any, /) -> Targets:
        """Those of some of the positions."""
        ...


@dataclass(frozen=True, kw_only=True)
class ObjectiveTerms:
    """One micro-batch's share of its optimizer step; sum each over the micro-batches for the step.

    All are scalars over the counts of the step, not of the micro-batch. Only `loss` carries a
    gradient; the others are for the log, and `ce` and `kd` are given even where their weight is 0.

    Attributes:
        loss: `alpha T^2 kd + (1 - alpha) ce`, or `unlabeled_alpha T^2 kd`.
        ce: cross-entropy to the labels, nats; None on an unlabelled batch.
        kd: distillation term, nats, confidence-weighted when that is on, before alpha and T^2.
        conf_w: mean raw confidence weight; None when weighting is off.
        agreement: share of the teacher's positions at which student and teacher hold the same
            outcome for the most probable; None for draws that may have missed it.
        effective_draws: mean effective sample size of draws, of N; below `MIN_EFFECTIVE_DRAWS`
            their estimates are mostly noise. None for others.
    """

    loss: Tensor
    ce: Tensor | None
    kd: Tensor
    conf_w: Tensor | None
    agreement: Tensor | None
    effective_draws: Tensor | None


def smoothed_cross_entropy(
    student_logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.1
) -> Tensor:
    """Cross-entropy to hard labels of which a part is spread evenly over all classes.

    At T = 1, float32 or wider (Szegedy et al. 2016, section 7, arXiv:1512.00567).

    Args:
        student_logits: [N, V], before temperature.
        labels: [N] int64 in 0..V-1; a position of label `NO_LABEL` costs 0.
        label_smoothing: the part that is spread, in [0, 1).

    Returns:
        [N] nats.
    """
    return F.cross_entropy(
        widened(student_logits),
        labels,
        label_smoothing=label_smoothing,
        ignore_index=NO_LABEL,
        reduction="none",
    )


def weighted_sum(weighted: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Of the terms whose weight is not 0; the others are left out, not multiplied by 0."""
    parts = [weight * term for weight, term in weighted if weight]
    return sum(parts[1:], start=parts[0])


def distillation_objective(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    top1_log_prob: Tensor | None = None,
    has_teacher: Tensor | None = None,
    support: Tensor | None = None,
) -> ObjectiveTerms:
    """One micro-batch's share of the optimizer step's loss.

    Give the counted positions only, no padding and no prompts: a head that runs on them alone is
    the cheapest mask. A term whose weight is 0 is left out, not multiplied by 0: an infinite or NaN
    term with weight 0 changes neither the loss nor a gradient.

    Where the maths leave a choice: confidence weights are normalised by their mean over the step's
    positions *of the same kind*, so that turning the weighting on moves attention within the
    labelled and within the unlabelled ones, but not between the two. They are taken at T = 1 and
    stand outside T^2. Under data parallelism, which averages gradients over ranks, the caller
    multiplies `loss` by the number of ranks, since `totals` counts the positions of all of them.

    Args:
        student_logits: [N, V], before temperature; carry the gradient.
        targets: the teacher's, at N positions and at `config.temperature`.
        labels: [N] int64, classes or next tokens, `NO_LABEL` where there is none to learn; None for
            an unlabelled batch.
        config: the weights of the terms.
        totals: of the whole optimizer step that this micro-batch belongs to.
        top1_log_prob: [N] nats of the teacher's most probable outcome at T = 1; given where
            `conf_power` is above 0.
        has_teacher: [N] bool, False where a position has a label but no teacher; what `targets`
            holds there is not read. None: all have one.
        support: [V] bool, over which teacher and student are compared. The cross-entropy is over
            all V: it teaches rows that pad a table that they never come.

    Raises:
        ValueError: if shapes or temperatures disagree, if `totals` does not cover this batch, if
            `top1_log_prob` is missing, or for an unlabelled batch when `unlabeled_alpha` is 0,
            since nothing is to be learned from it.
        UserError: if `conf_power` is so high that no position keeps any weight.
    """
    labeled = labels is not None
    check_objective(student_logits, targets, labels, config, top1_log_prob, has_teacher)
    if has_teacher is not None:
        targets = targets.at_positions(has_teacher)
        top1_log_prob = None if top1_log_prob is None else top1_log_prob[has_teacher]
    taught = student_logits if has_teacher is None else student_logits[has_teacher]
    totals.check_covers(len(taught), labeled=labeled)

    smoothing, per_position = config.label_smoothing, None
    if labels is not None:
        per_position = smoothed_cross_entropy(student_logits, labels, label_smoothing=smoothing)
    top_ids = targets.top_ids()
    return objective_of_distances(
        teacher_distances(taught, targets, config, support),  # [N with a teacher]
        per_position,
        None if top_ids is None else taught.argmax(dim=-1) == top_ids,
        targets,
        config=config,
        totals=totals,
        top1_log_prob=top1_log_prob,
    )


def objective_of_distances(
    distances: Tensor,
    cross_entropies: Tensor | None,
    agrees: Tensor | None,
    targets: Targets | None,
    *,
    config: ObjectiveConfig,
    totals: StepTotals,
    top1_log_prob: Tensor | None,
) -> ObjectiveTerms:
    """`distillation_objective` from what each position costs.

    Args:
        distances: [M] from the teacher, at the positions that have one.
        cross_entropies: [N] to the labels, 0 where there is none to learn; None of an unlabelled
            batch.
        agrees: [M] bool, whether both hold the same outcome for the most probable, or the share of
            a position's labels of which they say the same; or None.
        targets: at the M positions; None where they are no one distribution.
        config: the weights of the terms.
        totals: of the whole optimizer step.
        top1_log_prob: [M], given where `conf_power` is above 0.
    """
    labeled = cross_entropies is not None
    weights = None
    if config.conf_power and top1_log_prob is not None:
        weights = confidence_weights(top1_log_prob, config.conf_power)
    kd, conf_w = totals.mean(distances, weights, labeled=labeled)
    kd_weight = config.alpha if labeled else config.unlabeled_alpha
    weighted = [(kd_weight * config.temperature**2, kd)]
    ce = None
    if cross_entropies is not None:
        ce = cross_entropies.sum() / max(1, totals.num_labels)
        weighted.append((1 - config.alpha, ce))
    num = max(1, totals.num(labeled=labeled))
    return ObjectiveTerms(
        loss=weighted_sum(weighted),
        ce=None if ce is None else ce.detach(),
        kd=kd.detach(),
        conf_w=conf_w,
        agreement=None if agrees is None else agrees.sum() / num,
        effective_draws=targets.num_effective().sum() / num if isinstance(targets, Draws) else None,
    )


def teacher_distances(
    student_logits: Tensor, targets: Targets, config: ObjectiveConfig, support: Tensor | None
) -> Tensor:
    """How far the student is from its teacher at each position, [N].

    Draws estimate the forward KL without bias, all else needs a distribution.

    Args:
        student_logits: [N, V], before temperature.
        targets: the teacher's, at the temperature at which the two are compared.
        config: names the divergence.
        support: [V] bool, over which they are compared; None: all.
    """
    if isinstance(targets, Draws):
        if config.divergence == "kl":
            return targets.forward_kl(student_logits, support=support)
        targets = targets.coarse()
    return divergence(student_logits, targets, chosen_measure(config), support=support)


def check_objective(
    student_logits: Tensor,
    targets: Targets,
    labels: Tensor | None,
    config: ObjectiveConfig,
    top1_log_prob: Tensor | None,
    has_teacher: Tensor | None,
) -> None:
    """Refuse what `distillation_objective` refuses.

    Raises:
        ValueError: as it says.
    """
    num = student_logits.shape[:1]
    for name, one in (
        ("labels", labels),
        ("top1_log_prob", top1_log_prob),
        ("has_teacher", has_teacher),
    ):
        if one is not None and one.shape != num:
            raise ValueError(
                f"{name} of shape {tuple(one.shape)} for student logits of shape "
                f"{tuple(student_logits.shape)}: expected [N] and [N, V]"
            )
    if targets.temperature != config.temperature:
        raise ValueError(
            f"the targets are at temperature {targets.temperature}, the objective at "
            f"{config.temperature}"
        )
    if labels is None and not config.unlabeled_alpha:
        raise ValueError("an unlabelled batch has no loss when unlabeled_alpha is 0")
    if config.conf_power and top1_log_prob is None:
        raise ValueError("conf_power is on, so the teacher's top1_log_prob is needed")


class OutputLoss(ABC):
    """What outputs [B, C] of one kind cost."""

    @abstractmethod
    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """[B] nats at T = 1, by which `conf_power` weighs a sample.

        Raises:
            ValueError: where outputs are no probabilities.
        """

    @abstractmethod
    def has_label(self, labels: Tensor) -> Tensor:
        """[B] bool, of a batch's labels."""

    @abstractmethod
    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """[B] costs of labels, all of which are there."""

    def hard_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of what labels cost."""
        return self.hard(logits, labels).sum()

    @abstractmethod
    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """One micro-batch's share of the optimizer step's loss.

        Args:
            logits: [B, C] of the student; carry the gradient.
            teacher_logits: [B, C].
            labels: [B, ...] as the head's `batched` has them; None of an unlabelled batch.
            config: weights and temperature.
            totals: of the whole optimizer step.
        """


class OneOfSeveral(OutputLoss):
    """Classes: `distillation_objective`."""

    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """Of the teacher's class."""
        return top1_log_prob(teacher_logits)

    def has_label(self, labels: Tensor) -> Tensor:
        """A class."""
        return labels != NO_LABEL

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropies."""
        return F.cross_entropy(
            widened(logits), labels, reduction="none", label_smoothing=label_smoothing
        )

    def hard_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As torch adds them up, whose last place differs from that of a sum behind."""
        return F.cross_entropy(widened(logits), labels, reduction="sum")

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """On the cached logits, at any temperature."""
        return distillation_objective(
            logits,
            TeacherDistribution.from_logits(teacher_logits, config.temperature),
            labels,
            config=config,
            totals=totals,
            top1_log_prob=self.top1_log_prob(teacher_logits) if config.conf_power else None,
        )


class AnyOfSeveral(OutputLoss):
    """Labels, each there or not."""

    @torch.no_grad()
    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """Of the teacher's answer to each label, mean over labels."""
        return F.logsigmoid(widened(teacher_logits).abs()).mean(dim=-1)

    def has_label(self, labels: Tensor) -> Tensor:
        """What labels a sample has is known for all of them or none."""
        return (labels != NO_LABEL).all(dim=-1)

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Binary cross-entropies, mean over labels; smoothed ones lie between 0 and 1."""
        wide = widened(logits)
        smoothed = labels.to(wide.dtype) * (1 - label_smoothing) + label_smoothing / 2
        costs = F.binary_cross_entropy_with_logits(wide, smoothed, reduction="none")
        return costs.mean(dim=-1)

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """The chosen divergence of two outcomes, mean over labels."""
        totals.check_covers(len(logits), labeled=labels is not None)
        log_p, log_q = (_of_two(one, config.temperature) for one in (teacher_logits, logits))
        weights = self.top1_log_prob(teacher_logits) if config.conf_power else None
        agrees = ((logits > 0) == (teacher_logits > 0)).float().mean(dim=-1)
        return objective_of_distances(
            chosen_measure(config)(log_p, log_q).mean(dim=-1),
            _costs_of_known(self, logits, labels, config.label_smoothing),
            agrees,
            None,
            config=config,
            totals=totals,
            top1_log_prob=weights,
        )


class ANumber(OutputLoss):
    """A number a sample, the only output."""

    def top1_log_prob(self, teacher_logits: Tensor) -> Tensor:
        """A number has none."""
        raise ValueError("a number has no probability to weigh it by")

    def has_label(self, labels: Tensor) -> Tensor:
        """A number."""
        return ~labels.isnan()

    def hard(self, logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Squared errors."""
        wide = widened(logits).squeeze(-1)
        return (wide - labels.to(wide.dtype)).square()

    def objective(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None,
        *,
        config: ObjectiveConfig,
        totals: StepTotals,
    ) -> ObjectiveTerms:
        """Squared distances from the teacher's number."""
        totals.check_covers(len(logits), labeled=labels is not None)
        plain = config.model_copy(update={"temperature": 1.0})  # numbers are not softened
        return objective_of_distances(
            (widened(logits) - teacher_logits).square().squeeze(-1),
            _costs_of_known(self, logits, labels, 0.0),
            None,
            None,
            config=plain,
            totals=totals,
            top1_log_prob=None,
        )


def _of_two(logits: Tensor, temperature: float) -> Tensor:
    """[B, C, 2] log-probs that a label is there, and that it is not; nats."""
    scaled = widened(logits) / temperature
    return torch.stack([F.logsigmoid(scaled), F.logsigmoid(-scaled)], dim=-1)


def _costs_of_known(
    loss: OutputLoss, logits: Tensor, labels: Tensor | None, label_smoothing: float
) -> Tensor | None:
    """[B], 0 where there is no label; None of an unlabelled batch."""
    if labels is None:
        return None
    is_known = loss.has_label(labels)
    costs = loss.hard(logits[is_known], labels[is_known], label_smoothing=label_smoothing)
    return costs.new_zeros(len(labels)).masked_scatter(is_known, costs)


LOSSES: Mapping[str, OutputLoss] = MappingProxyType(
    {
        SingleLabel.name: OneOfSeveral(),
        MultiLabel.name: AnyOfSeveral(),
        Regression.name: ANumber(),
    }
)


def loss_of(head: Head) -> OutputLoss:
    """What outputs of this kind cost."""
    return LOSSES[head.name]
