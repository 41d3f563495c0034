"""Settings of the teacher's forward pass and of the cache it fills."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.cache.stores.named import DEFAULT_STORE
from teacher_cache.stages.codecs.config import FOR_A_CLASSIFIER, CodecConfig
from teacher_cache.stages.config import (
    ComposedConfig,
    DeviceConfig,
    Of,
    Part,
    StageConfig,
    StoreName,
    comma_joined,
    comma_separated,
)
from teacher_cache.stages.tasks import DEFAULT_TASK, TaskName

AttentionMode = Literal["none", "cls", "mean", "full"]
OF_LANGUAGE_MODELS = Of(task="lm", elsewhere=FOR_A_CLASSIFIER)


class ForwardConfig(DeviceConfig):
    """How the teacher is run."""

    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Longest sample in tokens, special tokens included; longer documents are cut, "
        "counted and reported, or with --task lm go on in the next sample. Default: the teacher's "
        "limit, at most 512.",
    )
    batch_tokens: int = Field(
        default=8192,
        ge=1,
        description="Padded tokens in a forward batch; out of memory halves a batch.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the model code that a hub repository brings."
    )


class TeacherConfig(ForwardConfig):
    """A teacher and how it is run."""

    teacher: str = Field(description="Hub id or folder.")


class AlignmentConfig(StageConfig):
    """For whose token ids a language model's distributions are cached (--task lm)."""

    student_tokenizer: Annotated[str | None, OF_LANGUAGE_MODELS] = Field(
        default=None,
        description="Tokenizer of the student, hub id or folder: the log says how its ids relate "
        "to the teacher's, and --align brings the distributions to them. Default: the preset's.",
    )
    align: Annotated[Literal["none", "truncate", "map"] | None, OF_LANGUAGE_MODELS] = Field(
        default=None,
        description="Over whose ids the distributions are cached: none keeps the teacher's, for "
        "any student; truncate cuts or extends to the student's where equal ids mean equal "
        "strings; map adds them up by exact byte strings, before the codec cuts. A cache that was "
        "aligned serves that student's tokenizer only. Default: none.",
    )


class LayersConfig(StageConfig):
    """What is cached of the teacher's inside."""

    hidden: Annotated[
        str,
        BeforeValidator(comma_joined),
        Of(
            task="classification",
            word="pooled",
            elsewhere="{flag} {value} is of classifiers: leave pooled out with --task lm; last "
            "caches each position's last state",
        ),
    ] = Field(
        default="none",
        description="States to cache besides the logits (float16), comma-separated: none; pooled, "
        "the vector that the teacher's classification head reads, for train-student "
        "--pooled-weight, and the pooled state of each token by itself, for --embeddings "
        "teacher-states; last, each position's last state; numbers from 0, its states behind "
        "these layers, or all.",
    )
    attention: Annotated[
        AttentionMode,
        Of(
            task="classification",
            word="cls",
            elsewhere="{flag} {value} is of classifiers, which pool at one position: give "
            "--attention mean or full, or leave it out with --task lm",
        ),
    ] = Field(
        default="none",
        description="Attention maps to cache: none; cls, the pooled position's row, mean over "
        "heads, of classifiers; mean, all rows, mean over heads; or full, every head by itself. "
        "All but cls grow with the square of the length; --dry-run says what they take.",
    )
    attention_layers: Annotated[str, BeforeValidator(comma_joined)] | None = Field(
        default=None,
        description="Layers of which maps are cached: last, all, or numbers from 0, "
        "comma-separated. Default: last.",
    )


class ShardConfig(StageConfig):
    """Where the cache goes, how it is cut, and the views in it."""

    format: StoreName = Field(
        default=DEFAULT_STORE,
        description="How shards lie on disk: an Arrow file each, or a Zarr group each, for who "
        "reads them with zarr or xarray. The values are the same.",
    )
    out: Path | None = Field(
        default=None,
        description="Folder of the cache. Default: ./caches/<data>-<fingerprint[:8]>, with -zarr "
        "behind it for --format zarr.",
    )
    overwrite: bool = Field(default=False, description="Start the cache again if it exists.")
    views: Annotated[
        int,
        Of(
            task="classification",
            elsewhere="{flag} {value} is of classifiers, which label a perturbed text as a whole: "
            "leave it out with --task lm",
        ),
    ] = Field(
        default=0,
        ge=0,
        description="Perturbed copies of each document to cache too, as unlabelled text.",
    )
    shard_mb: int = Field(default=64, ge=1, description="Estimated size of a shard, in megabytes.")
    shard_documents: int = Field(
        default=1024,
        ge=1,
        description="At most this many documents in a shard: what a kill can lose of the work.",
    )


LossOn = Literal["all", "assistant", "completion"]
DroppedKind = Literal["system", "user", "tool", "tools", "tool-calls", "answer"]
DEFAULT_DATE = "2024-07-26"  # what templates of Llama 3 take where they are given none
OF_CONVERSATIONS = Of(
    task="lm",
    elsewhere="{flag} is of conversations, which language models read: leave it out, or give "
    "--task lm",
)


def _as_json(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping) else value


class ChatConfig(StageConfig):
    """Conversations, and what of them counts (--task lm)."""

    loss_on: Annotated[LossOn, OF_CONVERSATIONS] = Field(
        default="all",
        description="Of conversations, the tokens that a teacher's distribution is kept for and a "
        "student learns: all; what the assistant said (assistant); or its last answer alone "
        "(completion).",
    )
    chat_template: Annotated[Path | None, OF_CONVERSATIONS] = Field(
        default=None, description="File with another chat template. Default: the teacher's own."
    )
    chat_template_kwargs: Annotated[str | None, OF_CONVERSATIONS, BeforeValidator(_as_json)] = (
        Field(
            default=None,
            description='Variables of the chat template as JSON, as in {"enable_thinking": false}. '
            "Default: none.",
        )
    )
    chat_date: Annotated[str, OF_CONVERSATIONS] = Field(
        default=DEFAULT_DATE,
        description="The day that a chat template takes for today, as 2024-07-26; the same in "
        "every run, so that a cache can be gone on with.",
    )
    end_of_turn: Annotated[tuple[str, ...], OF_CONVERSATIONS, BeforeValidator(comma_separated)] = (
        Field(
            default=(),
            description="Strings that end an answer, comma-separated, besides the end of text and "
            "what the teacher's generation configuration names.",
        )
    )
    template_may_drop: Annotated[
        tuple[DroppedKind, ...],
        OF_CONVERSATIONS,
        BeforeValidator(comma_separated),
    ] = Field(
        default=(),
        description="Texts that a chat template may leave out, comma-separated of "
        f"{', '.join(get_args(DroppedKind))}; thoughts it may always. Default: none.",
    )
    unusable_conversations: Annotated[Literal["refuse", "drop"], OF_CONVERSATIONS] = Field(
        default="refuse",
        description="What becomes of conversations that cannot be read, are longer than a sample, "
        "or of which it cannot be told what the assistant said: refuse the data, or drop them. "
        "Either way they are counted with their reasons.",
    )

    @property
    def variables(self) -> dict[str, Any]:
        """Of the template.

        Raises:
            UserError: if they are no object of JSON.
        """
        given = self.chat_template_kwargs
        try:
            found = {} if given is None else json.loads(given)
        except ValueError as error:
            raise UserError(
                f"--chat-template-kwargs {given} is no JSON ({first_line(error)}): give an object, "
                'as in {"enable_thinking": false}'
            ) from error
        if not isinstance(found, dict):
            raise UserError(
                f"--chat-template-kwargs {given} is no object: give one, as in "
                '{"enable_thinking": false}'
            )
        return found

    @property
    def today(self) -> date:
        """What the template takes for the date.

        Raises:
            UserError: if it is none.
        """
        try:
            return date.fromisoformat(self.chat_date)
        except ValueError as error:
            raise UserError(
                f"--chat-date {self.chat_date} is no date: write it as {DEFAULT_DATE}"
            ) from error


class CaptureConfig(ComposedConfig):
    """A teacher, and what is cached of it."""

    task: TaskName = Field(default=DEFAULT_TASK, description="What the teacher does.")
    layers: Part[LayersConfig]
    forward: Part[TeacherConfig]
    kept: Part[CodecConfig]
    aligned: Part[AlignmentConfig]
    chat: Part[ChatConfig]
