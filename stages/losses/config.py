"""Weights of the distillation objective's terms; importable without torch."""

from __future__ import annotations

from pydantic import Field

from teacher_cache.stages.config import StageConfig


class ObjectiveConfig(StageConfig):
    """How the terms of the objective are weighed."""

    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of the distillation term on labelled samples; the labels get the rest",
    )
    temperature: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="softens teacher and student before they are compared",
    )
    conf_power: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weigh a sample's distillation term by the teacher's top probability to this "
        "power; 0 turns it off",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="probability that the hard targets spread evenly over the classes; the "
        "teacher's targets are never smoothed",
    )
    unlabeled_alpha: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of the distillation term on unlabelled samples; 0 leaves them out, "
        "0.3 is a good start",
    )
    lm_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of predicting each sample's next tokens besides, with the embedding "
        "table as the head; 0 turns it off",
    )
    pooled_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of matching the teacher's pooled state (cached with --hidden pooled) "
        "through a learned projection: 1 - cosine, both kinds of sample; 0 turns it off",
    )
