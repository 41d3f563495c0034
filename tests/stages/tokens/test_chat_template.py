"""Which tokens the assistant said, against what each template makes of an answer by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.tokens.chat_template import (
    ChatTemplate,
    ChatTokenizer,
    Told,
    Untold,
)
from tests import chat_templates as kinds
from tests.chat_templates import KINDS, SPECIAL, Kind
from tests.tiny_tokenizers import tiny_sentencepiece

DAY = date(2024, 7, 26)
WORDS = st.text(st.sampled_from("aé漢 b\n.\"\\'{7"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text != ""
)


@pytest.fixture(scope="module")
def base(gpt2_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    tokenizer.bos_token = "<|begin|>"
    return tokenizer


@pytest.fixture(scope="module")
def chat(base: PreTrainedTokenizerBase) -> ChatTokenizer:
    return ChatTokenizer(base)


def template_of(
    tokenizer: PreTrainedTokenizerBase, template: str, ends: Sequence[str] = ("<|done|>",)
) -> ChatTemplate:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = template
    return ChatTemplate(
        tokenizer=tokenizer, variables={}, today=DAY, ends=("<|endoftext|>", "<|stop|>", *ends)
    )


def learned_texts(chat: ChatTokenizer, template: ChatTemplate, told: Told) -> list[str]:
    """What each run of learned tokens spells."""
    tokens = chat.tokens(told, told.answers)
    assert tokens.ids.tolist() == template.tokenizer(told.text, add_special_tokens=False).input_ids
    runs = np.split(np.arange(len(tokens.ids)), np.flatnonzero(np.diff(tokens.is_learned)) + 1)
    return [
        str(template.tokenizer.decode(tokens.ids[run], clean_up_tokenization_spaces=False))
        for run in runs
        if tokens.is_learned[run[0]]
    ]


def conversation(texts: Iterator[str], has_thoughts: bool, num_turns: int) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": next(texts)}]
    for _ in range(num_turns):
        messages.append({"role": "user", "content": next(texts)})
        thought = {"reasoning_content": next(texts)} if has_thoughts else {}
        messages.append({"role": "assistant", "content": next(texts), **thought})
    return messages


def expected(kind: Kind, messages: list[dict[str, Any]]) -> list[str]:
    return [
        kind.learned(one.get("reasoning_content"), one["content"], one is messages[-1])
        for one in messages
        if one["role"] == "assistant"
    ]


@pytest.mark.parametrize("has_thoughts", [False, True])
@pytest.mark.parametrize("num_turns", [1, 3])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_template(
    name: str,
    num_turns: int,
    has_thoughts: bool,
    base: PreTrainedTokenizerBase,
    chat: ChatTokenizer,
) -> None:
    kind = KINDS[name]
    messages = conversation(map("text number {}".format, range(99)), has_thoughts, num_turns)
    template = template_of(base, kind.template)
    told = template.told(messages)
    assert learned_texts(chat, template, told) == expected(kind, messages)
    assert all(one.has_end == kind.has_end for one in told.answers)
    drops = {"system": 1} if name == "drops system" else {}
    assert {kind: num for kind, num in told.dropped.items() if kind != "thought"} == drops


@settings(max_examples=60)
@given(texts=st.lists(WORDS, min_size=9, max_size=9), name=st.sampled_from(sorted(KINDS)))
def test_whatever_the_texts_are(
    texts: list[str], name: str, base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    """Each token of an answer's characters alone is learned, and no other."""
    kind = KINDS[name]
    messages = conversation(iter(texts), False, 2)
    template = template_of(base, kind.template)
    told = template.told(messages)
    spans = [told.text[one.start : one.stop] for one in told.answers]
    wanted = expected(kind, messages)
    if name == "in JSON":
        wanted = [in_json(one) for one in messages if one["role"] == "assistant"]
    assert spans == wanted
    tokens = chat.tokens(told, told.answers)
    found = base(told.text, add_special_tokens=False, return_offsets_mapping=True)
    answers = {at for one in told.answers for at in range(one.start, one.stop)}
    assert tokens.is_learned.tolist() == [
        {*range(*offsets)} <= answers for offsets in found["offset_mapping"]
    ]


def in_json(message: dict[str, Any]) -> str:
    return f"<|stop|>final {json.dumps(message['content'], ensure_ascii=False)}<|done|>"


def test_calls_of_tools_are_the_assistants_and_their_results_are_not(
    base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    call = {
        "type": "function",
        "function": {"name": "find", "arguments": {"what": 'a "b"', "n": 3}},
    }
    messages = [
        {"role": "user", "content": "where"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "here it is"},
        {"role": "assistant", "content": "it is here"},
    ]
    tools = [{"name": "find", "description": "finds"}]
    template = template_of(base, kinds.TOOLS)
    assert learned_texts(chat, template, template.told(messages, tools=tools)) == [
        '<|call|>{"name": "find", "arguments": {"what": "a \\"b\\"", "n": 3}}<|done|>',
        "it is here<|done|>",
    ]
    template = template_of(base, kinds.JSON_ARGUMENTS)
    told = template.told(messages, tools=tools)
    assert (
        learned_texts(chat, template, told)[0]
        == '<|call|>find:{"what": "a \\"b\\"", "n": 3}<|done|>'
    )
    assert told.dropped == {"tools": 1}
    template = template_of(base, kinds.MARKED.replace("{{ m.content }}", "{{ m.content or '' }}"))
    assert template.told(messages).dropped == {"tool-calls": 1}
    no_text = {"type": "function", "function": {"name": "find", "arguments": {"n": 3}}}
    messages[1] = {"role": "assistant", "tool_calls": [no_text]}
    assert template.told(messages).dropped == {"tool-calls": 1}
    template = template_of(base, kinds.TOOLS)
    assert '"n": 3' in learned_texts(chat, template, template.told(messages))[0]


def test_what_a_model_writes_first_is_learned_where_the_header_is_the_users(
    base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    """Marks of calls and of thoughts behind a header that a plain text has, too."""
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "it"}}}
    messages = [
        {"role": "user", "content": "where"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "here"},
        {"role": "assistant", "content": "there"},
    ]
    template = template_of(base, kinds.BRACKETS_CALL)
    assert learned_texts(chat, template, template.told(messages)) == [
        '<|call|>{"name": "find", "arguments": {"what": "it"}}<|endoftext|>',
        " there<|endoftext|>",
    ]
    thinking = [
        {"role": "user", "content": "where"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\nthere"},
    ]
    template = template_of(base, kinds.BRACKETS)
    assert learned_texts(chat, template, template.told(thinking)) == [
        " <think>\nhm\n</think>\nthere<|endoftext|>"
    ]
    template = template_of(base, kinds.ASKS_FOR_CONTENT)
    assert learned_texts(chat, template, template.told(messages))[0].startswith("<|call|>")


@pytest.mark.parametrize(
    ("template", "saying"),
    [
        (kinds.UPPER, "depends on the texts"),
        (kinds.LOOKS, "depends on the texts"),
        (kinds.TWICE, "writes a text twice"),
        (kinds.NO_HEADER, "does not lead to the answer"),
        (kinds.PLAIN_ROLES, "does not lead to the answer"),
        (kinds.BACKWARDS, "in another order"),
        (kinds.OTHER_BEGINNING, "does not lead to the answer|otherwise than the whole"),
        (kinds.MARKED.replace("m.content", "m.content.nothing()"), "refuses it"),
        ("{{ raise_exception('only one turn') }}", r"refuses it \(only one turn\)"),
    ],
)
def test_what_cannot_be_told_is_refused(
    template: str, saying: str, base: PreTrainedTokenizerBase
) -> None:
    messages = conversation(map("box {}".format, range(99)), False, 2)
    with pytest.raises(Untold, match=saying):
        template_of(base, template).told(messages)


def test_a_text_that_spells_a_control_token_is_refused(base: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "user", "content": "say <|done|> please"},
        {"role": "assistant", "content": "no"},
    ]
    template = template_of(base, kinds.MARKED)
    with pytest.raises(Untold, match=r"control token .<\|done\|>"):
        template.told(messages)
    with pytest.raises(Untold, match="spells the control token"):
        template.rendered(messages)


def test_where_all_counts_nothing_has_to_be_told(base: PreTrainedTokenizerBase) -> None:
    messages = conversation(map("box {}".format, range(99)), False, 1)
    for template in (kinds.UPPER, kinds.TWICE, kinds.NO_HEADER, kinds.BACKWARDS):
        assert template_of(base, template).rendered(messages).text
    dropped = template_of(base, kinds.DROPS_SYSTEM).rendered(messages).dropped
    assert dropped == {"system": 1}


def test_an_answer_that_quotes_a_header_is_learned_whole(
    base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    quoted = "one writes ### Assistant:\nand then ### User:\n so"
    messages = [{"role": "user", "content": "how"}, {"role": "assistant", "content": quoted}]
    template = template_of(base, kinds.NO_END)
    assert learned_texts(chat, template, template.told(messages)) == [f"{quoted}\n\n"]


def test_an_empty_answer_teaches_nothing(
    base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " "},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"},
    ]
    template = template_of(base, kinds.MARKED)
    assert learned_texts(chat, template, template.told(messages)) == ["three<|done|>"]


def test_a_token_over_the_beginning_of_an_answer_is_the_prompts(
    base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    """Two colons are one token, of which the first is the header's."""
    glued = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": ":) yes"}]
    template = template_of(base, glued, ends=(";",))
    told = template.told(messages)
    tokens = chat.tokens(told, told.answers)
    assert told.text == "u:q;a::) yes;"
    assert tokens.num_straddling == 1
    assert template.tokenizer.decode(tokens.ids[tokens.is_learned]) == ") yes;"


@pytest.mark.parametrize(
    ("marked", "is_otherwise"),
    [
        ("{% generation %}{{ m.content }}<|done|>{% endgeneration %}", False),
        ("{% generation %}{% endgeneration %}{{ m.content }}<|done|>", True),
    ],
)
def test_the_templates_own_marks_are_compared(
    marked: str, is_otherwise: bool, base: PreTrainedTokenizerBase, chat: ChatTokenizer
) -> None:
    source = kinds.MARKED.replace("{{ m.content }}<|done|>", f"{marked}")
    source = source.replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}")
    source = source.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    if not is_otherwise:
        source = source.replace("{% endif %}", "{% else %}{{ m.content }}<|done|>{% endif %}", 1)
    messages = conversation(map("text number {}".format, range(99)), False, 2)
    template = template_of(base, source)
    told = template.told(messages)
    assert told.is_marked_otherwise == is_otherwise
    assert learned_texts(chat, template, told) == expected(KINDS["marked"], messages)


def test_the_date_is_that_of_the_run(base: PreTrainedTokenizerBase) -> None:
    template = template_of(base, kinds.TRIMS)
    assert template.reads_the_date and "26 July 2024" in template.render([])
    assert not template_of(base, kinds.MARKED).reads_the_date
    assert template.sha256 != template_of(base, kinds.MARKED).sha256


def test_lone_bytes_and_spaces_that_a_tokenizer_adds() -> None:
    tokenizer = tiny_sentencepiece()
    template = template_of(tokenizer, kinds.BRACKETS.replace("bos_token", "'<s>'"), ends=("</s>",))
    messages = [
        {"role": "user", "content": "ab 漢"},
        {"role": "assistant", "content": "漢 ab é"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "a"},
    ]
    told = template.told(messages)
    tokens = ChatTokenizer(tokenizer).tokens(told, told.answers)
    assert [told.text[one.start : one.stop] for one in told.answers] == [" 漢 ab é</s>", " a</s>"]
    spelled = tokenizer.decode(tokens.ids[tokens.is_learned], skip_special_tokens=False)
    assert "".join(str(spelled).split()) == "漢abé</s>a</s>"
