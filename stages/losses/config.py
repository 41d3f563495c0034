"""Weights of the distillation objective's terms; importable without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from teacher_cache.stages.config import StageConfig

DivergenceName = Literal["kl", "reverse-kl", "jsd", "skew-kl", "tv"]


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
    divergence: DivergenceName = Field(
        default="kl",
        description="what the distillation term measures between teacher and student: forward "
        "KL, reverse KL, generalised Jensen-Shannon, skew KL, or total variation",
    )
    jsd_beta: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="the teacher's share in the mixture of --divergence jsd; near 0 it behaves "
        "like kl, near 1 like reverse-kl",
    )
    skew_alpha: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="the teacher's share in the mixture of --divergence skew-kl; near 0 it "
        "behaves like kl",
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

    @model_validator(mode="after")
    def _parameters_are_of_the_divergence(self) -> ObjectiveConfig:
        for name, of in (("jsd_beta", "jsd"), ("skew_alpha", "skew-kl")):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and self.divergence != of:
                raise PydanticCustomError(
                    "of_another_divergence",
                    "--{option} {value} is of --divergence {of}, and the divergence is {chosen}: "
                    "give --divergence {of}, or leave it out",
                    {
                        "option": name.replace("_", "-"),
                        "value": value,
                        "of": of,
                        "chosen": self.divergence,
                    },
                )
        return self
