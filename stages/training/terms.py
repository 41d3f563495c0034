"""What a student is trained on beside its distillation objective: one class a term.

A term says what it is called in the log, what it weighs, what it counts and what a micro-batch adds
to it. Adding one is a class here, and its weight among the settings of the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.chunk_likelihood import (
    DEFAULT_TAU,
    chunk_likelihood_loss,
    chunk_log_likelihoods,
)
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.layers import pooled_distance
from teacher_cache.stages.losses.linear_head import linear_next_log_probs
from teacher_cache.stages.losses.objective import StepTotals
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.training.layers import Stage, Transfer

Kind = Literal["labeled", "unlabeled", "all"]
"""Which steps a term is a mean over in the log: those with samples of that kind, or all."""


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A micro-batch, and what the student made of it.

    Attributes:
        student: what is trained, as it is, not as a data-parallel wrapper.
        outputs: of its forward, with what the terms asked for.
        batch: as collated.
        positions: what the view makes of both.
        step: of the optimizer, counted from 0.
    """

    student: nn.Module
    outputs: Any
    batch: dict[str, Any]
    positions: Any
    step: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one micro-batch adds to a term of its optimizer step.

    Attributes:
        name: in the log.
        kind: of the steps that the log's mean is over.
        weight: in the loss.
        value: scalar, before the weight; carries the gradient.
    """

    name: str
    kind: Kind
    weight: float
    value: Tensor


class Term(ABC):
    """One of the terms.

    Attributes:
        stage: in which stage of a staged training it is learned.
        is_held_out: whether held-out samples are measured by it, too.
        requests: what the student's forward is asked for.
    """

    stage: ClassVar[Stage] = "others"
    is_held_out: ClassVar[bool] = True
    requests: ClassVar[Mapping[str, bool]] = MappingProxyType({})

    @abstractmethod
    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """What a micro-batch holds of what the term is a mean over."""

    @abstractmethod
    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """What a micro-batch adds.

        Args:
            heard: the micro-batch; of a share without samples, one that is read all the same.
            totals: of the whole optimizer step.
        """


@dataclass(frozen=True, kw_only=True)
class NextTokens(Term):
    """A classifier's student also predicts each sample's next tokens, mean over all of them.

    Attributes:
        weight: in the loss.
    """

    weight: float
    requests = MappingProxyType({"next_token_loss": True})

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """The tokens that are predicted."""
        return StepTotals(num_next_tokens=student.num_next_tokens(batch["attention_mask"]))

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """Its cross-entropy, nats; a step of samples of one token has none, and a sum of 0."""
        is_real = len(heard.batch["teacher_logits"]) > 0
        total = heard.outputs.next_token_loss_sum * is_real
        value = total / max(1, totals.num_next_tokens)
        return Share(name="lm", kind="all", weight=self.weight, value=value)


@dataclass(frozen=True, kw_only=True)
class PooledStates(Term):
    """The student's pooled state, projected, against the teacher's: mean over all samples.

    Attributes:
        weight: in the loss; no confidence weights, no T^2.
    """

    weight: float

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """Samples, which the objective counts."""
        return StepTotals()

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """The cosine distance, 0 to 2."""
        teacher = heard.batch["teacher_pooled"]
        total = pooled_distance(heard.outputs.projected[: len(teacher)], teacher).sum()
        value = total / (totals.num_labeled + totals.num_unlabeled)
        return Share(name="pooled", kind="all", weight=self.weight, value=value)


WEIGHED: Mapping[str, Callable[..., Term]] = MappingProxyType(
    {"lm_weight": NextTokens, "pooled_weight": PooledStates}
)
"""By its weight among the settings, each term that needs no more, in the order of their sum."""


def weighed(config: ObjectiveConfig) -> list[Term]:
    """Those whose weight is not 0; of which task a weight is, its own field says."""
    weights = {option: getattr(config, option) for option in WEIGHED}
    return [WEIGHED[option](weight=weight) for option, weight in weights.items() if weight]


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(Term):
    """The student's mixing matrices against the teacher's maps: mean over rows and layers.

    Attributes:
        transfer: with maps.
    """

    transfer: Transfer
    stage = "attention"
    is_held_out = False
    requests = MappingProxyType({"output_mixers": True})

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """Rows of maps."""
        return StepTotals(num_attention_rows=self.transfer.num_attention_rows(batch))

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """The distance that the settings chose."""
        total = self.transfer.attention_distances(heard.outputs.mixers, heard.batch)
        value = total / max(1, totals.num_attention_rows)
        weight = self.transfer.config.attention_weight
        return Share(name=self.stage, kind="all", weight=weight, value=value)


@dataclass(frozen=True, kw_only=True)
class HiddenStates(Term):
    """The student's layers' outputs, projected, against the teacher's: mean over states.

    Attributes:
        transfer: with hidden states.
    """

    transfer: Transfer
    stage = "hidden"
    is_held_out = False

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """States of positions and layers."""
        return StepTotals(num_hidden_states=self.transfer.num_hidden_states(batch))

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """The cosine distance."""
        total = self.transfer.hidden_distances(heard.outputs.projected_hidden, heard.batch)
        value = total / max(1, totals.num_hidden_states)
        weight = self.transfer.config.hidden_weight
        return Share(name=self.stage, kind="all", weight=weight, value=value)


@dataclass(frozen=True, kw_only=True)
class LayersAlone(Term):
    """Each layer fed the teacher's state before it, against the one behind it: mean over states.

    Bick et al. 2024, section 3.2, arXiv:2408.10189.

    Attributes:
        transfer: with hidden states of neighbouring layers.
    """

    transfer: Transfer
    stage = "hidden"
    is_held_out = False

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """States of positions and layers."""
        return StepTotals(num_hidden_states=self.transfer.num_hidden_states(batch))

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """How far what they add is from what the teacher's add."""
        student: Any = heard.student
        total = self.transfer.distances_alone(student.backbone, heard.batch)
        value = total / max(1, totals.num_hidden_states)
        weight = self.transfer.config.hidden_weight
        return Share(name="layers", kind="all", weight=weight, value=value)


@dataclass(frozen=True, kw_only=True)
class Chunks(Term):
    """Likelihoods of chunks of text against the teacher's, mean over the chunks of each kind.

    The weight is that of the distillation term. The loss is multiplied by `tau`, of which its
    gradient is a fraction, as a distribution's is by T^2.

    Attributes:
        objective: whose weights of the distillation term these are.
    """

    objective: ObjectiveConfig

    def counted(self, student: Any, batch: Mapping[str, Tensor]) -> StepTotals:
        """The chunks."""
        num = int(batch["chunk_mask"].sum())
        is_labeled = "next_ids" in batch
        return (
            StepTotals(num_chunks_labeled=num)
            if is_labeled
            else StepTotals(num_chunks_unlabeled=num)
        )

    def share(self, heard: Heard, totals: StepTotals) -> Share:
        """The chunks' loss, times `tau`."""
        is_labeled = "next_ids" in heard.batch
        value = self.loss_sum(heard) / max(1, totals.num_chunks(labeled=is_labeled))
        if is_labeled:
            return Share(name="chunks", kind="labeled", weight=self.objective.alpha, value=value)
        weight = self.objective.unlabeled_alpha
        return Share(name="chunks_unlabeled", kind="unlabeled", weight=weight, value=value)

    def loss_sum(self, heard: Heard) -> Tensor:
        """Of a micro-batch's chunks, times `tau`."""
        batch = heard.batch
        student: Any = heard.student
        mask = batch["loss_mask"]
        hidden, weight = _one_matrix(heard.positions.hidden, student.output_head)
        found = linear_next_log_probs(hidden, weight, batch["following_ids"][mask])
        log_probs = found.new_zeros(mask.shape).masked_scatter(mask, found)  # [B, S]
        teacher = batch["teacher_chunks"].to(found.dtype)
        likelihoods = chunk_log_likelihoods(
            log_probs, batch["chunk_index"], num_chunks=teacher.shape[1]
        )
        losses = chunk_likelihood_loss(likelihoods, teacher, batch["chunk_mask"], tau=DEFAULT_TAU)
        return DEFAULT_TAU * losses.sum()


def _one_matrix(hidden: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
    """States and a head without a bias that give the student's logits: [N, D'] and [V, D'].

    Raises:
        UserError: for a head with a soft cap.
    """
    if head.soft_cap is not None:
        raise UserError(
            "--align spans serves no student whose head has a soft cap: give --align map"
        )
    hidden, weight = hidden * head.scale, head.weight
    if head.bias is None:
        return hidden, weight
    ones = hidden.new_full((len(hidden), 1), head.scale)
    return torch.cat([hidden, ones], dim=1), torch.cat([weight, head.bias[:, None]], dim=1)
