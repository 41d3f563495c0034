"""How the gradient of what a codec teaches lies to that of the teacher's whole distribution.

The gradient is of a step's loss by all of the student's parameters. That of draws is right in the
mean and off at random, so its angle shrinks with the square root of the positions that it is taken
over; a bias stays. So the angle is taken of one optimizer step, and of many steps' sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.codec_table.rows import TEMPERATURE
from teacher_cache.cache.codecs.interface import Codec
from teacher_cache.stages.losses.config import ObjectiveConfig
from teacher_cache.stages.losses.linear_head import linear_objective
from teacher_cache.stages.losses.objective import StepTotals
from teacher_cache.stages.student.language_model import MambaStudentForCausalLM
from teacher_cache.stages.training.batches import Batch, at
from teacher_cache.stages.training.targets import CachedTargets


@dataclass(frozen=True, kw_only=True)
class Angles:
    """Of one row's gradients to the dense ones.

    Attributes:
        num_steps: that were compared.
        positions: of a step, mean.
        step: degrees, mean over single steps.
        all_steps: degrees, of the sums over all steps.
        norm: of the sum, as a multiple of the dense one's.
    """

    num_steps: int
    positions: float
    step: float
    all_steps: float
    norm: float


@dataclass
class GradientSums:
    """What a row's gradients come to, step by step.

    Attributes:
        angles: of each step to the dense gradient, degrees.
        total: [P] float64, of all steps.
    """

    angles: list[float] = field(default_factory=list)
    total: Tensor | None = None

    def add(self, gradient: Tensor, dense: Tensor) -> None:
        """A step's gradient and the dense one of the same step, [P] float64 each."""
        self.angles.append(angle(gradient, dense))
        self.total = gradient.clone() if self.total is None else self.total.add_(gradient)

    def against(self, dense: Tensor, positions: Sequence[int]) -> Angles:
        """The angles, `dense` being the sum of the dense gradients."""
        assert self.total is not None, "there was a step"
        return Angles(
            num_steps=len(self.angles),
            positions=statistics.fmean(positions),
            step=statistics.fmean(self.angles),
            all_steps=angle(self.total, dense),
            norm=float(self.total.norm() / dense.norm()),
        )


def angle(one: Tensor, other: Tensor) -> float:
    """Between two vectors that are not 0, degrees.

    From the lengths of sum and difference of the unit vectors (Kahan 2006, section 12): an arc
    cosine has half the digits where the angle is small.
    """
    one, other = (vector.double() / vector.double().norm() for vector in (one, other))
    return math.degrees(2 * math.atan2(float((one - other).norm()), float((one + other).norm())))


def step_gradient(
    student: MambaStudentForCausalLM,
    batch: Batch,
    codec: Codec,
    *,
    alpha: float,
    support: Tensor | None = None,
) -> Tensor:
    """The gradient of one optimizer step's loss, by the product's objective; [P] float64.

    Args:
        student: whose parameters it is by; its own gradients are left as they were found: none.
        batch: of the product's collator, as its training gets it.
        codec: of the batch's fields; `hidden` with its head.
        alpha: share of the distillation term.
        support: [V] bool, or None.
    """
    mask = batch["loss_mask"]
    num = int(mask.sum())
    output = student(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        seq_idx=batch["seq_idx"],
        use_cache=False,
        states_only=True,
    )
    weight = student.lm_head.weight
    stored: Mapping[str, Any] = {spec.name: at(batch[spec.name], mask) for spec in codec.fields}
    terms = linear_objective(
        output.final_states[mask],
        weight,
        CachedTargets(
            codec=codec, stored=stored, temperature=TEMPERATURE, num_outcomes=len(weight)
        ),
        batch["next_ids"][mask],
        config=ObjectiveConfig(alpha=alpha, temperature=TEMPERATURE),
        totals=StepTotals(num_labeled=num, num_labels=num),
        support=support,
    )
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(terms.loss, parameters)
    return torch.cat([one.detach().double().flatten() for one in gradients])
