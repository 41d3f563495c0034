from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from teacher_cache.cache.errors import CheckFailed, UserError
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes
from teacher_cache.stages.tokens.vocabulary_map import (
    MAP_FILE,
    VocabularyMap,
    exact_map,
    read_map,
    write_map,
)
from tests.tiny_tokenizers import tiny_gemma


def test_a_table_maps_to_itself(smollm2_table: TokenBytes) -> None:
    found = exact_map(smollm2_table, smollm2_table)
    assert found.student_ids.tolist() == list(range(49_152))


def test_every_mapped_pair_means_the_same(
    smollm2_table: TokenBytes, gpt2_table: TokenBytes
) -> None:
    found = exact_map(smollm2_table, gpt2_table)
    assert found.num_mapped == len(set(smollm2_table.keys) & set(gpt2_table.keys))
    for teacher_id, student_id in enumerate(found.student_ids.tolist()):
        key = smollm2_table.keys[teacher_id]
        if student_id >= 0:
            assert gpt2_table.keys[student_id] == key
        else:
            assert key not in gpt2_table.keys[:256] + gpt2_table.keys[-1:]
    assert found.student_ids[0] == 50_256  # <|endoftext|>, both sides' own


def test_the_two_ends_of_text_are_one_outcome(
    smollm2_table: TokenBytes, gpt2_table: TokenBytes
) -> None:
    """Also where the student has a token called like the teacher's end, and ends by another."""
    exact = exact_map(gpt2_table, smollm2_table).student_ids
    assert exact[50_256] == 0  # <|endoftext|> of both; SmolLM2's documents end by <|im_end|>
    joined = exact_map(gpt2_table, smollm2_table, ends=(50_256, 2))
    assert joined.student_ids[50_256] == 2
    assert np.array_equal(joined.student_ids[:50_256], exact[:50_256])
    back = exact_map(smollm2_table, gpt2_table, ends=(2, 50_256)).student_ids
    assert back[[0, 2]].tolist() == [50_256, 50_256]
    for ends in ((None, 2), (50_256, None)):
        assert np.array_equal(exact_map(gpt2_table, smollm2_table, ends=ends).student_ids, exact)


def test_special_tokens_gaps_and_single_bytes() -> None:
    teacher = TokenBytes(content=(b"a", None, b"x", b"a", b"<s>"), special=frozenset({4}))
    student = TokenBytes(content=(b"a", b"a", b"<s>", None), shadowed=frozenset({0}))
    found = exact_map(teacher, student)
    assert found.student_ids.tolist() == [1, -1, -1, 1, -1]
    assert found.num_mapped == 2


def test_the_single_bytes_of_sentencepiece_stand_back(sentencepiece, gpt2_table) -> None:
    table = token_bytes(sentencepiece)
    found = exact_map(gpt2_table, table)
    vocabulary = sentencepiece.get_vocab()
    assert found.student_ids[gpt2_table.content.index(b"a")] == vocabulary["a"]
    assert found.student_ids[gpt2_table.content.index(b"\xf0")] == vocabulary["<0xF0>"]
    assert found.student_ids[gpt2_table.content.index(b" a")] == vocabulary["▁a"]


def test_an_added_text_maps_to_the_id_that_the_students_tokenizer_writes(gpt2_table) -> None:
    tokenizer = tiny_gemma()
    table, vocabulary = token_bytes(tokenizer), tokenizer.get_vocab()
    there = exact_map(gpt2_table, table).student_ids
    for text, piece in ((b"\n", "\n"), (b"\t", "\t"), (b" ", "▁"), (b"x", "x")):
        written = tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
        assert written == [vocabulary[piece]] == [there[gpt2_table.content.index(text)]]
    back = exact_map(table, gpt2_table).student_ids
    assert gpt2_table.content[back[vocabulary["\n"]]] == b"\n"


def test_what_is_unknown_maps_to_nothing_and_nothing_to_it(bert_table: TokenBytes) -> None:
    other = TokenBytes(content=(b"[UNK]", b" the"), special=frozenset({0}))
    found = exact_map(other, bert_table).student_ids
    assert found[0] == -1 and bert_table.content[found[1]] == b" the"
    back = exact_map(bert_table, other).student_ids
    assert back[bert_table.unknown] == -1 and 0 not in back


def test_a_named_token_is_the_other_sides_though_only_one_of_them_is_special() -> None:
    special = TokenBytes(content=(b"<think>",), special=frozenset({0}), added=frozenset({0}))
    plain = TokenBytes(content=(b"<think>",), added=frozenset({0}))
    typed = TokenBytes(content=(b"<think>",))
    assert exact_map(special, plain).student_ids.tolist() == [0]
    assert exact_map(plain, special).student_ids.tolist() == [0]
    assert exact_map(special, typed).student_ids.tolist() == [-1]


def test_a_cache_that_was_mapped_to_the_former_table_still_serves_it() -> None:
    table = token_bytes(tiny_gemma())
    found = exact_map(table, table)
    former = replace(found, student_sha256=table.former_sha256)
    former.require_student(table)
    with pytest.raises(CheckFailed, match="serves no other student"):
        replace(found, student_sha256="0" * 64).require_student(table)


def test_comes_back_from_the_folder(
    smollm2_table: TokenBytes, gpt2_table: TokenBytes, tmp_path: Path
) -> None:
    written = exact_map(smollm2_table, gpt2_table)
    write_map(tmp_path, written)
    found = read_map(tmp_path)
    assert np.array_equal(found.student_ids, written.student_ids)
    assert found.sha256 == written.sha256
    assert found.support == f"aligned:{written.sha256}"
    assert [path.name for path in tmp_path.iterdir()] == [MAP_FILE]
    first = (tmp_path / MAP_FILE).read_bytes()
    write_map(tmp_path, found)
    assert (tmp_path / MAP_FILE).read_bytes() == first


def test_a_changed_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary_map\.json is missing.*re-run cache-teacher"):
        read_map(tmp_path)
    table = TokenBytes(content=(b"a", b"b"))
    write_map(tmp_path, exact_map(table, table))
    path = tmp_path / MAP_FILE
    content = path.read_text()
    path.write_text(content.replace('"student_ids":[0,1]', '"student_ids":[1,0]'))
    with pytest.raises(CheckFailed, match="was changed"):
        read_map(tmp_path)
    for broken in ("{", "[]", content.replace("[0,1]", "[0,7]"), content.replace("sha256", "s")):
        path.write_text(broken)
        with pytest.raises(UserError, match="holds no vocabulary map"):
            read_map(tmp_path)


def test_the_hash_is_of_both_tables_and_the_ids() -> None:
    tables = [TokenBytes(content=content) for content in ((b"a", b"b"), (b"a", b"c"), (b"a",))]
    maps = [exact_map(teacher, student) for teacher in tables for student in tables]
    assert len({found.sha256 for found in maps}) == len(maps)


def test_an_aligned_cache_serves_its_own_table_only(
    smollm2_table: TokenBytes, gpt2_table: TokenBytes
) -> None:
    found = exact_map(smollm2_table, gpt2_table)
    found.require_student(gpt2_table)
    with pytest.raises(CheckFailed, match="serves no other student"):
        found.require_student(smollm2_table)


def test_ids_beyond_the_student_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        VocabularyMap(
            student_ids=np.array([0, 2]),
            num_student_ids=2,
            teacher_sha256="",
            student_sha256="",
        )
