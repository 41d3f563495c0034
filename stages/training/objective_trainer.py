"""What the Trainers of students have in common: totals of whole steps, and the terms' means."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.training.layers import Transfer
from teacher_cache.stages.training.learning_rates import scale_learning_rate
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer


class ObjectiveTrainer(OrderedTrainer):
    """Train a student on an objective whose terms are means over the whole optimizer step.

    Args:
        objective: weights of the terms.
        embedding_lr_scale: learning rate of the input embeddings, as a multiple of the others'.
        transfer: what is matched inside the models besides; None where nothing is.
        **kwargs: of `OrderedTrainer`.

    Attributes:
        kinds: of a term, the kind of sample that it is a mean over; `labeled` if not said.
        objective: as given.
        transfer: as given.
        sums: of each term since the last line of the log; on the device, so that nothing waits.
    """

    kinds: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"kd_unlabeled": "unlabeled", "attention": "all", "hidden": "all"}
    )

    def __init__(
        self,
        *,
        objective: ObjectiveConfig,
        embedding_lr_scale: float = 1.0,
        transfer: Transfer | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.objective = objective
        self.transfer = transfer
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._embedding_lr_scale = embedding_lr_scale
        self._num_steps: Counter[str] = Counter()  # by the kind of their samples, and all of them
        # compute_loss divides by the counts of the whole step; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, with the embeddings in a group of their own where their rate differs."""
        optimizer = super().create_optimizer(model)
        if self._embedding_lr_scale != 1:
            student: Any = self.model  # as it is, not as a data-parallel wrapper
            scale_learning_rate(
                optimizer, student.get_input_embeddings().weight, self._embedding_lr_scale
            )
        return optimizer

    def step_totals(self, batches: list[dict[str, torch.Tensor]]) -> StepTotals:
        """The totals of a step, which is counted by the kinds of its samples."""
        totals = sum((self._all_totals_of(batch) for batch in batches), StepTotals())
        self._num_steps["labeled"] += self.has_labeled(totals)
        self._num_steps["unlabeled"] += totals.num_unlabeled > 0
        self._num_steps["all"] += 1
        return totals

    def has_labeled(self, totals: StepTotals) -> bool:
        """Whether a step holds anything of the labelled kind."""
        return totals.num_labeled > 0

    def totals_of(self, batch: dict[str, torch.Tensor]) -> StepTotals:
        """The counts of a micro-batch."""
        raise NotImplementedError  # a classifier counts samples, a language model positions

    def _all_totals_of(self, batch: dict[str, torch.Tensor]) -> StepTotals:
        totals = self.totals_of(batch)
        return totals if self.transfer is None else self.transfer.counted(totals, batch)

    def with_transfer(
        self, others: torch.Tensor, outputs: Any, inputs: dict[str, Any], totals: StepTotals
    ) -> torch.Tensor:
        """The loss of what the current step trains: that of the logits, what is matched, or both.

        Args:
            others: this micro-batch's share of the loss without what is matched inside.
            outputs: of the student's forward, with `transfer.requests`.
            inputs: the micro-batch.
            totals: of the whole optimizer step.
        """
        if self.transfer is None:
            return others
        terms = self.transfer.terms(outputs, inputs, totals)
        for name, share in (("attention", terms.attention), ("hidden", terms.hidden)):
            if share is not None:
                self.sums[name] += share.detach()
        return self.transfer.loss(terms, others, self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means since the last line."""
        if "loss" in logs:
            logs |= self.means()
        super().log(logs, start_time)

    def means(self) -> dict[str, float]:
        """Each term's mean over the steps since the last line that held its kind of sample."""
        sums = {name: torch.as_tensor(total).double() for name, total in self.sums.items()}
        means = {
            name: float(total) / max(1, self._num_steps[self.kinds.get(name, "labeled")])
            for name, total in self.accelerator.reduce(sums).items()
        }
        self.sums.clear()
        self._num_steps.clear()
        return means
