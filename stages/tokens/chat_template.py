"""A chat template: what it makes of a conversation, and which of its characters are whose.

Nothing in a template says which text the model is to write, and headers, prefixes and end marks
mislead (docs/conversations.md). So a conversation is rendered twice, the second time with every
text in it replaced by a fresh word. What stands between the words has to be the same in both, so
each text's place is known without a search for it, and what was dropped is a word that is missing.
An answer begins where the generation prompt of what is before it ends, and ends with the first end
of a turn behind its last word. What cannot be told so is refused with its reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, ValidationError

from teacher_cache.cache.commit import canonical_json, write_json_atomically
from teacher_cache.cache.errors import UserError, first_line
from teacher_cache.stages.config import StageConfig
from teacher_cache.stages.tokens.tokenizers import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
ASSISTANT = "assistant"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; templates read the first two."""
THOUGHT = "thought"
"""Besides `DroppedKind`, the kind of text that templates drop of earlier answers."""
WORD_LENGTH = 14
_KIND_OF_ROLE = {"developer": "system", "function": "tool", ASSISTANT: "answer"}
_MARKS = re.compile(r"\{%-?\s*generation\b")
_THINK = re.compile(r"(</?think>)")
# What a template does with a conversation that it was not written for.
_TEMPLATE_ERRORS = (TypeError, KeyError, ValueError, AttributeError, IndexError)


def listed_ids(ids: int | list[int] | None) -> list[int]:
    """Ends of text as a generation configuration has them."""
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


class Untold(Exception):
    """Which tokens of a conversation are the assistant's cannot be told; says why."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A text of a conversation, without the whitespace around it.

    Attributes:
        message: index of its message.
        kind: a `DroppedKind`, or `THOUGHT`.
        text: not empty.
    """

    message: int
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the assistant said in one message.

    Attributes:
        start: of its first character in the rendered text, behind the header.
        stop: one past its last, the end of the turn included.
        leaves: where its texts are, in order.
        has_end: whether an end of the turn is part of it.
        is_prompted: whether the text before it is what the model would be given to go on with.
    """

    start: int
    stop: int
    leaves: tuple[tuple[int, int], ...]
    has_end: bool
    is_prompted: bool


@dataclass(frozen=True, kw_only=True)
class Told:
    """A rendered conversation.

    Attributes:
        text: what the teacher reads.
        answers: in order; those without any text are left out.
        others: where texts of other roles are, in order.
        dropped: by kind, how many texts the template leaves out.
        is_marked_otherwise: whether the template's own marks, where it has any, are around other
            texts than the answers'.
    """

    text: str
    answers: tuple[Answer, ...]
    others: tuple[tuple[int, int], ...]
    dropped: Mapping[str, int]
    is_marked_otherwise: bool = False


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How one teacher's conversations become text.

    Attributes:
        tokenizer: whose template it is.
        variables: that the template is given besides.
        today: what it takes for the date.
        ends: strings that end a turn of the assistant's.
    """

    tokenizer: PreTrainedTokenizerBase
    variables: Mapping[str, Any]
    today: date
    ends: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the template, or of all of a tokenizer's that has several."""
        source = self.tokenizer.chat_template
        text = source if isinstance(source, str) else canonical_json(source)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def reads_the_date(self) -> bool:
        """Whether what it writes depends on it."""
        return "strftime_now" in canonical_json(self.tokenizer.chat_template)

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, has_prompt: bool = False
    ) -> str:
        """What the teacher reads of messages.

        Args:
            messages: with `tool_calls` whose arguments are mappings; a template that wants them as
                JSON gets that.
            tools: schemas of functions, or none.
            has_prompt: whether the header of an answer stands behind.

        Raises:
            Untold: if the template refuses them.
        """
        calls = [one["function"]["arguments"] for one in _calls(messages)]
        # A message that only calls has no text; some templates ask for one all the same.
        with_content = [{"content": "", **one} for one in messages]
        forms = [messages]
        if calls:
            forms += [with_content, *map(_with_json_arguments, (messages, with_content))]
        refusals: list[Untold] = []
        for form in forms:
            try:
                text = self._rendered(form, tools, has_prompt)
            except Untold as error:
                refusals.append(error)
                continue
            # As Python writes a mapping, where nothing of it was to be written so.
            if not any(one and str(one) in text and _json(one) not in text for one in calls):
                return text
        raise refusals[0] if refusals else Untold("the template writes arguments as Python does")

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Any,
        has_prompt: bool,
        marks: list[tuple[int, int]] | None = None,
    ) -> str:
        """As `render`, in this form; `marks` gets what the template marks for the model's."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import _compile_jinja_template

        source = self.tokenizer.get_chat_template(None, tools=tools)
        compiled = _compile_jinja_template(source)
        blocks: list[str] = []
        marking = (
            nullcontext() if marks is None else compiled.environment.activate_tracker(blocks, marks)
        )
        try:
            with marking:
                for block in compiled.generate(
                    **{**self.tokenizer.special_tokens_map, **self.variables},
                    messages=[_with_thoughts(one) for one in messages],
                    tools=tools,
                    documents=None,
                    add_generation_prompt=has_prompt,
                    # Not through `apply_chat_template`, which takes no function.
                    strftime_now=self.today.strftime,
                ):
                    blocks.append(block)
                return "".join(blocks)
        except (TemplateError, *_TEMPLATE_ERRORS) as error:
            raise Untold(f"the template refuses it ({first_line(error)})") from error

    def rendered(self, messages: Sequence[Message], *, tools: Any = None) -> Told:
        """A conversation of which everything counts: no answer is looked for.

        Raises:
            Untold: if the template refuses it, or a text spells a control token.
        """
        text, second = self._twice(messages, tools)
        dropped = second.dropped(tools is not None and self._drops_tools(second, tools))
        return Told(text=text, answers=(), others=(), dropped=dropped)

    def told(self, messages: Sequence[Message], *, tools: Any = None) -> Told:
        """A conversation with the places of its answers.

        Raises:
            Untold: if the template refuses it, or they cannot be told.
        """
        text, second = self._twice(messages, tools)
        places = second.places(text)
        found = sorted(places, key=places.__getitem__)
        order = [second.leaves[idx].message for idx in found]
        if order != sorted(order):
            raise Untold("the template writes messages in another order")
        by_message: dict[int, list[int]] = {}
        for idx in found:
            by_message.setdefault(second.leaves[idx].message, []).append(idx)
        answers = tuple(
            self._answer(number, second, found, places, tools)
            for number, message in enumerate(messages)
            if message["role"] == ASSISTANT and number in by_message
        )
        others = [places[idx] for idx in found if not second.is_answers(idx)]
        return Told(
            text=text,
            answers=answers,
            others=tuple(others),
            is_marked_otherwise=self._is_marked_otherwise(second, tools),
            dropped=second.dropped(tools is not None and self._drops_tools(second, tools)),
        )

    def _is_marked_otherwise(self, second: _Second, tools: Any) -> bool:
        marks: list[tuple[int, int]] = []
        if not _MARKS.search(canonical_json(self.tokenizer.chat_template)):
            return False
        # Of the words, which stand for the texts; in whichever form the template takes.
        forms = (second.messages, _with_json_arguments(second.messages))
        for form in forms:
            marks.clear()
            if self._rendered(form, tools, False, marks) == second.text:
                break
        marked = {
            leaf
            for leaf, start, stop in second.spans()
            for a, b in marks
            if a <= start and stop <= b
        }
        theirs = {leaf for leaf, *_ in second.spans() if second.is_answers(leaf)}
        return marked != theirs

    def _twice(self, messages: Sequence[Message], tools: Any) -> tuple[str, _Second]:
        text = self.render(messages, tools=tools)
        second = _Second.of(messages, avoid=text)
        for leaf in second.leaves:
            spelled = self._control.search(leaf.text)
            if spelled is not None:
                raise Untold(f"a text spells the control token {spelled.group()!r}")
        second.read(self.render(second.messages, tools=tools))
        return text, second

    def _drops_tools(self, second: _Second, tools: Any) -> bool:
        return bool(tools) and self.render(second.messages) == second.text

    def _answer(
        self,
        number: int,
        second: _Second,
        found: list[int],
        places: Mapping[int, tuple[int, int]],
        tools: Any,
    ) -> Answer:
        """That of one message, whose texts are there."""
        own = [idx for idx in found if second.leaves[idx].message == number]
        first, last = found.index(own[0]), found.index(own[-1])
        before = found[first - 1] if first else None
        gap, gap_at = second.gap(first), second.gap_start(first)
        prompt = self.render(second.messages[:number], tools=tools, has_prompt=True)
        plain = self.render(second.messages[:number], tools=tools) if number else ""
        tail, plain_tail = (second.behind(one, before) for one in (prompt, plain))
        length = _outside_marks(gap, _num_common(tail, gap))
        has_header = length > len(plain_tail)
        # A header may be part of what is before, as Mistral's and Llama 2's.
        is_passed = has_header or (
            length == len(tail)
            and not (
                gap[length:].strip()
                and self._plain_gap(number, second, before, tools, gap[:length])
            )
        )
        if not is_passed:
            raise Untold("the template's generation prompt does not lead to the answer")
        behind = second.gap(last + 1)
        stop, has_end = self._end(number, second, own[-1], behind, found, last, tools)
        text_start = places[own[0]][0] - (len(gap) - length)
        return Answer(
            start=text_start,
            stop=places[own[-1]][1] + stop,
            leaves=tuple(places[idx] for idx in own),
            has_end=has_end,
            is_prompted=second.text[: gap_at + length] == prompt,
        )

    def _plain_gap(
        self, number: int, second: _Second, before: int | None, tools: Any, header: str
    ) -> str:
        """What would stand behind a header before a plain text; all of it if it begins otherwise.

        Calls and thoughts begin with marks that the model writes, and a plain text with none.
        """
        plain = [*second.messages[:number], {"role": ASSISTANT, "content": second.spare}]
        text = self.render(plain, tools=tools).partition(second.spare)[0]
        gap = second.behind(text, before)
        return gap[len(header) :].strip() if gap.startswith(header) else gap or header or "nothing"

    def _end(
        self,
        number: int,
        second: _Second,
        own: int,
        behind: str,
        found: list[int],
        last: int,
        tools: Any,
    ) -> tuple[int, bool]:
        """How far behind its last text a turn goes, and whether with an end."""
        at = [(behind.find(end), len(end)) for end in self.ends]
        ends = [(start, start + length) for start, length in at if start >= 0]
        following = found[last + 1 :]
        is_next = bool(following) and second.leaves[following[0]].message == number + 1
        is_last = number + 1 == len(second.messages)
        if ends and (is_next or is_last):
            return min(ends)[1], True
        alone = self.render(second.messages[: number + 1], tools=tools)
        common = _outside_marks(behind, _num_common(second.behind(alone, own), behind))
        # A message without any text lies between: what ends there may be its.
        if ends and min(ends)[1] <= common:
            return min(ends)[1], True
        return common, False

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Spellings of tokens that a template writes, and a text must not."""
        source = canonical_json(self.tokenizer.chat_template)
        special = special_ids(self.tokenizer)
        spellings = {
            token.content
            for token_id, token in self.tokenizer.added_tokens_decoder.items()
            if token.content.strip() and (token_id in special or token.content in source)
        }
        longest_first = sorted(spellings, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


class _Second:
    """A conversation whose texts are words.

    Args:
        messages: with the words.
        leaves: the texts.
        words: one each.
        spare: a further word.
    """

    def __init__(self, messages: list[Message], leaves: list[Leaf], words: list[str], spare: str):
        self.messages = messages
        self.spare = spare
        self.leaves = leaves
        self._words = words
        self._pattern = re.compile("|".join(words) or r"(?!)")
        self.text = ""
        self._found: list[tuple[int, int]] = []  # where a word begins, and which

    @classmethod
    def of(cls, messages: Sequence[Message], *, avoid: str) -> _Second:
        """Of messages, by words that are not in a text."""
        leaves: list[Leaf] = []
        words: list[str] = []
        fresh = _fresh_words(avoid)

        def replaced(leaf: Leaf) -> str:
            leaves.append(leaf)
            words.append(next(fresh))
            return words[-1]

        second = [_with_texts(number, one, replaced) for number, one in enumerate(messages)]
        return cls(second, leaves, words, next(fresh))

    def read(self, text: str) -> None:
        """What the template makes of them."""
        numbers = {word: idx for idx, word in enumerate(self._words)}
        self.text = text
        self._found = [
            (match.start(), numbers[match.group()]) for match in self._pattern.finditer(text)
        ]

    def spans(self) -> Iterator[tuple[int, int, int]]:
        """Of the words that are there: which leaf, and where."""
        yield from ((idx, start, start + WORD_LENGTH) for start, idx in self._found)

    def is_answers(self, leaf: int) -> bool:
        """Whether the assistant said it."""
        return self.messages[self.leaves[leaf].message]["role"] == ASSISTANT

    def gap_start(self, place: int) -> int:
        """Where what is before the word of that place begins, of those that are there."""
        return self._found[place - 1][0] + WORD_LENGTH if place else 0

    def gap(self, place: int) -> str:
        """What stands between the word before a place and its own; the rest behind the last."""
        stop = self._found[place][0] if place < len(self._found) else len(self.text)
        return self.text[self.gap_start(place) : stop]

    def places(self, text: str) -> dict[int, tuple[int, int]]:
        """By leaf, where it stands in the true text; those that were dropped have none.

        Raises:
            Untold: if something else than the texts differs, or one is there twice.
        """
        if len({idx for _, idx in self._found}) < len(self._found):
            raise Untold("the template writes a text twice")
        found: dict[int, tuple[int, int]] = {}
        at = len(self.gap(0))
        same = text.startswith(self.gap(0))
        for place, (_, idx) in enumerate(self._found):
            behind = self.gap(place + 1)
            is_last = place + 1 == len(self._found)
            spelled = next(
                (
                    one
                    for one in _spellings(self.leaves[idx].text)
                    if text.startswith(one, at)
                    and text.startswith(behind, at + len(one))
                    and (not is_last or at + len(one) + len(behind) == len(text))
                ),
                None,
            )
            if not same or spelled is None:
                raise Untold("what the template writes depends on the texts")
            found[idx] = (at, at + len(spelled))
            at += len(spelled) + len(behind)
        if not self._found and text != self.text:
            raise Untold("what the template writes depends on the texts")
        return found

    def behind(self, rendered: str, leaf: int | None) -> str:
        """What stands behind the last word of a rendering, which is that leaf's.

        Raises:
            Untold: if it is another's.
        """
        last = next(iter(deque(self._pattern.finditer(rendered), maxlen=1)), None)
        word = None if leaf is None else self._words[leaf]
        if (None if last is None else last.group()) != word:
            raise Untold("the template writes a beginning otherwise than the whole")
        return rendered if last is None else rendered[last.end() :]

    def dropped(self, are_tools: bool) -> dict[str, int]:
        """By kind, texts that are not there."""
        there = {idx for _, idx in self._found}
        found: dict[str, int] = {"tools": 1} if are_tools else {}
        for idx, leaf in enumerate(self.leaves):
            if idx not in there:
                found[leaf.kind] = found.get(leaf.kind, 0) + 1
        return found


def _with_texts(number: int, message: Message, replaced: Callable[[Leaf], str]) -> Message:
    """A message with other texts; whitespace around them, empty ones and all else stay."""
    own = _KIND_OF_ROLE.get(message["role"], message["role"])

    def core(text: str, kind: str) -> str:
        inner = text.strip()
        if not inner:
            return text
        start = text.index(inner)
        word = replaced(Leaf(message=number, kind=kind, text=inner))
        return text[:start] + word + text[start + len(inner) :]

    found = dict(message)
    if isinstance(message.get(THOUGHTS[0]), str):
        found[THOUGHTS[0]] = core(message[THOUGHTS[0]], THOUGHT)
    if isinstance(message.get("content"), str):
        found["content"] = _around_thoughts(message["content"], own, core)
    if message.get("tool_calls"):
        found["tool_calls"] = [_with_arguments(one, core) for one in message["tool_calls"]]
    return found


def _around_thoughts(content: str, kind: str, core: Callable[[str, str], str]) -> str:
    parts = _THINK.split(content)
    is_thought = [idx > 0 and parts[idx - 1] == "<think>" for idx in range(len(parts))]
    if "</think>" in parts and "<think>" not in parts:  # the prompt began it
        is_thought[0] = True
    kinds = [THOUGHT if one and kind == "answer" else kind for one in is_thought]
    return "".join(
        one if _THINK.fullmatch(one) else core(one, its)
        for one, its in zip(parts, kinds, strict=True)
    )


def _with_arguments(call: Message, core: Callable[[str, str], str]) -> Message:
    """A call whose arguments' texts are others; its name, where they have no text."""
    num = 0

    def one(value: Any) -> Any:
        nonlocal num
        if isinstance(value, str):
            num += bool(value.strip())
            return core(value, "tool-calls")
        if isinstance(value, Mapping):
            return {key: one(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [one(inner) for inner in value]
        return value

    function = call["function"]
    arguments = one(function["arguments"])
    name = function["name"] if num else core(function["name"], "tool-calls")
    return {**call, "function": {**function, "name": name, "arguments": arguments}}


def _with_thoughts(message: Message) -> Message:
    """With its reasoning under both names that templates read."""
    thought = message.get(THOUGHTS[0])
    return message if thought is None else {THOUGHTS[1]: thought, **message}


def _calls(messages: Sequence[Message]) -> Iterator[Message]:
    for message in messages:
        yield from message.get("tool_calls", ())


def _with_json_arguments(messages: Sequence[Message]) -> list[Message]:
    def written(call: Message) -> Message:
        function = call["function"]
        return {**call, "function": {**function, "arguments": _json(function["arguments"])}}

    return [
        {**one, "tool_calls": [written(call) for call in one["tool_calls"]]}
        if "tool_calls" in one
        else one
        for one in messages
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _spellings(text: str) -> Iterator[str]:
    """A text as it is, and in JSON once or twice."""
    yield text
    for is_ascii in (False, True):
        once = json.dumps(text, ensure_ascii=is_ascii)[1:-1]
        yield once
        yield json.dumps(once, ensure_ascii=is_ascii)[1:-1]


def _fresh_words(avoid: str) -> Iterator[str]:
    """Words of lower-case letters that are in no text; the same each time."""
    for number in count():
        digest = hashlib.sha256(str(number).encode()).digest()[:WORD_LENGTH]
        word = "".join(chr(ord("a") + byte % 26) for byte in digest)
        if word not in avoid:
            yield word


def _num_common(a: str, b: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _outside_marks(text: str, length: int) -> int:
    """A place in a text, moved back to the beginning of the `<mark>` or `[mark]` that it is in."""
    for opening, closing in ("<>", "[]"):
        start = text.rfind(opening, 0, length)
        is_mark = start >= 0 and re.match(rf"[^\s{closing}]*\{closing}", text[start:])
        if is_mark and closing not in text[start:length]:
            length = start
    return length


CHAT_FILE = "chat.json"


class ChatRecord(StageConfig):
    """How conversations were read; `chat.json` in a cache's `teacher` folder and beside a student.

    The template itself is the tokenizer's, which lies there too.
    """

    template_sha256: str = Field(description="of the chat template")
    variables: dict[str, Any] = Field(description="that it is given besides")
    date: str = Field(description="that it takes for today")
    ends: tuple[str, ...] = Field(description="strings that end an answer")
    loss_on: str = Field(description="what counts: all, assistant or completion")
    messages: tuple[Message, ...] = Field(description="a conversation of the corpus")
    tools: list[Any] | None = Field(default=None, description="its tools")
    text: str = Field(description="what the template made of it")

    @classmethod
    def read(cls, folder: Path) -> ChatRecord | None:
        """Of a folder; None where texts were read.

        Raises:
            UserError: if it cannot be understood.
        """
        path = folder / CHAT_FILE
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}): restore it, or make the folder again"
            ) from error

    def write(self, folder: Path) -> None:
        """Commit it.

        Raises:
            UserError: where the file system refuses.
        """
        write_json_atomically(folder / CHAT_FILE, self.model_dump(mode="json"))

    def template(self, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """A tokenizer's template, used in this way."""
        return ChatTemplate(
            tokenizer=tokenizer,
            variables=self.variables,
            today=date.fromisoformat(self.date),
            ends=self.ends,
        )


@dataclass(frozen=True, kw_only=True)
class ChatTokens:
    """A conversation's tokens.

    Attributes:
        ids: uint32 [T].
        is_learned: bool [T], those of the answers that are asked for.
        num_straddling: tokens over the border of an answer's beginning, which are not learned.
    """

    ids: np.ndarray
    is_learned: np.ndarray
    num_straddling: int


class ChatTokenizer:
    """Tokens of rendered conversations: of the whole text at once, and nothing put around it.

    Args:
        tokenizer: of the teacher.

    Raises:
        UserError: if it does not say where in a text its tokens are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens are, so those "
                "of the answers are not known: give a teacher with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
        saved = json.loads(backend.to_str())
        # What puts special tokens around a text also trims the whitespace off its tokens' places.
        saved |= dict.fromkeys(("post_processor", "truncation", "padding"))
        self._untrimmed = type(backend).from_str(json.dumps(saved))

    def whole(self, text: str) -> np.ndarray:
        """The ids of a text, uint32 [T]."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, np.uint32)

    def tokens(self, told: Told, answers: Sequence[Answer]) -> ChatTokens:
        """The tokens of a conversation, those of some answers learned.

        Raises:
            Untold: if tokens and text do not fit, or a token has parts of an answer's and of
                another text.
        """
        ids = self.whole(told.text)
        encoded = self._untrimmed.encode(told.text, add_special_tokens=False)
        if ids.tolist() != encoded.ids:
            raise Untold("the tokenizer does not say where its tokens are")
        starts, stops = _tiled(encoded.offsets, told.text)
        is_learned = np.zeros(len(ids), bool)
        num_straddling = 0
        for answer in answers:
            inside = (starts >= answer.start) & (stops <= answer.stop)
            inside &= (stops > starts) | ((starts > answer.start) & (starts < answer.stop))
            over_end = (starts < answer.stop) & (stops > answer.stop)
            if over_end.any():
                raise Untold("a token holds an answer's end and what is behind")
            num_straddling += int(((starts < answer.start) & (stops > answer.start)).sum())
            if not inside.any():
                raise Untold("an answer has no token of its own")
            self._verify(told, answer, ids[inside], starts[inside])
            is_learned |= inside
        touched = _covered(told.others, starts[is_learned], stops[is_learned])
        if touched:
            raise Untold("a token holds an answer's text and another's")
        return ChatTokens(ids=ids, is_learned=is_learned, num_straddling=num_straddling)

    def _verify(self, told: Told, answer: Answer, ids: np.ndarray, starts: np.ndarray) -> None:
        """Its tokens spell it, but for one over its beginning."""
        wanted = told.text[int(starts[0]) : answer.stop]
        spelled = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if "".join(str(spelled).split()) != "".join(wanted.split()):
            raise Untold("an answer's tokens do not spell it")
        if any(stop <= int(starts[0]) for _, stop in answer.leaves):
            raise Untold("an answer's text is not among its tokens")


def _tiled(offsets: Sequence[tuple[int, int]], text: str) -> tuple[np.ndarray, np.ndarray]:
    """[T] where each token begins and ends, so that all of them are the text.

    Raises:
        Untold: if something that is not whitespace is of no token.
    """
    starts, stops, at = [], [], 0
    for start, stop in offsets:
        if start > at and text[at:start].strip():
            raise Untold("the tokenizer does not say where its tokens are")
        # Several tokens may be of one character.
        starts.append(min(start, at))
        at = max(at, stop)
        stops.append(at)
    if text[at:].strip():
        raise Untold("the tokenizer does not say where its tokens are")
    return np.array(starts, np.int64), np.array(stops, np.int64)


def _covered(places: Sequence[tuple[int, int]], starts: np.ndarray, stops: np.ndarray) -> bool:
    """Whether any token has a part of any place; both are in order."""
    begins = [start for start, _ in places]
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        idx = bisect_left(begins, stop)
        if idx and places[idx - 1][1] > start:
            return True
    return False
