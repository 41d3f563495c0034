from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.stages.join.aligned_sample import Chunks, align_spans
from teacher_cache.stages.tokens.byte_bounds import TokenSpans, spans_of_bytes, tokenize_with_spans
from teacher_cache.stages.tokens.token_bytes import TokenBytes
from tests.stages.join.test_byte_bounds import HARD_TEXTS, Named


def _spans(bounds: list[int], *, special: tuple[int, ...] = ()) -> TokenSpans:
    num = len(bounds) - 1
    is_text = np.array([idx not in special for idx in range(num)], dtype=bool)
    return TokenSpans(ids=np.zeros(num, dtype=np.int64), bounds=np.array(bounds), is_text=is_text)


def _chunks_slowly(teacher: TokenSpans, student: TokenSpans) -> list[tuple[int, int]]:
    """Byte ranges between two bytes at which both have a border, walking byte by byte."""
    ranges, start = [], None
    for byte in range(int(max(teacher.bounds[-1], student.bounds[-1])) + 1):
        if byte in teacher.bounds and byte in student.bounds:
            if start is not None:
                ranges.append((start, byte))
            start = byte
    return ranges


def _check(chunks: Chunks, teacher: TokenSpans, student: TokenSpans) -> None:
    """Every byte once on both sides, in whole tokens, and no border that both have is missed."""
    assert [tuple(one) for one in chunks.byte_range.tolist()] == _chunks_slowly(teacher, student)
    for spans, ranges in ((teacher, chunks.teacher), (student, chunks.student)):
        used = []
        for (first, stop), (start, end) in zip(ranges, chunks.byte_range, strict=True):
            assert first < stop
            assert spans.bounds[first] == start and spans.bounds[stop] == end
            used += range(first, stop)
        inside = (spans.bounds[:-1] >= chunks.byte_range[:1, 0].sum()) & (
            spans.bounds[1:] <= chunks.byte_range[-1:, 1].sum()
        )
        if len(chunks):
            assert used == np.flatnonzero(inside & spans.is_text).tolist()


widths = st.lists(st.integers(0, 4), max_size=12)


@settings(max_examples=200)
@given(teacher=widths, student=widths, bos=st.tuples(st.booleans(), st.booleans()))
def test_any_two_tokenizations_equal_a_slow_loop(
    teacher: list[int], student: list[int], bos: tuple[bool, bool]
) -> None:
    # Both cover as many bytes: the shorter gets one token more.
    lengths = [[*teacher], [*student]]
    lengths[0].append(max(sum(student) - sum(teacher), 0))
    lengths[1].append(max(sum(teacher) - sum(student), 0))
    ours, theirs = (
        _spans([0] * has_bos + np.cumsum([0, *each]).tolist(), special=(0,) if has_bos else ())
        for each, has_bos in zip(lengths, bos, strict=True)
    )
    _check(align_spans(ours, theirs), ours, theirs)


@pytest.mark.parametrize("pair", [("smollm2", "gpt2"), ("bert", "smollm2"), ("gpt2", "bert")])
@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30)))
def test_real_tokenizers_cover_every_byte_once(
    pair: tuple[str, str], named: Named, text: str
) -> None:
    ours, theirs = (tokenize_with_spans([text], *named[name])[0] for name in pair)
    chunks = align_spans(ours, theirs)
    _check(chunks, ours, theirs)
    covered = int(np.diff(chunks.byte_range, axis=1).sum())
    both = ours.is_text.any() and theirs.is_text.any()
    assert covered == (len(text.encode()) if both else 0)


@settings(max_examples=60)
@given(data=st.binary(max_size=12), seed=st.integers(0, 99))
def test_bytes_that_are_no_characters(gpt2_table: TokenBytes, data: bytes, seed: int) -> None:
    """Byte by byte on one side, in any pieces on the other."""
    pieces = [gpt2_table.content.index(bytes([byte])) for byte in data]
    ours = spans_of_bytes([50256, *pieces], gpt2_table)
    generator = np.random.default_rng(seed)
    cuts = np.unique([0, len(data), *generator.integers(0, len(data) + 1, size=3)])
    theirs = _spans(cuts.tolist())
    chunks = align_spans(ours, theirs)
    _check(chunks, ours, theirs)
    assert len(chunks) == len(cuts) - 1


def test_one_sided_begin_of_sequence_collapses_nothing() -> None:
    text = [0, 3, 5, 9]
    chunks = align_spans(_spans([0, *text], special=(0,)), _spans(text))
    assert chunks.teacher.tolist() == [[1, 2], [2, 3], [3, 4]]
    assert chunks.student.tolist() == [[0, 1], [1, 2], [2, 3]]
    assert chunks.is_one_to_one.tolist() == [True] * 3
    # The student's first token has no position before it.
    assert chunks.is_predicted.tolist() == [False, True, True]
    teacher, student = chunks.one_to_one_positions()
    assert (teacher.tolist(), student.tolist()) == ([1, 2], [0, 1])


def test_both_ends_special_and_an_empty_text() -> None:
    for empty in (_spans([0]), _spans([0, 0, 0], special=(0, 1))):
        chunks = align_spans(empty, _spans([0, 0], special=(0,)))
        assert len(chunks) == 0
        assert chunks.teacher.shape == chunks.student.shape == chunks.byte_range.shape == (0, 2)
        assert chunks.is_one_to_one.tolist() == chunks.is_predicted.tolist() == []
        assert chunks.index_of_positions(chunks.teacher, 2).tolist() == [-1, -1]


def test_a_cut_side_aligns_as_far_as_it_goes() -> None:
    chunks = align_spans(_spans([0, 2, 4, 7]), _spans([0, 2, 3, 5, 7, 9]))
    assert chunks.byte_range.tolist() == [[0, 2], [2, 7]]
    assert chunks.student.tolist() == [[0, 1], [1, 4]]
    late = align_spans(_spans([4, 7, 9]), _spans([0, 2, 4, 9]))
    assert late.byte_range.tolist() == [[4, 9]]
    assert late.teacher.tolist() == [[0, 2]]
    assert late.student.tolist() == [[2, 3]]


def test_text_without_bytes_counts_with_what_follows_it() -> None:
    # A begin of sequence, a `▁` that the text has not, a word, the end of sequence.
    chunks = align_spans(_spans([0, 0, 0, 4, 4], special=(0, 3)), _spans([0, 4]))
    assert chunks.teacher.tolist() == [[1, 3]]
    assert not chunks.is_one_to_one.any()
    last = align_spans(_spans([0, 4, 4]), _spans([0, 4]))
    assert last.teacher.tolist() == [[0, 2]]


def test_positions_point_at_the_token_that_follows() -> None:
    teacher = _spans([0, 0, 2, 4, 7, 7], special=(0, 4))
    chunks = align_spans(teacher, _spans([0, 0, 4, 6, 7], special=(0,)))
    assert chunks.index_of_positions(chunks.teacher, 5).tolist() == [0, 0, 1, -1, -1]
    assert chunks.index_of_positions(chunks.student, 4).tolist() == [0, 1, 1, -1]
    unpredicted = align_spans(_spans([0, 2, 4]), _spans([0, 4]))
    assert unpredicted.index_of_positions(unpredicted.teacher, 2).tolist() == [-1, -1]


def test_an_emojis_bytes_are_cut_where_both_cut_them(named: Named) -> None:
    ours, theirs = (
        tokenize_with_spans(["go 🚀!"], *named[name])[0] for name in ("smollm2", "gpt2")
    )
    chunks = align_spans(ours, theirs)
    inside = [start for start, _ in chunks.byte_range.tolist() if 3 < start < 7]
    assert inside == sorted(set(ours.bounds.tolist()) & set(theirs.bounds.tolist()) & {4, 5, 6})
    assert inside  # both have such a border here
