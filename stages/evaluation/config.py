"""Settings of an evaluation, and of what a language model writes."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from teacher_cache.stages.config import DeviceConfig, Of, StageConfig, comma_separated, flag_of

Length = Annotated[int, Field(ge=1)]  # tokens
Threshold = Annotated[float, Field(gt=0, lt=1)]
OF_CLASSIFIERS = Of(
    task="classification",
    elsewhere="{flag} is of classifiers: leave it out with language models",
)


class EvaluateOptions(DeviceConfig):
    """How to evaluate."""

    teacher: str | None = Field(
        default=None,
        description="Teacher to compare with: folder or hub id, or none. Default: the cache's.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the model code that the teacher's repository brings."
    )
    batch_tokens: int = Field(default=8192, ge=1, description="Padded tokens in a forward batch.")
    latency_lengths: Annotated[tuple[Length, ...], BeforeValidator(comma_separated)] = Field(
        default=(32, 128, 512),
        description="Lengths, in tokens, at which one forward pass is timed.",
    )


class GenerationOptions(StageConfig):
    """How a language model goes on with a text."""

    max_new_tokens: int | None = Field(
        default=None, ge=1, description="At most so many tokens. Default: 50."
    )
    do_sample: bool | None = Field(
        default=None,
        description="Draw each token, where the default takes the most probable one.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Of --do-sample: what the logits are divided by. Default: 1.",
    )
    seed: int | None = Field(
        default=None, ge=0, description="Of --do-sample: of each text's draws. Default: 0."
    )

    chat: bool | None = Field(
        default=None,
        description="Take each text for what a user says, in the chat template that the student "
        "learned with, and print the answer alone. Default: no.",
    )

    @property
    def flags(self) -> list[str]:
        """The options that were given, as they are typed."""
        return given_flags(self)


class PairOptions(StageConfig):
    """What a classifier of pairs reads."""

    second: str | None = Field(
        default=None,
        description="Of students of pairs: the second text, TEXT being the first; with - each line "
        "holds both, a tab between. Default: none.",
    )


class AnswerOptions(StageConfig):
    """When a classifier of several labels gives one."""

    threshold: Annotated[Threshold | None, OF_CLASSIFIERS] = Field(
        default=None,
        description="Of multi-label classifiers: the probability above which a label is given. "
        "Default: 0.5.",
    )


class ClassifyingOptions(PairOptions, AnswerOptions):
    """What a classifier reads, and how it answers."""

    @property
    def flags(self) -> list[str]:
        """The options that were given, as they are typed."""
        return given_flags(self)


def given_flags(options: StageConfig) -> list[str]:
    """Of options whose default is none, those that were given, as they are typed."""
    fields = type(options).model_fields
    return [flag_of(one) for one in fields if getattr(options, one) is not None]
