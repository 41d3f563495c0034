"""The Trainer of language models: positions where a classifier has samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from teacher_cache.cache.codecs.named import AnyCodec
from teacher_cache.cache.schema import NEXT_LOG_PROB, TOP1_LOG_PROB
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.draws import MIN_EFFECTIVE_DRAWS
from teacher_cache.stages.losses.language_model import LanguageModelTerms
from teacher_cache.stages.losses.linear_head import (
    TargetsByPosition,
    linear_language_model_objective,
)
from teacher_cache.stages.losses.objective import NO_LABEL
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.training.batches import at
from teacher_cache.stages.training.objective_trainer import ObjectiveTrainer
from teacher_cache.stages.training.targets import CachedTargets, FixedMap, MappedTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What counts of a batch, N positions.

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


class LanguageModelTrainer(ObjectiveTrainer):
    """Train a student from what a cache holds of a language model at each position.

    Args:
        codec: of the cache; one of hidden states with its head, on this training's device.
        support: [V] bool, the ids over which teacher and student are compared; None: all.
        held_out_temperature: at which held-out positions are compared: 1 where the cache serves it.
        fixed_map: from the cached ids to the student's; None where they are the same.
        **kwargs: of `ObjectiveTrainer`.

    Attributes:
        sum_names: what `held_out_sums` gives, in order.
    """

    sum_names: ClassVar[tuple[str, ...]] = (
        *("kd", "hard", "ce", "teacher_nll", "kl", "agreement"),
        *("num_next_tokens", "num"),
    )

    def __init__(
        self,
        *,
        codec: AnyCodec,
        support: Tensor | None,
        held_out_temperature: float,
        fixed_map: FixedMap | None = None,
        **kwargs: Any,
    ):
        super().__init__(compute_metrics=self._metrics, **kwargs)
        # Forward KL and plain cross-entropy, whatever is trained on.
        self.plain = ObjectiveConfig(temperature=held_out_temperature)
        self.codec = codec
        self._fixed_map = None if fixed_map is None else fixed_map.to(self.args.device)
        self._support = None if support is None else support.to(self.args.device)
        self._has_warned = False

    def has_labeled(self, totals: StepTotals) -> bool:
        """Next tokens count where no position has a teacher, too."""
        return totals.num_labeled + totals.num_next_tokens > 0

    def totals_of(self, batch: dict[str, Tensor]) -> StepTotals:
        """The counted positions of a micro-batch."""
        mask = batch["loss_mask"]
        taught = mask & batch["has_teacher"] if "has_teacher" in batch else mask
        has_next = mask & (batch["next_ids"] != NO_LABEL) if "next_ids" in batch else None
        return StepTotals.of_positions(
            batch[TOP1_LOG_PROB][taught],
            labeled=has_next is not None,
            conf_power=self.objective.conf_power,
            num_next_tokens=0 if has_next is None else int(has_next.sum()),
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This micro-batch's share of the step's loss."""
        outputs = self._outputs(model, inputs, **(self.transfer.requests if self.transfer else {}))
        positions = self._positions(outputs, inputs)
        terms = self.terms(positions, self.objective, totals=num_items_in_batch)
        self._remember(terms)
        loss = self.with_other_terms(terms.loss, positions, inputs, totals=num_items_in_batch)
        loss = self.with_transfer(loss, outputs, inputs, num_items_in_batch)
        # Data parallelism averages over processes what is a sum over them.
        return loss * self.args.world_size

    def with_other_terms(
        self, loss: Tensor, positions: Positions, inputs: dict[str, Any], *, totals: StepTotals
    ) -> Tensor:
        """The loss with what an alignment adds to it; logs that as well."""
        return loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[None, Tensor, Tensor]:
        """A held-out batch as one step of its own, [B, M] sums over its positions, B times 1 / B.

        Its samples' counts differ, so that means of batches are not those of positions.
        """
        with torch.no_grad():
            outputs = self._outputs(model, inputs)
            sums = self.held_out_sums(self._positions(outputs, inputs), inputs)
        stacked = torch.stack([torch.as_tensor(sums[name]).double() for name in self.sum_names])
        size = len(inputs["input_ids"])
        return None, (stacked / size).expand(size, -1), inputs["next_ids"]

    def held_out_sums(
        self, positions: Positions, inputs: dict[str, Any]
    ) -> dict[str, Tensor | float]:
        """Sums over a held-out batch, by `sum_names`."""
        totals = self.totals_of(inputs)
        num, num_next = totals.num_labeled, totals.num_next_tokens
        terms = self.terms(positions, self.objective, totals=totals)
        plain = self.terms(
            positions,
            self.plain,
            totals=StepTotals(num_labeled=num, num_next_tokens=num_next),
        )
        assert terms.ce is not None and plain.ce is not None, "held-out samples are labelled"
        has_next = positions.next_ids != NO_LABEL
        return {
            "kd": terms.kd * num,
            "hard": terms.ce * num_next,
            "ce": plain.ce * num_next,
            "teacher_nll": -positions.stored[NEXT_LOG_PROB][has_next].float().sum(),
            "kl": plain.kd * num,
            "agreement": torch.nan if plain.agreement is None else plain.agreement * num,
            "num_next_tokens": num_next,
            "num": num,
        }

    def metrics_of(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over held-out positions: objective, cross-entropies, how close to the teacher.

        `kl` is what the cache knows of it: of a head and its ghost, a bound from below; of draws,
        an unbiased estimate. Draws may have missed the most probable token, so they give no
        `agreement`.
        """
        objective, temperature = self.objective, self.plain.temperature
        num, num_next = max(1.0, sums["num"]), max(1.0, sums["num_next_tokens"])
        kd, hard, ce = sums["kd"] / num, sums["hard"] / num_next, sums["ce"] / num_next
        found = {
            "loss": objective.alpha * objective.temperature**2 * kd + (1 - objective.alpha) * hard,
            "ce": ce,
            "perplexity": float(np.exp(ce)),
            "teacher_perplexity": float(np.exp(sums["teacher_nll"] / num_next)),
            "kl" if temperature == 1 else f"kl_at_{temperature:g}": sums["kl"] / num,
        }
        agreement = sums["agreement"] / num
        return found if np.isnan(agreement) else found | {"agreement": agreement}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Say once where the draws are too few for what they are to estimate."""
        super().log(logs, start_time)
        draws = logs.get("effective_draws", float("inf"))
        if draws < MIN_EFFECTIVE_DRAWS and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the cache's draws are worth %.1f at temperature %g, below %d: their estimate is "
                "mostly noise; train nearer to the temperature that they were drawn at, or cache "
                "more (--num-draws)",
                draws,
                self.objective.temperature,
                MIN_EFFECTIVE_DRAWS,
            )

    def _outputs(self, model: torch.nn.Module, inputs: dict[str, Any], **requests: bool) -> Any:
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            seq_idx=inputs["seq_idx"],
            use_cache=False,
            states_only=True,
            **requests,
        )

    def _positions(self, outputs: Any, inputs: dict[str, Any]) -> Positions:
        mask = inputs["loss_mask"]  # none of a share without samples, which reads one all the same
        return Positions(
            hidden=outputs.final_states[: len(mask)][mask],
            stored={spec.name: at(inputs[spec.name], mask) for spec in self.codec.fields},
            next_ids=inputs["next_ids"][mask] if "next_ids" in inputs else None,
            has_teacher=inputs["has_teacher"][mask] if "has_teacher" in inputs else None,
        )

    def terms(
        self, positions: Positions, objective: ObjectiveConfig, *, totals: StepTotals
    ) -> LanguageModelTerms:
        """The objective's terms at some positions."""
        student: Any = self.model  # as it is, not as a data-parallel wrapper
        head: LinearHead = student.output_head
        weight, scale = head.weight, head.scale
        return linear_language_model_objective(
            positions.hidden if scale == 1 else positions.hidden * scale,
            weight,
            self.targets(positions.stored, objective, num_outcomes=len(weight)),
            positions.next_ids,
            config=objective,
            totals=totals,
            bias=head.bias if head.bias is None or scale == 1 else head.bias * scale,
            soft_cap=head.soft_cap,
            top1_log_prob=positions.stored[TOP1_LOG_PROB] if objective.conf_power else None,
            has_teacher=positions.has_teacher,
            support=self._support,
            **self.of_learned_targets(),
        )

    def targets(
        self, stored: dict[str, Tensor], objective: ObjectiveConfig, *, num_outcomes: int
    ) -> TargetsByPosition:
        """What an objective compares the student with."""
        fixed = self._fixed_map
        cached = CachedTargets(
            codec=self.codec,
            stored=stored,
            temperature=objective.temperature,
            num_outcomes=num_outcomes if fixed is None else len(fixed.student_ids),
        )
        return cached if fixed is None else MappedTargets(cached=cached, fixed=fixed)

    def of_learned_targets(self) -> dict[str, Any]:
        """Arguments of the objective for targets that are learned themselves."""
        return {}

    def _remember(self, terms: LanguageModelTerms) -> None:
        """Add a micro-batch's shares; on the device, so that nothing waits for it."""
        if terms.ce is None:
            self.sums["kd_unlabeled"] += terms.kd
            return
        self.sums["ce"] += terms.ce
        self.sums["kd"] += terms.kd
        for name in ("agreement", "conf_w", "effective_draws"):
            share = getattr(terms, name)
            if share is not None:
                self.sums[name] += share

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        sums = np.asarray(prediction.predictions).sum(axis=0)
        return self.metrics_of(dict(zip(self.sum_names, sums.tolist(), strict=True)))
