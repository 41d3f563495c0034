"""Trainers of language models whose tokens are not the teacher's: by chunks, by a projection."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from teacher_cache.cache.codecs.topk import TopKCodec
from teacher_cache.cache.errors import UserError
from teacher_cache.stages.losses.chunk_likelihood import (
    DEFAULT_TAU,
    chunk_likelihood_loss,
    chunk_log_likelihoods,
)
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.linear_head import (
    MAX_LOGITS,
    TargetsByPosition,
    linear_next_log_probs,
)
from teacher_cache.stages.losses.step_totals import StepTotals
from teacher_cache.stages.models.head import LinearHead
from teacher_cache.stages.training.language_model_trainer import LanguageModelTrainer, Positions
from teacher_cache.stages.training.targets import CachedTargets, ProjectedTargets
from teacher_cache.stages.training.vocabulary_projection import learned_share_at


class AlignedTrainer(LanguageModelTrainer):
    """Train on text that the student reads in tokens of its own.

    Perplexities of different tokens say nothing of each other, so that both sides are measured in
    bits for a byte of text.
    """

    sum_names = (*LanguageModelTrainer.sum_names, "num_bytes", "num_teacher_bytes")

    def held_out_sums(
        self, positions: Positions, inputs: dict[str, Any]
    ) -> dict[str, Tensor | float]:
        """With the bytes that each side predicts, and the teacher's own sum."""
        names = ("teacher_nll", "num_bytes", "num_teacher_bytes")
        return super().held_out_sums(positions, inputs) | {
            name: inputs[name].sum() for name in names
        }

    def metrics_of(self, sums: dict[str, float]) -> dict[str, float]:
        """`bits_per_byte` of both in place of the teacher's perplexity."""
        found = super().metrics_of(sums)
        del found["teacher_perplexity"]
        ours = math.log(2) * max(1.0, sums["num_bytes"])
        theirs = math.log(2) * max(1.0, sums["num_teacher_bytes"])
        return found | {
            "bits_per_byte": sums["ce"] / ours,
            "teacher_bits_per_byte": sums["teacher_nll"] / theirs,
        }


class SpansTrainer(AlignedTrainer):
    """Besides, match the likelihoods of chunks of text.

    Each term's weight is that of the distillation term. The chunks' loss is multiplied by `tau`, of
    which its gradient is a fraction, as a distribution's is by T^2.
    """

    kinds = MappingProxyType({**AlignedTrainer.kinds, "chunks_unlabeled": "unlabeled"})
    sum_names = (*AlignedTrainer.sum_names, "chunks", "num_chunks")

    def totals_of(self, batch: dict[str, Tensor]) -> StepTotals:
        """With the chunks."""
        num = int(batch["chunk_mask"].sum())
        kind = "num_chunks_labeled" if "next_ids" in batch else "num_chunks_unlabeled"
        return replace(super().totals_of(batch), **{kind: num})

    def with_other_terms(
        self, loss: Tensor, positions: Positions, inputs: dict[str, Any], *, totals: StepTotals
    ) -> Tensor:
        """With this micro-batch's share of the chunks' term."""
        labeled = positions.next_ids is not None
        num = max(1, totals.num_chunks(labeled=labeled))
        chunks = self._chunk_loss_sum(positions, inputs) / num
        self.sums["chunks" if labeled else "chunks_unlabeled"] += chunks.detach()
        weight = self.objective.alpha if labeled else self.objective.unlabeled_alpha
        return loss + weight * chunks if weight else loss

    def held_out_sums(
        self, positions: Positions, inputs: dict[str, Any]
    ) -> dict[str, Tensor | float]:
        """With the chunks'."""
        return super().held_out_sums(positions, inputs) | {
            "chunks": self._chunk_loss_sum(positions, inputs),
            "num_chunks": int(inputs["chunk_mask"].sum()),
        }

    def metrics_of(self, sums: dict[str, float]) -> dict[str, float]:
        """With the chunks' loss, which is part of the objective."""
        found = super().metrics_of(sums)
        chunks = sums["chunks"] / max(1.0, sums["num_chunks"])
        return found | {"loss": found["loss"] + self.objective.alpha * chunks, "chunks": chunks}

    def _chunk_loss_sum(self, positions: Positions, inputs: dict[str, Any]) -> Tensor:
        """Of a micro-batch's chunks, times `tau`."""
        mask = inputs["loss_mask"]
        found = linear_next_log_probs(
            *self._one_matrix(positions.hidden), inputs["following_ids"][mask]
        )
        log_probs = found.new_zeros(mask.shape).masked_scatter(mask, found)  # [B, S]
        teacher = inputs["teacher_chunks"].to(found.dtype)
        likelihoods = chunk_log_likelihoods(
            log_probs, inputs["chunk_index"], num_chunks=teacher.shape[1]
        )
        losses = chunk_likelihood_loss(likelihoods, teacher, inputs["chunk_mask"], tau=DEFAULT_TAU)
        return DEFAULT_TAU * losses.sum()

    def _one_matrix(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """States and a head without a bias that give the student's logits: [N, D'] and [V, D'].

        Raises:
            UserError: for a head with a soft cap.
        """
        student: Any = self.model
        head: LinearHead = student.output_head
        if head.soft_cap is not None:
            raise UserError(
                "--align spans serves no student whose head has a soft cap: give --align map"
            )
        hidden, weight = hidden * head.scale, head.weight
        if head.bias is None:
            return hidden, weight
        ones = hidden.new_full((len(hidden), 1), head.scale)
        return torch.cat([hidden, ones], dim=1), torch.cat([weight, head.bias[:, None]], dim=1)


class ProjectionTrainer(AlignedTrainer):
    """With a projection of the teacher's ids that learns beside the student.

    The model is a `StudentWithProjection`. Held-out distances to the teacher go by the fixed map,
    so that they can be compared with those of `map`.

    Args:
        projection_steps: between which the fixed map passes into the learned projection.
        **kwargs: of `AlignedTrainer`.
    """

    def __init__(self, *, projection_steps: tuple[int, int], **kwargs: Any):
        super().__init__(**kwargs)
        self._projection_steps = projection_steps

    def targets(
        self, stored: dict[str, Tensor], objective: ObjectiveConfig, *, num_outcomes: int
    ) -> TargetsByPosition:
        """Through the projection as it is at this step."""
        if objective is self.plain:
            return super().targets(stored, objective, num_outcomes=num_outcomes)
        model: Any = self.model
        start, end = self._projection_steps
        return ProjectedTargets(
            cached=CachedTargets(
                codec=self.codec,
                stored=stored,
                temperature=objective.temperature,
                num_outcomes=self.codec.support_size,
            ),
            projection=model.projection,
            learned_share=learned_share_at(self.state.global_step, start=start, end=end),
        )

    def of_learned_targets(self) -> dict[str, Any]:
        """The projection's scores; a whole distribution takes several times the student's place."""
        model: Any = self.model
        slots = model.projection.student_ids.shape[1] + 3
        is_sparse = isinstance(self.codec, TopKCodec)
        return {
            "learned": (model.projection.scores,),
            "max_logits": MAX_LOGITS if is_sparse else MAX_LOGITS // slots,
        }

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Not the projection's: decay would spread every row evenly."""
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.startswith("projection.")]
