import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.join.teacher_folder import (
    CachedTokenization,
    choose_probe,
    read_tokenization,
)
from teacher_cache.stages.tokens.record import describe, id_to_string
from tests.stages.join.conftest import MAX_LENGTH, TEXTS, TokenizedSample

Write = Callable[[Path, PreTrainedTokenizerBase], CachedTokenization]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_written_is_read_back(
    bert: PreTrainedTokenizerBase, write_cached: Write, tmp_path: Path
) -> None:
    cached = write_cached(tmp_path, bert)
    assert cached.record == describe(bert, max_length=MAX_LENGTH)
    assert cached.table == id_to_string(bert)
    assert [document.text for document in cached.probe] == TEXTS
    assert max(len(document.input_ids) for document in cached.probe) == MAX_LENGTH


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_tokenizer_comes_back_the_same(
    kind: str, request: pytest.FixtureRequest, write_cached: Write, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(request.getfixturevalue(f"{kind}_tokenizer"))
    tokenizer.truncation_side = tokenizer.padding_side = "left"
    tokenizer.model_max_length = 77
    cached = write_cached(tmp_path, tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert describe(again, max_length=MAX_LENGTH) == cached.record
    written = _contents(tmp_path)
    write_cached(tmp_path / "again", again)
    assert _contents(tmp_path / "again") == written


def test_bytes_do_not_depend_on_how_the_tokenizer_was_loaded_or_used(
    minilm_dir: Path, write_cached: Write, tmp_path: Path
) -> None:
    fresh = AutoTokenizer.from_pretrained(minilm_dir)
    used = AutoTokenizer.from_pretrained(str(minilm_dir), local_files_only=True)
    used(["some", "texts of some length"], padding="max_length", truncation=True, max_length=9)
    write_cached(tmp_path / "fresh", fresh)
    write_cached(tmp_path / "used", used)
    assert _contents(tmp_path / "fresh") == _contents(tmp_path / "used")
    # Writing over what is there, as a resumed run does, changes nothing and leaves nothing else.
    write_cached(tmp_path / "fresh", fresh)
    assert _contents(tmp_path / "fresh") == _contents(tmp_path / "used")


def test_a_missing_or_broken_file_is_named(
    bert: PreTrainedTokenizerBase, write_cached: Write, tmp_path: Path
) -> None:
    for name in ("tokenization.json", "id_to_string.json", "probe.json"):
        write_cached(tmp_path, bert)
        (tmp_path / name).write_text("{")
        with pytest.raises(UserError, match=r"re-run\s+cache-teacher"):
            read_tokenization(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            read_tokenization(tmp_path)


def test_a_table_that_was_changed_is_noticed(
    bert: PreTrainedTokenizerBase, write_cached: Write, tmp_path: Path
) -> None:
    write_cached(tmp_path, bert)
    table = tmp_path / "id_to_string.json"
    table.write_text(table.read_text().replace('"movie"', '"novel"', 1))
    with pytest.raises(CheckFailed, match=r"id_to_string.json is not the table"):
        read_tokenization(tmp_path)


def _documents(texts: list[str]) -> list[Document]:
    return [
        Document(text=text, source="s", split="train", position=position)
        for position, text in enumerate(texts)
    ]


def test_the_probe_mixes_even_longest_and_non_ascii() -> None:
    texts = ["x"] * 100
    texts[37], texts[51] = "é", "éé"
    samples = [TokenizedSample([0] * (9 if idx in (13, 88) else 2)) for idx in range(100)]
    probe = choose_probe(_documents(texts), samples, num=8)
    even = [document.sample_id.hex() for document in _documents(texts)]
    chosen = [even.index(document.sample_id) for document in probe]
    assert chosen == [0, 13, 25, 37, 50, 51, 75, 88]


@given(
    texts=st.lists(st.text(max_size=5), max_size=60),
    num=st.integers(1, 40),
    lengths=st.randoms(use_true_random=False),
)
def test_the_probe_holds_num_different_documents(texts: list[str], num: int, lengths) -> None:
    samples = [TokenizedSample([1] * lengths.randint(1, 9)) for _ in texts]
    probe = choose_probe(_documents(texts), samples, num=num)
    ids = [document.sample_id for document in probe]
    assert len(ids) == len(set(ids)) == min(num, len(texts))
    assert probe == choose_probe(_documents(texts), samples, num=num)
