"""The two Trainers: their losses, counted over whole optimizer steps."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
import torch.nn.functional as F

from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import ObjectiveTerms, distillation_objective
from teacher_cache.stages.losses.pooled import pooled_distance
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.losses.teacher_distribution import widened
from teacher_cache.stages.training.learning_rates import scale_learning_rate
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


class DistillationTrainer(OrderedTrainer):
    """Train a student from cached teacher logits.

    The model is a `ProjectedStudent` where pooled states are matched.

    Args:
        objective: weights of the terms.
        embedding_lr_scale: learning rate of the input embeddings, as a multiple of the others'.
        **kwargs: of `OrderedTrainer`.
    """

    def __init__(
        self, *, objective: ObjectiveConfig, embedding_lr_scale: float = 1.0, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self._objective = objective
        self._embedding_lr_scale = embedding_lr_scale
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
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
        totals = sum((self._totals(batch) for batch in batches), StepTotals())
        self._num_steps["labeled"] += totals.num_labeled > 0
        self._num_steps["unlabeled"] += totals.num_unlabeled > 0
        self._num_steps["all"] += 1
        return totals

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
        has_lm = self._objective.lm_weight > 0
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **({"next_token_loss": True} if has_lm else {}),  # only a Mamba student knows it
        )
        terms = distillation_objective(
            outputs.logits[:num],
            teacher_logits,
            labels,
            config=self._objective,
            totals=num_items_in_batch if model.training else self._totals(inputs),
            next_token_loss_sum=outputs.next_token_loss_sum * (num > 0) if has_lm else None,
            pooled_distance_sum=pooled_distance(
                outputs.projected[:num], inputs["teacher_pooled"]
            ).sum()
            if self._objective.pooled_weight
            else None,
        )
        loss = terms.loss
        if model.training:
            self._remember(terms)
            # Data parallelism averages over processes what is a sum over them.
            loss = loss * self.args.world_size
        return (loss, {"logits": outputs.logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means since the last line."""
        if "loss" in logs:
            logs |= self._means()
        super().log(logs, start_time)

    def _totals(self, batch: dict[str, torch.Tensor]) -> StepTotals:
        student: Any = self.model  # as it is, not as a data-parallel wrapper
        return StepTotals.of(
            batch["teacher_logits"],
            labeled="labels" in batch,
            conf_power=self._objective.conf_power,
            num_next_tokens=student.num_next_tokens(batch["attention_mask"])
            if self._objective.lm_weight
            else 0,
        )

    def _remember(self, terms: ObjectiveTerms) -> None:
        """Add a micro-batch's shares; on the device, so that nothing waits for it."""
        if terms.lm is not None:
            self._sums["lm"] += terms.lm
        if terms.pooled is not None:
            self._sums["pooled"] += terms.pooled
        if terms.ce is None:
            self._sums["kd_unlabeled"] += terms.kd
            return
        self._sums["ce"] += terms.ce
        self._sums["kd"] += terms.kd
        self._sums["agreement"] += terms.agreement
        if terms.conf_w is not None:
            self._sums["conf_w"] += terms.conf_w

    def _means(self) -> dict[str, float]:
        """Each term's mean over the steps since the last line that held its kind of sample."""
        kinds = {"kd_unlabeled": "unlabeled", "lm": "all", "pooled": "all"}
        sums = {name: torch.as_tensor(total).double() for name, total in self._sums.items()}
        means = {
            name: float(total) / self._num_steps[kinds.get(name, "labeled")]
            for name, total in self.accelerator.reduce(sums).items()
        }
        self._sums.clear()
        self._num_steps.clear()
        return means
