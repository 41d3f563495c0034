"""transformers' Trainer with the distillation objective, counted over whole optimizer steps."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import (
    ObjectiveTerms,
    StepTotals,
    distillation_objective,
)
from teacher_cache.stages.losses.pooled import pooled_distance
from teacher_cache.stages.training.batches import AlternatingBatches
from teacher_cache.stages.training.checkpoints import (
    commit_checkpoint,
    remove_checkpoint,
    remove_old_checkpoints,
    saved,
)
from teacher_cache.stages.training.learning_rates import scale_learning_rate


class OrderedTrainer(Trainer):
    """A Trainer over a fixed order of batches, whose checkpoints are committed.

    Args:
        batches: the order of all training batches, which to the Trainer is one epoch.
        **kwargs: transformers' Trainer arguments.
    """

    def __init__(self, *, batches: AlternatingBatches, **kwargs: Any):
        super().__init__(**kwargs)
        self._batches = batches
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """One pass over `batches`."""
        loader = DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]  (any map-style dataset)
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        remove_checkpoint(checkpoint)  # what a killed save of the same step left
        with saved(checkpoint):
            super()._save_checkpoint(model, trial)
        commit_checkpoint(checkpoint)
        best = self.state.best_model_checkpoint
        remove_old_checkpoints(folder, keep=Path(best) if best else None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and stop at a loss that is no number: nothing can be learned from there on.

        Raises:
            UserError: naming the step.
        """
        super().log(logs, start_time)
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {self.state.global_step}: start again with "
                "--resume never and a lower --lr, or with --dtype float32"
            )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Weight decay on matrices alone: not on norms, biases and state-space parameters."""
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and not name.endswith("A_log")  # Mamba-1's is a matrix
        ]

    def final_evaluation(self) -> dict[str, float]:
        """Metrics of the model as training leaves it: the best one's, or those of the last step."""
        best = self.state.best_global_step if self.args.load_best_model_at_end else None
        step = best or self.state.global_step
        for entry in reversed(self.state.log_history):
            if entry["step"] == step and "eval_loss" in entry:
                return entry
        return self.evaluate()


class ClassificationTrainer(OrderedTrainer):
    """Fine-tune a classifier on labels: their mean cross-entropy over the whole optimizer step."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        # compute_loss divides by the step's labels; Trainer counts them and must not divide again.
        self.model_accepts_loss_kwargs = True

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
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum")
        loss = total / (num_items_in_batch if model.training else len(labels))
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

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, with the step's totals."""
        # Trainer's own would count labels, and a step's second batch may have none.
        batches = list(islice(epoch_iterator, num_batches))
        totals = sum((self._totals(batch) for batch in batches), StepTotals())
        self._num_steps["labeled"] += totals.num_labeled > 0
        self._num_steps["unlabeled"] += totals.num_unlabeled > 0
        self._num_steps["all"] += 1
        return batches, totals

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss; in evaluation the batch is the step."""
        labels, teacher_logits = inputs.get("labels"), inputs["teacher_logits"]
        has_lm = self._objective.lm_weight > 0
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **({"next_token_loss": True} if has_lm else {}),  # only a Mamba student knows it
        )
        terms = distillation_objective(
            outputs.logits,
            teacher_logits,
            labels,
            config=self._objective,
            totals=num_items_in_batch if model.training else self._totals(inputs),
            next_token_loss_sum=outputs.next_token_loss_sum if has_lm else None,
            pooled_distance_sum=pooled_distance(outputs.projected, inputs["teacher_pooled"]).sum()
            if self._objective.pooled_weight
            else None,
        )
        if model.training:
            self._remember(terms)
        return (terms.loss, {"logits": outputs.logits}) if return_outputs else terms.loss

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
        means = {
            name: float(total) / self._num_steps[kinds.get(name, "labeled")]
            for name, total in self._sums.items()
        }
        self._sums.clear()
        self._num_steps.clear()
        return means
