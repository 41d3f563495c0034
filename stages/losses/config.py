"""Weights of the distillation objective's terms; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from teacher_cache.stages.config import Of, StageConfig, comma_separated

OF_CLASSIFIERS = Of(
    task="classification",
    elsewhere="{flag} is of classifiers' training, and the cache is of a language model: leave it "
    "out",
)
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
    lm_weight: Annotated[float, OF_CLASSIFIERS] = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of predicting each sample's next tokens besides, with the embedding "
        "table as the head; 0 turns it off",
    )
    pooled_weight: Annotated[float, OF_CLASSIFIERS] = Field(
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


AttentionLoss = Literal["kl", "frobenius", "cosine"]


LAST_STATES = -1
"""In the place of a teacher's layer: its last states, behind the final norm (`--hidden last`)."""


def layer_pairs(value: Any) -> Any:
    """`0:1,3:5` as pairs of layers; others as they are."""
    return _pairs(value, {}, "0:1,3:5")


def state_pairs(value: Any) -> Any:
    """`0:1,3:last` as pairs of layers; others as they are."""
    return _pairs(value, {"last": LAST_STATES}, "0:1,3:last")


def _pairs(value: Any, names: Mapping[str, int], example: str) -> Any:
    if not isinstance(value, str):
        return value
    pairs: list[tuple[int, int]] = []
    for part in comma_separated(value) or (value,):  # nothing at all is no pair
        student, _, teacher = (word.strip() for word in part.partition(":"))
        if not (student.isdigit() and (teacher.isdigit() or teacher in names)):
            raise PydanticCustomError(
                "no_pairs",
                "expected pairs of layers, a student's and a teacher's, counted from 0, as in "
                "{example}; found {part}",
                {"part": part, "example": example},
            )
        pairs.append((int(student), names[teacher] if teacher in names else int(teacher)))
    return tuple(pairs)


LayerPairs = Annotated[tuple[tuple[int, int], ...], BeforeValidator(layer_pairs)]
StatePairs = Annotated[tuple[tuple[int, int], ...], BeforeValidator(state_pairs)]
Shares = Annotated[tuple[float, ...], BeforeValidator(comma_separated)]


class TransferConfig(StageConfig):
    """What of the teacher's inside a Mamba student matches."""

    attention_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of matching the student's mixing matrices to the teacher's attention "
        "maps (cached with --attention), both kinds of sample; 0 turns it off",
    )
    attention_loss: AttentionLoss = Field(
        default="kl",
        description="what is measured between a row of the teacher's map and the student's: "
        "forward KL, squared Frobenius norm, or 1 - cosine",
    )
    attention_layer_map: LayerPairs = Field(
        default=(),
        description="which layer of the student matches which cached one, counted from 0: 0:1,3:5. "
        "Default: layer i of n to round(i m / n) of the m cached, counted from 1; those that round "
        "to 0 match none",
    )
    attention_channels: int = Field(
        default=8,
        ge=1,
        description="channels of a Mamba-1, evenly spaced, whose matrices are averaged; Mamba-2 "
        "averages all its heads",
    )
    hidden_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="weight of matching the teacher's hidden states (of layers, or the last, as "
        "cached with --hidden) through a learned projection for each layer: 1 - cosine, both kinds "
        "of sample; 0 turns it off",
    )
    hidden_layer_map: StatePairs = Field(
        default=(),
        description="which layer's output of the student matches which cached one, as "
        "--attention-layer-map; last are the teacher's last states: 0:1,3:last",
    )
    transfer_schedule: Literal["together", "staged", "layerwise"] = Field(
        default="together",
        description="all terms in every step; or in stages, each with its terms alone: attention "
        "maps, then hidden states, then all others (MOHAWK's order); layerwise the same, each "
        "layer of --init teacher fed the teacher's state before it (cached with --hidden all)",
    )
    transfer_shares: Shares = Field(
        default=(0.2, 0.2),
        description="shares of the steps that the first and the second stage get, with "
        "--transfer-schedule staged or layerwise; a stage whose weight is 0 gets none",
    )

    @property
    def transfers(self) -> bool:
        """Whether anything inside is matched."""
        return bool(self.attention_weight or self.hidden_weight)

    @property
    def _has_what_layers_learn(self) -> bool:
        return self.transfer_schedule != "layerwise" or bool(self.hidden_weight)

    @model_validator(mode="after")
    def _options_are_of_what_is_matched(self) -> TransferConfig:
        either = self.transfers
        for name, is_on, needed in (
            ("attention_loss", self.attention_weight, "--attention-weight"),
            ("attention_layer_map", self.attention_weight, "--attention-weight"),
            ("attention_channels", self.attention_weight, "--attention-weight"),
            ("hidden_layer_map", self.hidden_weight, "--hidden-weight"),
            ("transfer_schedule", self._has_what_layers_learn, "--hidden-weight"),
            ("transfer_schedule", either, "--attention-weight or --hidden-weight"),
            (
                "transfer_shares",
                self.transfer_schedule != "together",
                "--transfer-schedule staged",
            ),
        ):
            if getattr(self, name) != type(self).model_fields[name].default and not is_on:
                raise PydanticCustomError(
                    "of_nothing_matched",
                    "--{option} is an option of {needed}, which is not given: give it too, or "
                    "leave --{option} out",
                    {"option": name.replace("_", "-"), "needed": needed},
                )
        return self

    @model_validator(mode="after")
    def _stages_leave_steps_for_the_rest(self) -> TransferConfig:
        shares = self.transfer_shares
        if len(shares) != 2 or min(shares) < 0 or sum(shares) >= 1:
            raise PydanticCustomError(
                "no_shares",
                "--transfer-shares is {shares}: give two shares, not negative and together below "
                "1, as in 0.2,0.2, so that steps are left for the other terms",
                {"shares": ",".join(f"{share:g}" for share in shares)},
            )
        return self
