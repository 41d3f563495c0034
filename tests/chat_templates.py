"""Chat templates of several kinds, written for the tests, and what each makes of an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SPECIAL = ("<|begin|>", "<|turn|>", "<|done|>", "<|stop|>", "<|call|>", "<think>", "</think>")

# Roles as marked headers, a header of an answer on demand.
MARKED = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# What is asked stands in brackets that end as an answer begins; a system text joins the first.
BRACKETS = (
    "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[ASK] {{ ns.s + m.content }} [/ASK]{% set ns.s = '' %}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Thoughts of all but the last answer are left out.
FORGETS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and m.reasoning_content and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') if not loop.last else m.content }}<|done|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# The prompt begins a thought, which an answer without one does not have.
BEGINS_A_THOUGHT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}<|done|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n<think>\n{% endif %}"
)
# An empty thought in every answer, that the prompt does not have.
EMPTY_THOUGHT = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|done|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Roles in words; nothing ends an answer but what follows.
NO_END = (
    "{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
# Ends of turns that are not the end of text; trims, and dates its system text.
TRIMS = (
    "{{ bos_token }}<|turn|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|stop|>"
    "{% for m in messages %}<|turn|>{{ m.role }}\n\n{{ m.content | trim }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n\n{% endif %}"
)
# Calls of tools in JSON, their results as a user's.
TOOLS = (
    "{% if tools %}<|turn|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|done|>\n"
    "{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|turn|>user\n<result>{{ m.content }}</result><|done|>\n"
    "{% else %}<|turn|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<|call|>{{ c.function | tojson }}{% endfor %}<|done|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# The same for arguments that are text already.
JSON_ARGUMENTS = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name + ':' + c.function.arguments }}"
    "{% endfor %}<|done|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Texts in JSON, and a header with a channel that the prompt leaves to the model.
IN_JSON = (
    "{% for m in messages %}<|turn|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}<|stop|>thought\n{{ m.reasoning_content | tojson }}"
    "<|turn|>assistant{% endif %}<|stop|>final{% endif %} {{ m.content | tojson }}<|done|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant{% endif %}"
)
# A role of its own for answers, and a system text that is left out.
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|turn|>human\n{{ m.content }}<|done|>"
    "{% elif m.role == 'assistant' %}<|turn|>model\n{{ m.content }}<|done|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)

# Brackets again, with calls behind a mark of their own that a model writes, and no text beside.
BRACKETS_CALL = (
    "{% for m in messages %}{% if m.role == 'user' %}[ASK] {{ m.content }}[/ASK]"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.content }}[/RESULT]"
    "{% elif m.tool_calls %}<|call|>{{ m.tool_calls[0].function | tojson }}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# A call of which a template asks for the text, too.
ASKS_FOR_CONTENT = TOOLS.replace("m.content or ''", "m.content.strip()")

# What cannot be told.
UPPER = MARKED.replace("{{ m.content }}", "{{ m.content | upper }}")
LOOKS = MARKED.replace("{{ m.content }}", "{{ m.content }}{% if 'x' in m.content %}!{% endif %}")
TWICE = MARKED.replace("{{ m.content }}", "{{ m.content }}|{{ m.content }}")
NO_HEADER = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content }}{% endfor %}"
BACKWARDS = MARKED.replace("in messages", "in messages[::-1]")
PLAIN_ROLES = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
OTHER_BEGINNING = MARKED.replace("<|turn|>{{ m.role }}", "{{ messages | length }}{{ m.role }}")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A template, and by hand what of it a model is to write.

    Attributes:
        template: its text.
        learned: of an answer's thought (or none) and text, and of whether it is the last message.
        has_end: whether an answer ends with a mark.
    """

    template: str
    learned: Callable[[str | None, str, bool], str]
    has_end: bool = True


def _thought(thought: str | None) -> str:
    return "" if thought is None else f"<think>\n{thought}\n</think>\n"


KINDS = {
    "marked": Kind(template=MARKED, learned=lambda _, text, __: f"{text}<|done|>"),
    "brackets": Kind(template=BRACKETS, learned=lambda _, text, __: f" {text}<|endoftext|>"),
    "forgets": Kind(
        template=FORGETS,
        learned=lambda thought, text, is_last: (
            (f"{_thought(thought)}\n" if thought and is_last else "") + f"{text}<|done|>"
        ),
    ),
    "begins a thought": Kind(
        template=BEGINS_A_THOUGHT,
        learned=lambda thought, text, _: (
            ("" if thought is None else f"{thought}\n</think>\n") + f"{text}<|done|>"
        ),
    ),
    "empty thought": Kind(
        template=EMPTY_THOUGHT,
        learned=lambda _, text, __: f"<think>\n\n</think>\n\n{text}<|done|>",
    ),
    "no end": Kind(template=NO_END, learned=lambda _, text, __: f"{text}\n\n", has_end=False),
    "trims": Kind(template=TRIMS, learned=lambda _, text, __: f"{text.strip()}<|stop|>"),
    "tools": Kind(template=TOOLS, learned=lambda _, text, __: f"{text}<|done|>"),
    "in JSON": Kind(
        template=IN_JSON,
        learned=lambda thought, text, _: (
            ("" if thought is None else f'<|stop|>thought\n"{thought}"<|turn|>assistant')
            + f'<|stop|>final "{text}"<|done|>'
        ),
    ),
    "drops system": Kind(template=DROPS_SYSTEM, learned=lambda _, text, __: f"{text}<|done|>"),
}
