"""Where in a micro-batch a teacher spoke, and what the student says there.

A sample of a classifier has one such position, and the student gives its logits; one of a language
model has many, and the student gives the states that its head reads, so that the logits of all
positions never exist together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.cache.schema import NO_LABEL, TOP1_LOG_PROB
from teacher_cache.stages.heads import SINGLE
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.linear_head import linear_objective
from teacher_cache.stages.losses.objective import (
    LOSSES,
    ObjectiveTerms,
    OutputLoss,
    StepTotals,
    TargetsByPosition,
    confidence_weights,
)
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.training.batches import Batch, at


class View(Protocol):
    """How a micro-batch is read; the only part of the training that knows what a position is."""

    def totals(self, batch: Batch, *, conf_power: float) -> StepTotals:
        """What a micro-batch holds, counted before the student reads it."""
        ...

    def outputs(self, model: nn.Module, batch: Batch, requests: Mapping[str, bool]) -> Any:
        """The student's forward, asked for what the terms need besides."""
        ...

    def positions(self, outputs: Any, batch: Batch) -> Any:
        """What the objective reads of both."""
        ...

    def objective(
        self,
        student: Any,
        positions: Any,
        config: ObjectiveConfig,
        totals: StepTotals,
        *,
        step: int | None,
    ) -> ObjectiveTerms:
        """The objective's terms at these positions.

        Args:
            student: what is trained.
            positions: of `positions`.
            config: weights and temperature.
            totals: of the whole optimizer step.
            step: of the optimizer, for targets that are learned themselves; None: as they are
                without learning.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SamplePositions:
    """One position a sample: [B, C] logits of both sides; B is 0 in a share without samples."""

    logits: Tensor
    teacher_logits: Tensor
    labels: Tensor | None


class SamplesView:
    """A classifier's samples.

    Args:
        loss: of the kind of its head.
    """

    def __init__(self, loss: OutputLoss = LOSSES[SINGLE.name]):
        self._loss = loss

    def totals(self, batch: Batch, *, conf_power: float) -> StepTotals:
        """Samples, of which those in a labelled batch have a label but where it is missing."""
        logits = batch["teacher_logits"]
        weights = None
        if conf_power:
            weights = confidence_weights(self._loss.top1_log_prob(logits), conf_power)
        labels = batch.get("labels")
        num_labels = None if labels is None else int(self._loss.has_label(labels).sum())
        return StepTotals.of(
            len(logits), labeled=labels is not None, num_labels=num_labels, conf_weights=weights
        )

    def outputs(self, model: nn.Module, batch: Batch, requests: Mapping[str, bool]) -> Any:
        """Of ids and mask."""
        return model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **requests
        )

    def positions(self, outputs: Any, batch: Batch) -> SamplePositions:
        """Of the samples that are there: a share without samples reads one all the same."""
        teacher_logits = batch["teacher_logits"]
        return SamplePositions(
            logits=outputs.logits[: len(teacher_logits)],
            teacher_logits=teacher_logits,
            labels=batch.get("labels"),
        )

    def objective(
        self,
        student: Any,
        positions: SamplePositions,
        config: ObjectiveConfig,
        totals: StepTotals,
        *,
        step: int | None,
    ) -> ObjectiveTerms:
        """On the cached logits, at any temperature."""
        return self._loss.objective(
            positions.logits,
            positions.teacher_logits,
            positions.labels,
            config=config,
            totals=totals,
        )


class TargetsOf(Protocol):
    """What a language model's student is compared with."""

    def __call__(
        self,
        stored: Mapping[str, Tensor],
        *,
        temperature: float,
        num_outcomes: int,
        step: int | None,
    ) -> TargetsByPosition:
        """The teacher at stored positions.

        Args:
            stored: the codec's fields, [N, ...] each.
            temperature: at which both are compared.
            num_outcomes: of the student.
            step: as `View.objective` takes it.
        """
        ...

    @property
    def learned(self) -> Sequence[Tensor]:
        """Parameters that make targets and are learned themselves."""
        ...

    @property
    def max_logits(self) -> int:
        """Logits of the student that may exist at a time beside such targets."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenPositions:
    """What counts of a batch of packed text, N positions.

    Attributes:
        hidden: [N, D] what the student's head reads.
        stored: the codec's fields there.
        next_ids: [N], `NO_LABEL` where none is to be learned; None of an unlabelled batch.
        has_teacher: [N] bool, False where what is stored is of no account; None: all have one.
    """

    hidden: Tensor
    stored: dict[str, Tensor]
    next_ids: Tensor | None
    has_teacher: Tensor | None


class TokensView:
    """A language model's packed samples.

    Args:
        codec: of the cache.
        targets: from what it stored to what the student is compared with.
        support: [V] bool, the ids over which the two are compared; None: all.
    """

    def __init__(self, codec: Codec, targets: TargetsOf, support: Tensor | None):
        self._codec = codec
        self._targets = targets
        self._support = support

    def totals(self, batch: Batch, *, conf_power: float) -> StepTotals:
        """The counted positions."""
        mask = batch["loss_mask"]
        taught = mask & batch["has_teacher"] if "has_teacher" in batch else mask
        top1 = batch[TOP1_LOG_PROB][taught]
        labeled = "next_ids" in batch
        return StepTotals.of(
            len(top1),
            labeled=labeled,
            num_labels=int((mask & (batch["next_ids"] != NO_LABEL)).sum()) if labeled else None,
            conf_weights=confidence_weights(top1, conf_power) if conf_power else None,
        )

    def outputs(self, model: nn.Module, batch: Batch, requests: Mapping[str, bool]) -> Any:
        """States of packed rows, and no logits."""
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            seq_idx=batch["seq_idx"],
            use_cache=False,
            states_only=True,
            **requests,
        )

    def positions(self, outputs: Any, batch: Batch) -> TokenPositions:
        """Of the loss mask."""
        mask = batch["loss_mask"]  # none of a share without samples, which reads one all the same
        return TokenPositions(
            hidden=outputs.final_states[: len(mask)][mask],
            stored={spec.name: at(batch[spec.name], mask) for spec in self._codec.fields},
            next_ids=batch["next_ids"][mask] if "next_ids" in batch else None,
            has_teacher=batch["has_teacher"][mask] if "has_teacher" in batch else None,
        )

    def objective(
        self,
        student: Any,
        positions: TokenPositions,
        config: ObjectiveConfig,
        totals: StepTotals,
        *,
        step: int | None,
    ) -> ObjectiveTerms:
        """A chunk of positions at a time, on the student's head."""
        head: LinearHead = student.output_head
        weight, scale = head.weight, head.scale
        return linear_objective(
            positions.hidden if scale == 1 else positions.hidden * scale,
            weight,
            self._targets(
                positions.stored,
                temperature=config.temperature,
                num_outcomes=len(weight),
                step=step,
            ),
            positions.next_ids,
            config=config,
            totals=totals,
            bias=head.bias if head.bias is None or scale == 1 else head.bias * scale,
            soft_cap=head.soft_cap,
            top1_log_prob=positions.stored[TOP1_LOG_PROB] if config.conf_power else None,
            has_teacher=positions.has_teacher,
            support=self._support,
            learned=self._targets.learned,
            max_logits=self._targets.max_logits,
        )
