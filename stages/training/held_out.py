"""What held-out batches are measured by during training: one class a kind of view."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from teacher_cache.cache.schema import NEXT_LOG_PROB, NO_LABEL
from teacher_cache.stages.heads import SINGLE, Head
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.objective import ObjectiveTerms, StepTotals, loss_of
from teacher_cache.stages.training.batches import Batch
from teacher_cache.stages.training.lesson import Lesson
from teacher_cache.stages.training.terms import Chunks, Heard


class HeldOut(Protocol):
    """A measurement of held-out samples.

    Attributes:
        label_names: keys of a held-out batch that hold targets.
    """

    label_names: ClassVar[list[str]]

    def of_batch(
        self, lesson: Lesson, model: nn.Module, student: nn.Module, batch: Batch, *, step: int
    ) -> tuple[Tensor | None, Any, Any]:
        """A batch as one step of its own: loss or none, predictions and targets, [B, ...] each."""
        ...

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The figures of all batches together."""
        ...


class HeldOutSamples:
    """Of a classifier: how good, how close to its teacher.

    Args:
        head: what its outputs mean.
    """

    def __init__(self, head: Head = SINGLE):
        self._head = head

    label_names: ClassVar[list[str]] = ["labels", "teacher_logits"]

    def of_batch(
        self, lesson: Lesson, model: nn.Module, student: nn.Module, batch: Batch, *, step: int
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The loss with all that is measured of held-out samples, and the logits."""
        terms = lesson.held_out_terms
        heard = lesson.heard(model, student, batch, terms=terms, step=step)
        totals = lesson.totals(student, batch, terms)
        core = lesson.core(heard, totals)
        shares = [term.share(heard, totals) for term in terms]
        loss = lesson.loss(core, shares, terms, step=None)
        return loss, heard.outputs.logits, tuple(batch[name] for name in self.label_names)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy and the like of what has a label, agreement and the like of all."""
        logits = np.asarray(prediction.predictions)
        labels, teacher_logits = (np.asarray(one) for one in prediction.label_ids)
        has_label = loss_of(self._head).has_label(torch.from_numpy(labels)).numpy()
        quality = {}
        if has_label.any():
            quality = self._head.metrics(logits[has_label], labels[has_label])
        return {**quality, **self._head.likeness(logits, teacher_logits)}


class HeldOutTokens:
    """Of a language model: means over positions, which sums of batches give and means do not.

    Perplexities of different tokens say nothing of each other: where the student reads text in
    tokens of its own, both sides are measured in bits for a byte of text instead.

    Args:
        objective: what is trained on.
        temperature: at which teacher and student are compared: 1 where the cache serves it.
        has_bytes: whether the student has tokens of its own.
        chunks: the term of chunks, where they are compared.
    """

    label_names: ClassVar[list[str]] = ["next_ids"]

    def __init__(
        self,
        objective: ObjectiveConfig,
        *,
        temperature: float,
        has_bytes: bool = False,
        chunks: Chunks | None = None,
    ):
        self._objective = objective
        # Forward KL and plain cross-entropy, whatever is trained on.
        self._plain = ObjectiveConfig(temperature=temperature)
        self._chunks = chunks
        self._byte_sums = ("teacher_nll", "num_bytes", "num_teacher_bytes") if has_bytes else ()
        self._names: tuple[str, ...] = (
            *("kd", "hard", "ce", "teacher_nll", "kl", "agreement", "num_next_tokens", "num"),
            *self._byte_sums[1:],
            *(("chunks", "num_chunks") if chunks else ()),
        )

    def of_batch(
        self, lesson: Lesson, model: nn.Module, student: nn.Module, batch: Batch, *, step: int
    ) -> tuple[None, Tensor, Tensor]:
        """[B, M] sums over the batch's positions, B times 1 / B.

        Its samples' counts differ, so that means of batches are not those of positions.
        """
        heard = lesson.heard(model, student, batch, terms=lesson.held_out_terms, step=step)
        sums = self._sums_of(lesson, heard)
        stacked = torch.stack([torch.as_tensor(sums[name]).double() for name in self._names])
        size = len(batch["input_ids"])
        return None, (stacked / size).expand(size, -1), batch["next_ids"]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Means over held-out positions: objective, cross-entropies, how close to the teacher.

        `kl` is what the cache knows of it: of a head and its ghost, a bound from below; of draws,
        an unbiased estimate. Draws may have missed the most probable token, so they give no
        `agreement`.
        """
        of_all = np.asarray(prediction.predictions).sum(axis=0).tolist()
        sums = dict(zip(self._names, of_all, strict=True))
        objective, temperature = self._objective, self._plain.temperature
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
        if not np.isnan(agreement):
            found["agreement"] = agreement
        if self._byte_sums:
            del found["teacher_perplexity"]
            found |= _bits_per_byte(sums)
        if self._chunks:
            chunks = sums["chunks"] / max(1.0, sums["num_chunks"])
            found["loss"] += objective.alpha * chunks
            found["chunks"] = chunks
        return found

    def _sums_of(self, lesson: Lesson, heard: Heard) -> dict[str, Tensor | float]:
        batch, positions, student = heard.batch, heard.positions, heard.student
        totals = lesson.totals(student, batch, ())
        num, num_next = totals.num_labeled, totals.num_labels
        core = lesson.core(heard, totals)
        plain: ObjectiveTerms = lesson.view.objective(
            student,
            positions,
            self._plain,
            StepTotals(num_labeled=num, num_labels=num_next),
            step=None,
        )
        assert core.ce is not None and plain.ce is not None, "held-out samples are labelled"
        has_next = positions.next_ids != NO_LABEL
        sums = {
            "kd": core.kd * num,
            "hard": core.ce * num_next,
            "ce": plain.ce * num_next,
            "teacher_nll": -positions.stored[NEXT_LOG_PROB][has_next].float().sum(),
            "kl": plain.kd * num,
            "agreement": torch.nan if plain.agreement is None else plain.agreement * num,
            "num_next_tokens": num_next,
            "num": num,
        }
        # The teacher's own sum, over its own tokens.
        sums |= {name: batch[name].sum() for name in self._byte_sums}
        if self._chunks:
            sums["chunks"] = self._chunks.loss_sum(heard)
            sums["num_chunks"] = int(batch["chunk_mask"].sum())
        return sums


def _bits_per_byte(sums: dict[str, float]) -> dict[str, float]:
    """Of both sides."""
    ours = math.log(2) * max(1.0, sums["num_bytes"])
    theirs = math.log(2) * max(1.0, sums["num_teacher_bytes"])
    return {
        "bits_per_byte": sums["ce"] / ours,
        "teacher_bits_per_byte": sums["teacher_nll"] / theirs,
    }
