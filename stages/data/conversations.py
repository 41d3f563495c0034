"""Conversations: columns of messages, or of prompts and completions, as a corpus holds them.

A row becomes messages as transformers' chat templates take them; a template renders these, and of
the tokens those count that `--loss-on` asks for. What of a conversation cannot be read, rendered or
told apart makes it unusable, with a reason; nothing of it is guessed.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from teacher_cache.cache.errors import UserError, did_you_mean, first_line
from teacher_cache.stages.config import given_options
from teacher_cache.stages.tokens.chat_template import (
    ASSISTANT,
    THOUGHT,
    THOUGHTS,
    Answer,
    ChatRecord,
    ChatTemplate,
    ChatTokenizer,
    ChatTokens,
    Message,
    Told,
    Untold,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.stages.teacher.config import ChatConfig

MESSAGE_COLUMNS = ("messages", "conversations", "conversation")
PROMPT, COMPLETION, TOOLS = "prompt", "completion", "tools"
ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")
_ROLE_OF_SHAREGPT = {"human": "user", "gpt": ASSISTANT, "observation": "tool"}
VERSION = 1  # of how answers are told

logger = logging.getLogger(__name__)


def refuse_without_conversations(config: ChatConfig, source: str, text_column: str) -> None:
    """Refuse options of conversations where texts are read.

    Raises:
        UserError: naming the first that was given.
    """
    given = given_options(config)
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise UserError(
            f"{flag} is of conversations, and {source} is read as texts of {text_column!r}: name "
            "the column of messages with --text-column, or leave the option out"
        )


def conversation_columns(
    schema: pa.Schema, wanted: str | None, usual: Sequence[str]
) -> tuple[str, ...] | None:
    """The columns that hold conversations; None where texts are read.

    Args:
        schema: of the source.
        wanted: the column that was asked for, or none.
        usual: names of columns of text, which come first.
    """
    names = {name.strip().lower(): name for name in reversed(schema.names)}
    found: tuple[str, ...] | None = None
    if wanted is not None:
        # A column of texts that is asked for holds texts, whatever it is called.
        if schema.names.count(wanted) == 1 and _is_nested(schema.field(wanted).type):
            found = (wanted,)
    elif not any(one in names for one in usual):
        column = next((names[one] for one in MESSAGE_COLUMNS if one in names), None)
        if column is not None:
            found = (column,)
        elif PROMPT in names and COMPLETION in names:
            found = (names[PROMPT], names[COMPLETION])
    if found is None:
        return None
    return (*found, names[TOOLS]) if TOOLS in names else found


def _is_nested(found: pa.DataType) -> bool:
    return pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_struct(found)


class Unusable(Exception):
    """A conversation that nothing can be learned from; says why.

    Attributes:
        remedy: what would make it usable, beside mending or dropping it.
    """

    def __init__(self, reason: str, remedy: str = ""):
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages as chat templates take them.

    Attributes:
        messages: with `role`, `content` and what else they have.
        tools: schemas of functions; None where there are none.
    """

    messages: tuple[Message, ...]
    tools: list[Any] | None

    @classmethod
    def of_row(cls, row: Mapping[str, Any], columns: Sequence[str]) -> Conversation:
        """Of the columns that `conversation_columns` found.

        Raises:
            Unusable: if they hold something else.
        """
        tools = None
        if columns[-1].strip().lower() == TOOLS and len(columns) > 1:
            *columns, tools_column = columns
            tools = _parsed(row[tools_column])
        if tools is not None and not isinstance(tools, list):
            raise Unusable("its tools are no list")
        if len(columns) == 1:
            messages = _messages(row[columns[0]])
        else:
            prompt, completion = (row[one] for one in columns)
            messages = [*_side(prompt, "user"), *_side(completion, ASSISTANT)]
        if not messages:
            raise Unusable("it has no message")
        return cls(messages=tuple(messages), tools=tools or None)


def _side(found: Any, role: str) -> list[Message]:
    """A prompt or completion: text, or messages."""
    if isinstance(found, str) and not _is_list_of_messages(found):
        return [{"role": role, "content": found}]
    return _messages(found)


def _is_list_of_messages(text: str) -> bool:
    """Whether text is such a list written as JSON, as tables of lines keep it."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError:
        return False
    return isinstance(found, list) and all(
        isinstance(one, dict) and ("role" in one or "from" in one) for one in found
    )


def _parsed(found: Any) -> Any:
    """What text of JSON holds; other values without the keys that a table gives all its rows."""
    if not isinstance(found, str):
        return _without_nulls(found)
    try:
        return json.loads(found) if found.strip() else None
    except ValueError as error:
        raise Unusable("its column is no JSON") from error


def _messages(found: Any) -> list[Message]:
    messages = _parsed(found)
    if not isinstance(messages, list):
        raise Unusable("its messages are no list")
    return [_message(one) for one in messages]


def _without_nulls(value: Any) -> Any:
    """Keys that other rows have and this one lacks are null in a table; lists keep theirs."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _message(found: Any) -> Message:
    if not isinstance(found, dict):
        raise Unusable("a message is no object")
    found = {key: one for key, one in found.items() if one is not None}
    if "role" not in found and "from" in found:  # as ShareGPT writes it
        found = {"role": found["from"], "content": found.get("value", "")} | {
            key: one for key, one in found.items() if key not in ("from", "value")
        }
        found["role"] = _ROLE_OF_SHAREGPT.get(found["role"], found["role"])
    role = found.get("role")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else f"give {', '.join(ROLES)}"
        raise Unusable(f"a message has the role {role!r} ({hint})")
    message = dict(found)
    if "content" in message:
        message["content"] = _text_of(message["content"])
    thought = next((message[one] for one in THOUGHTS if message.get(one) is not None), None)
    for one in THOUGHTS:
        message.pop(one, None)
    if thought is not None:
        if not isinstance(thought, str):
            raise Unusable("a thought is no text")
        message[THOUGHTS[0]] = thought
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = [_call(one) for one in calls]
    elif "content" not in message:
        message["content"] = ""
    return message


def _text_of(content: Any) -> str:
    """Text, or parts of text joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable("a message's content is no text")
    parts = []
    for part in content:
        text = part if isinstance(part, str) else None
        if isinstance(part, dict) and part.get("type", "text") == "text":
            text = part.get("text")
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Unusable(f"a message has a part that is no text ({kind})")
        parts.append(text)
    return "".join(parts)


def _call(found: Any) -> Message:
    """A call of a tool, its arguments a mapping."""
    function = found.get("function", found) if isinstance(found, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call names no function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except ValueError as error:
            raise Unusable("a tool call's arguments are no JSON") from error
    if not isinstance(arguments, dict):
        raise Unusable("a tool call's arguments are no object")
    own = {key: one for key, one in found.items() if key in ("id", "type")}
    return {"type": "function", **own, "function": {**function, "arguments": arguments}}


@dataclass(frozen=True, kw_only=True)
class ReadConversation:
    """A conversation as the teacher reads it.

    Attributes:
        text: rendered.
        tokens: of it.
    """

    text: str
    tokens: ChatTokens


@dataclass
class ChatCounts:
    """Of the conversations of a corpus, in the order in which they were read.

    Attributes:
        unusable: how many, by the reason.
        first_unusable: the place of the first in its source, from 0.
        dropped: texts that the template left out, by kind.
        first: the first that is usable, with its text.
        counts: what else is worth knowing: `answers`, `tokens`, `learned`, `without_end`,
            `straddling`, `unprompted`, `marked_otherwise`, `untrained`.
    """

    num: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    remedies: dict[str, str] = field(default_factory=dict)
    first_unusable: int | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    first: tuple[Conversation, str] | None = None
    counts: Counter[str] = field(default_factory=Counter)

    def add_unusable(self, found: Unusable, place: int) -> None:
        """One that cannot be learned from, by its place in the source."""
        self.unusable[str(found)] += 1
        self.remedies[str(found)] = found.remedy
        self.first_unusable = min(
            place, place if self.first_unusable is None else self.first_unusable
        )

    @property
    def share_learned(self) -> float:
        """Of the tokens, those that count."""
        return self.counts["learned"] / max(1, self.counts["tokens"])

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "num_conversations": self.num,
            "unusable": dict(self.unusable),
            "dropped": dict(self.dropped),
            **{f"num_{name}": number for name, number in sorted(self.counts.items())},
        }

    def refuse(self, source: str) -> None:
        """Refuse data of which some conversations, or with `drop` all, are unusable.

        Raises:
            UserError: with every reason.
        """
        reasons = "; ".join(f"{reason} ({num:,})" for reason, num in self.unusable.most_common())
        remedies = "".join(f", {one}" for one in dict.fromkeys(self.remedies.values()) if one)
        is_all = self.unusable.total() == self.num
        way_out = "" if is_all else ", or leave them out with --unusable-conversations drop"
        raise UserError(
            f"{self.unusable.total():,} of {self.num:,} conversations of {source} cannot be used, "
            f"the first is number {(self.first_unusable or 0) + 1:,}: {reasons}: mend "
            f"them{remedies}{way_out}"
        )

    def say(self, source: str) -> None:
        """One line on what was read, and one on each thing that is not as one may expect."""
        found = self.counts
        logger.info(
            "%s: %s conversations, %s answers; %s of %s tokens count",
            source,
            f"{self.num - self.unusable.total():,}",
            f"{found['answers']:,}",
            f"{found['learned']:,}",
            f"{found['tokens']:,}",
        )
        for reason, num in self.unusable.most_common():
            logger.warning("%s: %s conversations left out: %s", source, f"{num:,}", reason)
        for kind, num in self.dropped.items():
            logger.log(
                logging.INFO if kind == THOUGHT else logging.WARNING,
                "%s: the chat template leaves out %s texts of kind %s",
                *(source, f"{num:,}", kind),
            )
        for name, sentence in _REMARKS.items():
            if found[name]:
                logger.info("%s: %s %s", source, f"{found[name]:,}", sentence)


_REMARKS = {
    "without_end": "answers have no end of their turn behind them, so none is learned",
    "straddling": "tokens hold an answer's beginning and what is before: they are not learned",
    "unprompted": "answers stand behind another text than the model is prompted with",
    "marked_otherwise": "conversations are marked otherwise by the template's own marks, which are "
    "not gone by",
    "untrained": "answers are empty and teach nothing",
}


@dataclass(frozen=True, kw_only=True)
class ChatReading:
    """How conversations become tokens of which some count.

    Attributes:
        config: what was asked for.
        template: the teacher's, or the one that was given.
        tokenizer: its tokens.
        max_length: the most of a sample.
    """

    config: ChatConfig
    template: ChatTemplate
    tokenizer: ChatTokenizer
    max_length: int

    @classmethod
    def of(
        cls,
        config: ChatConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_ids: Sequence[int],
        max_length: int,
    ) -> ChatReading:
        """A teacher's; a template that was given becomes its tokenizer's own.

        Args:
            config: what was asked for.
            tokenizer: of the teacher.
            end_ids: tokens that end what it writes.
            max_length: the most tokens of a sample.

        Raises:
            UserError: if there is no template, or what it is given cannot be.
        """
        if config.chat_template is not None:
            try:
                tokenizer.chat_template = config.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"--chat-template {config.chat_template} cannot be read "
                    f"({first_line(error)}): give a file of a Jinja template"
                ) from error
        if not tokenizer.chat_template:
            raise UserError(
                "the teacher's tokenizer has no chat template, and conversations are rendered with "
                "one: give --chat-template FILE"
            )
        _require_template(tokenizer)
        named = [str(tokenizer.convert_ids_to_tokens(one)) for one in end_ids]
        own = tokenizer.eos_token
        ends = dict.fromkeys(
            [*([own] if isinstance(own, str) else []), *named, *config.end_of_turn]
        )
        return cls(
            config=config,
            template=ChatTemplate(
                tokenizer=tokenizer,
                variables=config.variables,
                today=config.today,
                ends=tuple(ends),
            ),
            tokenizer=ChatTokenizer(tokenizer),
            max_length=max_length,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides tokens and what counts, for the fingerprint."""
        template, config = self.template, self.config
        return {
            "version": VERSION,
            "template_sha256": template.sha256,
            "variables": dict(template.variables),
            "loss_on": config.loss_on,
            **({"date": config.chat_date} if template.reads_the_date else {}),
            **({} if config.loss_on == "all" else {"ends": list(template.ends)}),
            **(
                {"template_may_drop": sorted(config.template_may_drop)}
                if config.template_may_drop
                else {}
            ),
        }

    def record(self, counts: ChatCounts) -> ChatRecord:
        """For who reads the cache or its student, with a conversation to compare templates by."""
        assert counts.first is not None, "a corpus without any usable one is refused"
        conversation, text = counts.first
        return ChatRecord(
            template_sha256=self.template.sha256,
            variables=dict(self.template.variables),
            date=self.config.chat_date,
            ends=self.template.ends,
            loss_on=self.config.loss_on,
            messages=conversation.messages,
            tools=conversation.tools,
            text=text,
        )

    def read(self, conversation: Conversation, counts: ChatCounts) -> ReadConversation:
        """One conversation.

        Raises:
            Unusable: if it cannot be learned from.
        """
        messages, tools = conversation.messages, conversation.tools
        try:
            if self.config.loss_on == "all":
                told = self.template.rendered(messages, tools=tools)
                ids = self.tokenizer.whole(told.text)
                tokens = ChatTokens(ids=ids, is_learned=np.ones(len(ids), bool), num_straddling=0)
                answers: Sequence[Answer] = ()
            else:
                told = self.template.told(messages, tools=tools)
                answers = self._asked_for(messages, told)
                tokens = self.tokenizer.tokens(told, answers)
        except Untold as error:
            raise Unusable(str(error)) from error
        self._refuse_dropped(told)
        self._refuse_long(tokens)
        counts.first = counts.first or (conversation, told.text)
        counts.dropped.update(told.dropped)
        counts.counts.update(
            answers=sum(one["role"] == ASSISTANT for one in messages),
            tokens=len(tokens.ids),
            learned=int(tokens.is_learned.sum()),
            without_end=sum(not one.has_end for one in answers),
            unprompted=sum(not one.is_prompted for one in answers),
            straddling=tokens.num_straddling,
            marked_otherwise=told.is_marked_otherwise,
            untrained=sum(map(_is_empty_answer, messages)) if answers else 0,
        )
        return ReadConversation(text=told.text, tokens=tokens)

    def _asked_for(self, messages: Sequence[Message], told: Told) -> tuple[Answer, ...]:
        if not any(one["role"] == ASSISTANT for one in messages):
            raise Unusable("it has no answer")
        if self.config.loss_on == "completion":
            if messages[-1]["role"] != ASSISTANT:
                raise Unusable("it does not end with an answer")
            if _is_empty_answer(messages[-1]):
                raise Unusable("its last answer is empty")
        if all(map(_is_empty_answer, filter(_is_assistants, messages))):
            raise Unusable("all its answers are empty")
        if not told.answers:
            raise Unusable("the template drops all its answers")
        return told.answers[-1:] if self.config.loss_on == "completion" else told.answers

    def _refuse_dropped(self, told: Told) -> None:
        for kind in told.dropped:
            if kind != THOUGHT and kind not in self.config.template_may_drop:
                what = "tools" if kind == "tools" else f"text of kind {kind}"
                raise Unusable(
                    f"the chat template leaves out its {what}",
                    f"give a --chat-template that writes it, let that pass with "
                    f"--template-may-drop {kind}",
                )

    def _refuse_long(self, tokens: ChatTokens) -> None:
        longest = self.max_length
        if len(tokens.ids) <= longest:
            return
        what = "is longer"
        if not tokens.is_learned[:longest].any():
            what = "has a prompt that is longer"
        raise Unusable(
            f"it {what} than a sample of {longest:,} tokens, and a conversation is never cut",
            "raise --max-length",
        )


def _is_assistants(message: Message) -> bool:
    return message["role"] == ASSISTANT


def _is_empty_answer(message: Message) -> bool:
    texts = (message.get("content", ""), message.get(THOUGHTS[0], ""))
    return (
        _is_assistants(message) and not any(map(str.strip, texts)) and ("tool_calls" not in message)
    )


def _require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that cannot be parsed.

    Raises:
        UserError: saying what is wrong with it.
    """
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        _compile_jinja_template(tokenizer.get_chat_template(None, tools=None))
    except (TemplateError, ValueError) as error:
        raise UserError(
            f"the chat template cannot be read ({first_line(error)}): give another with "
            "--chat-template FILE"
        ) from error
