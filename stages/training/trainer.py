"""The Trainer of students: what is learned is composed into it, never inherited."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from teacher_cache.stages.losses.draws import MIN_EFFECTIVE_DRAWS
from teacher_cache.stages.losses.objective import ObjectiveTerms, StepTotals
from teacher_cache.stages.training.batches import Batch
from teacher_cache.stages.training.held_out import HeldOut
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.ordered_trainer import OrderedTrainer
from teacher_cache.stages.training.terms import Kind, Share

logger = logging.getLogger(__name__)


class StudentTrainer(OrderedTrainer):
    """Train a student on terms that are means over the whole optimizer step.

    Args:
        lesson: what a micro-batch teaches.
        held_out: what a held-out one is measured by.
        embedding_lr_scale: learning rate of the input embeddings, as a multiple of the others'.
        **kwargs: of `OrderedTrainer`.
    """

    def __init__(
        self,
        *,
        lesson: Lesson,
        held_out: HeldOut,
        embedding_lr_scale: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(compute_metrics=held_out.metrics, **kwargs)
        self.lesson = lesson
        self._held_out = held_out
        self._embedding_lr_scale = embedding_lr_scale
        # Of each term since the last line of the log; on the device, so that nothing waits.
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._kinds: dict[str, Kind] = {}
        self._num_steps: Counter[Kind] = Counter()
        self._has_warned = False
        # compute_loss divides by the counts of the whole step; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own, with the embeddings in a group of their own where their rate differs."""
        optimizer = super().create_optimizer(model)
        if self._embedding_lr_scale != 1:
            embeddings = self.student.get_input_embeddings().weight
            scale_learning_rate(optimizer, embeddings, self._embedding_lr_scale)
        return optimizer

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Not of what learns beside a student and says that decay would harm it."""
        undecayed = tuple(getattr(model, "undecayed", ()))
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.startswith(undecayed)] if undecayed else names

    @property
    def student(self) -> Any:
        """What is trained, as it is, not as a data-parallel wrapper."""
        return self.model

    def step_totals(self, batches: list[Batch]) -> StepTotals:
        """The totals of a step, which is counted by the kinds of its samples."""
        lesson = self.lesson
        parts = (lesson.totals(self.student, batch, lesson.terms) for batch in batches)
        totals = sum(parts, StepTotals())
        # Labels count where no position has a teacher, too.
        self._num_steps["labeled"] += totals.num_labeled + totals.num_labels > 0
        self._num_steps["unlabeled"] += totals.num_unlabeled > 0
        self._num_steps["all"] += 1
        return totals

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """This micro-batch's share of the loss of its optimizer step."""
        lesson, step = self.lesson, self.state.global_step
        heard = lesson.heard(model, self.student, inputs, terms=lesson.terms, step=step)
        core = lesson.core(heard, num_items_in_batch)
        shares = [term.share(heard, num_items_in_batch) for term in lesson.terms]
        self._remember(core, shares)
        loss = lesson.loss(core, shares, lesson.terms, step=step)
        # Data parallelism averages over processes what is a sum over them.
        return loss * self.args.world_size

    def prediction_step(
        self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, Any, Any]:
        """What a held-out batch, as one step of its own, is measured by."""
        with torch.no_grad():
            return self._held_out.of_batch(
                self.lesson, model, self.student, inputs, step=self.state.global_step
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms' means since the last line; say once where draws are too few."""
        if "loss" in logs:
            logs |= self.means()
        super().log(logs, start_time)
        draws = logs.get("effective_draws", float("inf"))
        if draws < MIN_EFFECTIVE_DRAWS and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the cache's draws are worth %.1f at temperature %g, below %d: their estimate is "
                "mostly noise; train nearer to the temperature that they were drawn at, or cache "
                "more (--num-ids, or --num-draws)",
                draws,
                self.lesson.objective.temperature,
                MIN_EFFECTIVE_DRAWS,
            )

    def _remember(self, core: ObjectiveTerms, shares: list[Share]) -> None:
        """Add a micro-batch's shares; on the device, so that nothing waits for it."""
        if core.ce is None:
            self._add("kd_unlabeled", "unlabeled", core.kd)
        else:
            for name in ("ce", "kd", "agreement", "conf_w", "effective_draws"):
                value = getattr(core, name)
                if value is not None:
                    self._add(name, "labeled", value)
        for share in shares:
            self._add(share.name, share.kind, share.value.detach())

    def _add(self, name: str, kind: Kind, value: Tensor) -> None:
        self._sums[name] += value
        self._kinds[name] = kind

    def means(self) -> dict[str, float]:
        """Each term's mean over the steps since the last line that held its kind of sample."""
        sums = {name: torch.as_tensor(total).double() for name, total in self._sums.items()}
        means = {
            name: float(total) / max(1, self._num_steps[self._kinds[name]])
            for name, total in self.accelerator.reduce(sums).items()
        }
        self._sums.clear()
        self._num_steps.clear()
        return means


def scale_learning_rate(optimizer: torch.optim.Optimizer, parameter: Tensor, scale: float) -> None:
    """Move a parameter to a group of its own, with all options of its old one but the rate.

    To be called before a schedule is made, which takes each group's rate for its peak, and before
    the first step. A parameter that the optimizer does not have, being frozen, stays so.
    """
    for group in optimizer.param_groups:
        others = [one for one in group["params"] if one is not parameter]
        if len(others) < len(group["params"]):
            group["params"] = others
            moved = {**group, "params": [parameter], "lr": scale * group["lr"]}
            optimizer.add_param_group(moved)
            return
