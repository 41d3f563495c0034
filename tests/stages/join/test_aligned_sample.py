"""Where two tokenizations of a cached sample meet, against a walk over its bytes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import PackedSample, pack
from teacher_cache.stages.join.aligned_sample import AlignedSample, SampleAligner
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.token_bytes import token_bytes
from tests.stages.join.test_byte_bounds import HARD_TEXTS
from tests.stages.join.test_rereading import can_spell, readers  # noqa: F401  (a fixture)
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace


def cached(sample: PackedSample, seed: int = 0) -> dict[str, Any]:
    """A sample with log-probs that tell its positions apart."""
    found = -np.random.default_rng(seed).random(len(sample.input_ids))
    return {
        "input_ids": sample.input_ids,
        "segment": sample.segment,
        "loss_mask": sample.loss_mask,
        "next_log_prob": np.where(sample.loss_mask, found, 0).astype(np.float16),
    }


def samples_of(texts: list[str], one: Reader, max_length: int) -> list[PackedSample]:
    documents = [
        Document(text=text, source="t", split="t", position=i) for i, text in enumerate(texts)
    ]
    return pack(documents, one.tokenizer, max_length=max_length).samples


def borders(table: Any, ids: list[int], first: int, stop: int) -> list[int]:
    """Bytes read after each token of text."""
    return np.cumsum([0, *(len(table.content[one] or b"") for one in ids[first:stop])]).tolist()


def check_byte_level(aligned: AlignedSample, sample: Any, ours: Reader, theirs: Reader) -> None:
    """Byte-level tokenizers without frames but the end: walk every pair of positions."""
    chunk_sums = []
    for segment in np.unique(sample["segment"]):
        mine = np.flatnonzero(sample["segment"] == segment)
        yours = np.flatnonzero(aligned.segment == segment)
        my_ids, your_ids = sample["input_ids"][mine].tolist(), aligned.input_ids[yours].tolist()
        ends = my_ids[-1] == ours.frame.end_id
        assert (your_ids[-1:] == [theirs.frame.end_id]) == ends
        mine_stop, yours_stop = len(my_ids) - ends, len(your_ids) - ends
        my_bytes = borders(ours.table, my_ids, 0, mine_stop)[1:]
        your_bytes = borders(theirs.table, your_ids, 0, yours_stop)[1:]
        assert my_bytes[-1:] == your_bytes[-1:]
        for place, read in enumerate(your_bytes):
            expected = -1
            has_next = place + 1 < yours_stop or ends
            if read in my_bytes and has_next:
                expected = int(mine[my_bytes.index(read)])
            assert aligned.teacher_positions[yours[place]] == expected
            if expected >= 0 and place + 1 < yours_stop:
                following = my_bytes[my_bytes.index(read) + 1]
                assert aligned.is_one_to_one[yours[place]] == (following == your_bytes[place + 1])
        if ends:
            assert aligned.teacher_positions[yours[-1]] == -1
        # The first chunk is predicted by nobody.
        common = sorted(set(my_bytes) & set(your_bytes))
        for start, end in pairwise(common):
            first, stop = my_bytes.index(start), my_bytes.index(end)
            log_probs = sample["next_log_prob"][mine[first:stop]].astype(np.float64)
            chunk = len(chunk_sums)
            chunk_sums.append(log_probs.sum())
            tokens = range(your_bytes.index(start), your_bytes.index(end))
            assert {int(aligned.chunk_index[yours[one]]) for one in tokens} == {chunk}
    assert aligned.teacher_chunks.tolist() == pytest.approx(chunk_sums, abs=1e-6)


@pytest.mark.parametrize("pair", [("smollm2", "gpt2"), ("gpt2", "smollm2"), ("gpt2", "gpt2")])
@settings(max_examples=40)
@given(
    texts=st.lists(st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30)), max_size=4),
    max_length=st.integers(2, 20),
)
def test_equals_a_walk_over_bytes(
    pair: tuple[str, str],
    readers: dict[str, Reader],  # noqa: F811
    texts: list[str],
    max_length: int,
) -> None:
    ours, theirs = (readers[name] for name in pair)
    assume(all(can_spell(one, text.encode()) for one in (ours, theirs) for text in texts))
    aligner = SampleAligner(teacher=ours, student=theirs)
    for packed in samples_of(texts, ours, max_length):
        sample = cached(packed)
        aligned = aligner(sample)
        check_byte_level(aligned, sample, ours, theirs)
        assert aligned.teacher_nll == pytest.approx(-sample["next_log_prob"].astype(float).sum())


def test_the_same_tokenizer_is_the_identity(readers: dict[str, Reader]) -> None:  # noqa: F811
    """But for tokens that the tokenizer would not have chosen, where a document was cut."""
    one = readers["smollm2"]
    aligner = SampleAligner(teacher=one, student=one)
    texts = ["It is a truth universally acknowledged.", "Emma 🚀 1984", "x"]
    (packed,) = samples_of(texts, one, 64)
    aligned = aligner(cached(packed))
    assert aligned.input_ids.tolist() == packed.input_ids.tolist()
    assert aligned.segment.tolist() == packed.segment.tolist()
    expected = np.where(packed.loss_mask, np.arange(len(packed.input_ids)), -1)
    assert aligned.teacher_positions.tolist() == expected.tolist()
    assert aligned.is_one_to_one.tolist() == packed.loss_mask.tolist()
    assert aligned.num_bytes == aligned.num_teacher_bytes


@pytest.mark.parametrize("teacher", ["gpt2", "sentencepiece"])
def test_a_begin_of_sequence_on_one_side(
    teacher: str,
    readers: dict[str, Reader],  # noqa: F811
) -> None:
    """It neither moves nor joins anything; the side without one predicts one token less."""
    student = "sentencepiece" if teacher == "gpt2" else "gpt2"
    ours, theirs = readers[teacher], readers[student]
    aligner = SampleAligner(teacher=ours, student=theirs)
    (packed,) = samples_of(["ab ab é a", "b a"], ours, 64)
    aligned = aligner(cached(packed))
    known = aligned.teacher_positions >= 0
    assert known.sum() == 6 and len(aligned.teacher_chunks) == 4
    # Both have read the same text at every pair.
    for place in np.flatnonzero(known):
        position = aligned.teacher_positions[place]
        assert packed.segment[position] == aligned.segment[place]
        read = []
        for side, ids, segment, at in (
            (ours, packed.input_ids, packed.segment, position),
            (theirs, aligned.input_ids, aligned.segment, place),
        ):
            start = int(np.searchsorted(segment, segment[at]))
            text = side.tokenizer.decode(ids[start : at + 1].tolist(), skip_special_tokens=True)
            read.append(str(text).strip())
        assert read[0] == read[1]
    # The `▁` of a text's beginning is no byte of it, so nothing is said of the first token.
    begins = np.flatnonzero(np.append(True, np.diff(aligned.segment) > 0))
    assert (aligned.teacher_positions[begins[[student == "sentencepiece"] * len(begins)]] < 0).all()
    assert abs(aligned.num_bytes - aligned.num_teacher_bytes) <= 4


def test_a_sample_of_which_nothing_is_left(readers: dict[str, Reader]) -> None:  # noqa: F811
    aligner = SampleAligner(teacher=readers["sentencepiece"], student=readers["gpt2"])
    sample = {
        "input_ids": np.array([1], np.uint32),
        "segment": np.zeros(1, np.uint16),
        "loss_mask": np.zeros(1, bool),
        "next_log_prob": np.zeros(1, np.float16),
    }
    aligned = aligner(sample)
    assert len(aligned.input_ids) == len(aligned.teacher_chunks) == 0


def test_chunks_whose_sides_spell_other_bytes_are_left_out_and_counted(
    readers: dict[str, Reader],  # noqa: F811
) -> None:
    """A student that reads lower case alone: ` IS` is not ` is`."""
    aligner = SampleAligner(teacher=readers["gpt2"], student=readers["bert"])
    (packed,) = samples_of([" the film IS good of it"], readers["gpt2"], 64)
    sample = cached(packed)
    aligned = aligner(sample)
    assert aligned.num_unequal_chunks == 1
    # The first has no prediction; `film`, `good`, `of` and `it` are compared.
    expected = -sample["next_log_prob"].astype(np.float64)[[0, 2, 3, 4]]
    assert (-aligned.teacher_chunks).tolist() == pytest.approx(expected.tolist())


def test_an_unknown_token_of_the_teachers_is_in_no_chunk_and_no_target(
    readers: dict[str, Reader],  # noqa: F811
) -> None:
    tokenizer = tiny_metaspace()
    table = token_bytes(tokenizer)
    ours = Reader.of(tokenizer)
    aligner = SampleAligner(teacher=ours, student=readers["gpt2"])
    (packed,) = samples_of(["a a{ a a"], ours, 64)
    sample = cached(packed) | {"continues": np.array(False)}
    aligned = aligner(sample)
    unknown = packed.input_ids.tolist().index(table.unknown)
    assert aligned.num_unknown == 1
    assert unknown - 1 not in aligned.teacher_positions
    with_it = -sample["next_log_prob"][unknown - 1 : unknown + 1].astype(np.float64).sum()
    assert not np.isclose(-aligned.teacher_chunks, with_it, atol=1e-4).any()
    text = readers["gpt2"].tokenizer.decode(aligned.input_ids, skip_special_tokens=True)
    assert text == "a a a a"


def test_a_student_reads_its_end_once_however_a_document_is_cut(
    readers: dict[str, Reader],  # noqa: F811
) -> None:
    ours, theirs = readers["gpt2"], readers["bert"]
    aligner = SampleAligner(teacher=ours, student=theirs)
    samples = samples_of(["the film is good and long " * 4], ours, 8)
    ends = [int((aligner(cached(one)).input_ids == 102).sum()) for one in samples]
    assert len(ends) > 2 and ends == [0] * (len(ends) - 1) + [1]


def test_a_piece_that_goes_on_keeps_its_space() -> None:
    """Each piece has a begin, so the cache says which of them begins its document."""
    tokenizer = tiny_gemma()
    one = Reader.of(tokenizer)
    aligner = SampleAligner(teacher=one, student=one)
    text = "def x x x\n\n    x\n\tdef"
    read = []
    for packed in samples_of([text], one, 6):
        aligned = aligner(cached(packed) | {"continues": np.array(packed.continues)})
        assert aligned.input_ids.tolist() == packed.input_ids.tolist()
        read.append(tokenizer.decode(aligned.input_ids, skip_special_tokens=True))
    assert len(read) > 2 and "".join(read) == text
