"""What one micro-batch teaches: the objective, and the terms beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import ObjectiveTerms, StepTotals, weighted_sum
from teacher_cache.stages.training.batches import Batch
from teacher_cache.stages.training.layers import ALL, Schedule
from teacher_cache.stages.training.terms import Heard, Share, Term
from teacher_cache.stages.training.views import View


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How batches of one kind of cache are learned from.

    Attributes:
        view: where in a batch a teacher spoke.
        objective: weights of the distillation objective.
        terms: what else is learned, in the order in which the loss adds them up.
        schedule: what each step learns of them.
    """

    view: View
    objective: ObjectiveConfig
    terms: Sequence[Term] = ()
    schedule: Schedule = field(default_factory=Schedule)

    @property
    def held_out_terms(self) -> list[Term]:
        """Those by which held-out samples are measured, too."""
        return [term for term in self.terms if term.is_held_out]

    def totals(self, student: Any, batch: Batch, terms: Sequence[Term]) -> StepTotals:
        """What a micro-batch holds of what these terms and the objective are means over."""
        own = self.view.totals(batch, conf_power=self.objective.conf_power)
        return sum((term.counted(student, batch) for term in terms), start=own)

    def heard(
        self,
        model: nn.Module,
        student: nn.Module,
        batch: Batch,
        *,
        terms: Sequence[Term],
        step: int,
    ) -> Heard:
        """Run the student on a micro-batch.

        Args:
            model: the student as it is run, which may be a data-parallel wrapper.
            student: the same as it is.
            batch: as collated.
            terms: that may ask the forward for more.
            step: of the optimizer, counted from 0.
        """
        requests: Mapping[str, bool] = {
            name: wanted for term in terms for name, wanted in term.requests.items()
        }
        outputs = self.view.outputs(model, batch, requests)
        return Heard(
            student=student,
            outputs=outputs,
            batch=batch,
            positions=self.view.positions(outputs, batch),
            step=step,
        )

    def core(self, heard: Heard, totals: StepTotals) -> ObjectiveTerms:
        """The objective's terms of a micro-batch."""
        return self.view.objective(
            heard.student, heard.positions, self.objective, totals, step=heard.step
        )

    def loss(
        self,
        core: ObjectiveTerms,
        shares: Sequence[Share],
        terms: Sequence[Term],
        *,
        step: int | None,
    ) -> Tensor:
        """The weighted sum of what is learned, gradients and all.

        Args:
            core: the objective's.
            shares: of `terms`.
            terms: those that take part.
            step: of the optimizer; None: without regard to the schedule.
        """
        trained = ALL if step is None else self.schedule.stages(step)
        weighted = [(1.0, core.loss)] if "others" in trained else []
        weighted += [
            (share.weight, share.value)
            for term, share in zip(terms, shares, strict=True)
            if term.stage in trained
        ]
        return weighted_sum(weighted)
