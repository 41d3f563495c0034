import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packaged.packages import fetch
from teacher_cache.stages.join.teacher_folder import (
    CachedTokenization,
    choose_probe,
    read_tokenization,
    write_tokenization,
)
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes
from tests.tiktoken_file import read_tiktoken
from tests.tiny_tokenizers import tiny_sentencepiece

MAX_LENGTH = 32
TEXTS = [
    "The film is a joy, from the first scene to the last.",
    "Amélie's café — naïve, résumé, Zoë — is «déjà vu».",
    "DREADFUL. Nobody should have to see this TWICE!",
    "short",
    " ".join(f"part {num} of a long review" for num in range(20)),
]


@dataclass(frozen=True)
class TokenizedSample:
    input_ids: Sequence[int]


def corpus() -> list[Document]:
    return [
        Document(text=text, source="texts", split="train", position=position)
        for position, text in enumerate(TEXTS)
    ]


@pytest.fixture
def bert(bert_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the session's tokenizer, to be changed at will."""
    return copy.deepcopy(bert_tokenizer)


@pytest.fixture(scope="session")
def write_cached() -> Callable[[Path, PreTrainedTokenizerBase], CachedTokenization]:
    """Write a tokenizer, and the probe of `TEXTS`, as stage one would, and read it back."""

    def write(folder: Path, tokenizer: PreTrainedTokenizerBase) -> CachedTokenization:
        encoded = tokenizer(TEXTS, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        probe = choose_probe(corpus(), [TokenizedSample(ids) for ids in encoded])
        write_tokenization(folder, tokenizer, max_length=MAX_LENGTH, probe=probe)
        return read_tokenization(folder)

    return write


@pytest.fixture(scope="session")
def cached_bert(
    bert_tokenizer: PreTrainedTokenizerBase,
    write_cached: Callable[[Path, PreTrainedTokenizerBase], CachedTokenization],
    tmp_path_factory: pytest.TempPathFactory,
) -> CachedTokenization:
    """What a cache made with MiniLM's tokenizer knows of its tokens."""
    return write_cached(tmp_path_factory.mktemp("teacher"), copy.deepcopy(bert_tokenizer))


@pytest.fixture(scope="session")
def gpt2_table(gpt2_tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    return token_bytes(gpt2_tokenizer)


@pytest.fixture(scope="session")
def bert_table(bert_tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    return token_bytes(bert_tokenizer)


@pytest.fixture(scope="session")
def smollm2_table(smollm2_tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
    return token_bytes(smollm2_tokenizer)


@pytest.fixture(scope="session")
def qwen_table() -> TokenBytes:
    """Qwen's 151,643 tokens of text, without its special ones."""
    return read_tiktoken(fetch("qwen-table") / "qwen.tiktoken")


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerBase:
    """`tiny_sentencepiece`."""
    return tiny_sentencepiece()


@pytest.fixture(scope="session")
def named(
    gpt2_tokenizer: PreTrainedTokenizerBase,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    bert_tokenizer: PreTrainedTokenizerBase,
    sentencepiece: PreTrainedTokenizerBase,
) -> dict[str, tuple[PreTrainedTokenizerBase, TokenBytes]]:
    """Every kind of tokenizer, with its table."""
    tokenizers = {
        "gpt2": gpt2_tokenizer,
        "smollm2": smollm2_tokenizer,
        "bert": bert_tokenizer,
        "sentencepiece": sentencepiece,
    }
    return {name: (tokenizer, token_bytes(tokenizer)) for name, tokenizer in tokenizers.items()}
