"""The Trainers of classifiers: their losses, counted over whole optimizer steps."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from teacher_cache.stages.losses.distributions import widened
from teacher_cache.stages.losses.objective import ObjectiveTerms, distillation_objective
from teacher_cache.stages.losses.pooled import pooled_distance
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.training.objective_trainer import ObjectiveTrainer
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer


class ClassificationTrainer(OrderedTrainer):
    """Fine-tune a classifier on labels: their mean cross-entropy over the whole optimizer step."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # compute_loss divides by the step's labels; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def step_totals(self, batches: list[dict[str, torch.Tensor]]) -> int:
        """The number of labels."""
        return sum(len(batch["labels"]) for batch in batches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; many models' own ignores the step."""
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs.logits[: len(labels)]  # none of a share without samples
        total = F.cross_entropy(widened(logits), labels, reduction="sum")
        loss = total / (num_items_in_batch if model.training else len(labels))
        if model.training:
            # Data parallelism averages over processes what is a sum over them.
            loss = loss * self.args.world_size
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


class DistillationTrainer(ObjectiveTrainer):
    """Train a classifier from cached teacher logits.

    The model is a `ProjectedStudent` where pooled states are matched, in `ProjectedLayers` where
    hidden states are.
    """

    kinds = MappingProxyType({**ObjectiveTrainer.kinds, "lm": "all", "pooled": "all"})

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; in evaluation the batch is the step."""
        labels, teacher_logits = inputs.get("labels"), inputs["teacher_logits"]
        num = len(teacher_logits)  # 0 in a share without samples, which reads one all the same
        has_lm = self.objective.lm_weight > 0
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            # Only a Mamba student knows these.
            **({"next_token_loss": True} if has_lm else {}),
            **(self.transfer.requests if self.transfer is not None and model.training else {}),
        )
        terms = distillation_objective(
            outputs.logits[:num],
            teacher_logits,
            labels,
            config=self.objective,
            totals=num_items_in_batch if model.training else self.totals_of(inputs),
            next_token_loss_sum=outputs.next_token_loss_sum * (num > 0) if has_lm else None,
            pooled_distance_sum=pooled_distance(
                outputs.projected[:num], inputs["teacher_pooled"]
            ).sum()
            if self.objective.pooled_weight
            else None,
        )
        loss = terms.loss
        if model.training:
            self._remember(terms)
            loss = self.with_transfer(loss, outputs, inputs, num_items_in_batch)
            # Data parallelism averages over processes what is a sum over them.
            loss = loss * self.args.world_size
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def totals_of(self, batch: dict[str, torch.Tensor]) -> StepTotals:
        """The counts of a micro-batch."""
        student: Any = self.model  # as it is, not as a data-parallel wrapper
        return StepTotals.of(
            batch["teacher_logits"],
            labeled="labels" in batch,
            conf_power=self.objective.conf_power,
            num_next_tokens=student.num_next_tokens(batch["attention_mask"])
            if self.objective.lm_weight
            else 0,
        )

    def _remember(self, terms: ObjectiveTerms) -> None:
        """Add a micro-batch's shares; on the device, so that nothing waits for it."""
        if terms.lm is not None:
            self.sums["lm"] += terms.lm
        if terms.pooled is not None:
            self.sums["pooled"] += terms.pooled
        if terms.ce is None:
            self.sums["kd_unlabeled"] += terms.kd
            return
        self.sums["ce"] += terms.ce
        self.sums["kd"] += terms.kd
        self.sums["agreement"] += terms.agreement
        if terms.conf_w is not None:
            self.sums["conf_w"] += terms.conf_w
