from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from teacher_cache.cache.errors import UserError
from teacher_cache.cache.plan import ShardPlan
from teacher_cache.stages.data import packing
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packaged.austen import chapters
from teacher_cache.stages.data.packing import Packed, PackedSample, pack, pack_tokens
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace, tiny_sentencepiece

ODD = ["\U0001f9d1‍\U0001f680 naïve", "汉字。かな", "", " \n\t", "a", "\x00�", "é" * 40]

Tokens = Sequence[tuple[bytes, np.ndarray]]


def documents_of(texts: Sequence[str]) -> list[Document]:
    return [Document(text, "test", "train", idx) for idx, text in enumerate(texts)]


def tokens_of(lengths: Sequence[int]) -> Tokens:
    """Documents whose tokens are 1000 times their number, counted up."""
    return [
        (idx.to_bytes(16, "little"), np.arange(length, dtype=np.uint32) + 1000 * idx)
        for idx, length in enumerate(lengths)
    ]


def unpacked(samples: Sequence[PackedSample]) -> dict[bytes, list[int]]:
    """The tokens of each document, in the order in which its pieces come."""
    found: dict[bytes, list[int]] = {}
    for sample in samples:
        for segment, piece in enumerate(sample.pieces):
            tokens = found.setdefault(piece.document_id, [])
            assert piece.start == len(tokens)  # no gap, nothing twice
            tokens += sample.input_ids[sample.segment == segment].tolist()
            assert piece.stop == len(tokens)
    return found


lengths_and_limit = st.tuples(st.lists(st.integers(1, 40), max_size=30), st.integers(2, 17))


@settings(max_examples=200)
@given(lengths_and_limit)
def test_every_token_is_there_once_and_in_order(given_: tuple[list[int], int]) -> None:
    lengths, max_length = given_
    documents = tokens_of(lengths)
    samples = pack_tokens(documents, max_length=max_length)
    found = unpacked(samples)
    assert list(found) == [document_id for document_id, _ in documents]
    for document_id, ids in documents:
        assert found[document_id] == ids.tolist()
    for sample in samples:
        assert 1 <= len(sample.input_ids) <= max_length
        assert (sample.input_ids.dtype, sample.segment.dtype) == (np.uint32, np.uint16)


@settings(max_examples=200)
@given(lengths_and_limit)
def test_segments_masks_and_positions(given_: tuple[list[int], int]) -> None:
    lengths, max_length = given_
    for sample in pack_tokens(tokens_of(lengths), max_length=max_length):
        owners = sample.input_ids // 1000  # the document of each token
        num_tokens = len(owners)
        expected, counts, places = [], [], []
        for t in range(num_tokens):
            is_new = t == 0 or owners[t] != owners[t - 1]
            expected.append(expected[-1] + is_new if t else 0)
            counts.append(t + 1 < num_tokens and owners[t] == owners[t + 1])
            places.append(0 if is_new else places[-1] + 1)
        assert sample.segment.tolist() == expected  # contiguous, from 0
        assert sample.loss_mask.tolist() == counts
        assert sample.position_ids.tolist() == places
        assert len(sample.pieces) == expected[-1] + 1


@settings(max_examples=200)
@given(lengths_and_limit)
def test_only_what_must_be_cut_is_cut_and_no_sequence_could_take_its_next(
    given_: tuple[list[int], int],
) -> None:
    lengths, max_length = given_
    samples = pack_tokens(tokens_of(lengths), max_length=max_length)
    for document_id, ids in tokens_of(lengths):
        pieces = [one for sample in samples for one in sample.pieces
                  if one.document_id == document_id]  # fmt: skip
        assert len(pieces) == -(-len(ids) // max_length)
        assert all(piece.stop - piece.start == max_length for piece in pieces[:-1])
    for sample, following in itertools.pairwise(samples):
        first = following.pieces[0]
        assert len(sample.input_ids) + first.stop - first.start > max_length


@settings(max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 7), st.integers(0, 30))
def test_more_documents_change_the_last_shard_only(
    lengths: list[int], per_shard: int, num_first: int
) -> None:
    def shards(num_documents: int) -> list[list[bytes]]:
        plan = ShardPlan(num_documents=num_documents, documents_per_shard=per_shard)
        return [
            [sample.sample_id for sample in pack_tokens(documents[slice(*plan.documents(idx))],
                                                        max_length=12)]
            for idx in range(len(plan))
        ]  # fmt: skip

    documents = tokens_of(lengths)
    fewer = min(num_first, len(documents))
    whole_shards = fewer // per_shard
    assert shards(fewer)[:whole_shards] == shards(len(documents))[:whole_shards]


def test_an_id_is_of_the_pieces() -> None:
    def ids(*lengths: int, first: int = 0, max_length: int = 10) -> list[bytes]:
        documents = tokens_of(lengths)[first:]
        return [one.sample_id for one in pack_tokens(documents, max_length=max_length)]

    found = ids(3, 30, 4, 1)
    assert len(set(found)) == len(found) == 5 and {len(one) for one in found} == {16}
    assert ids(3, 30, 4, 1) == found
    # Of the last document one token more, the first left out, other cuts.
    more = ids(3, 30, 4, 2)
    assert more[:-1] == found[:-1] and more[-1] != found[-1]
    assert ids(3, 30, 4, 1, first=1) == found[1:]
    assert not {*ids(3, 30, 4, 1, first=1, max_length=9)} & {*found[1:-1]}


def test_an_index_of_16_bits_names_every_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_SEGMENTS", 3)
    samples = pack_tokens(tokens_of([1] * 8), max_length=100)
    assert [len(sample.pieces) for sample in samples] == [3, 3, 2]


def texts_of(packed: Packed, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.decode(ids)) for ids in unpacked(packed.samples).values()]


def test_a_document_ends_with_the_tokenizers_end_of_text(
    gpt2_tokenizer: PreTrainedTokenizerBase,
) -> None:
    documents = documents_of([*ODD, "ended<|endoftext|>"])
    kept = [document.text for document in documents if document.text.strip()]
    packed = pack(documents, gpt2_tokenizer, max_length=16)
    assert (packed.num_documents, packed.num_empty) == (6, 2)
    assert packed.num_continued == sum(len(ids) > 16 for ids in unpacked(packed.samples).values())
    assert packed.num_continued > 0
    expected = [text.removesuffix("<|endoftext|>") + "<|endoftext|>" for text in kept]
    assert texts_of(packed, gpt2_tokenizer) == expected
    bare = pack(documents, gpt2_tokenizer, max_length=16, document_end="none")
    assert texts_of(bare, gpt2_tokenizer) == kept
    ids = [gpt2_tokenizer(text)["input_ids"] for text in kept]
    assert list(unpacked(bare.samples).values()) == ids


def test_the_tokenizers_own_special_tokens_stay(bert_tokenizer: PreTrainedTokenizerBase) -> None:
    packed = pack(documents_of(["One.", "Two."]), bert_tokenizer, max_length=512)
    (sample,) = packed.samples
    # It has no end-of-text token, and adds its own.
    assert bert_tokenizer.decode(sample.input_ids) == "[CLS] one. [SEP] [CLS] two. [SEP]"
    settings_ = packing.packing_settings(bert_tokenizer, max_length=8, document_end="eos")
    assert settings_["end_id"] is None


def test_settings_name_the_token_at_the_end(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    def made(end: packing.DocumentEnd) -> object:
        return packing.packing_settings(gpt2_tokenizer, max_length=8, document_end=end)["end_id"]

    assert (made("eos"), made("none")) == (50256, None)


def test_nothing_but_empty_documents(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    packed = pack(documents_of(["", "  "]), gpt2_tokenizer, max_length=16)
    assert (packed.samples, packed.num_documents, packed.num_empty) == ([], 0, 2)


@pytest.mark.parametrize("max_length", [0, 1])
def test_a_length_without_room_is_refused(
    gpt2_tokenizer: PreTrainedTokenizerBase, max_length: int
) -> None:
    with pytest.raises(UserError, match="give at least 2"):
        pack(documents_of(["a"]), gpt2_tokenizer, max_length=max_length)


def test_a_novel_comes_back(austen_dir: Path, gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = chapters((austen_dir / "persuasion.txt").read_text())[:6]
    packed = pack(documents_of(texts), gpt2_tokenizer, max_length=512)
    found = texts_of(packed, gpt2_tokenizer)
    assert found == [text + "<|endoftext|>" for text in texts]
    assert packed.num_continued == 6
    # Of each 512 tokens all but one predict a next one; documents lose nothing more.
    num_tokens = sum(len(sample.input_ids) for sample in packed.samples)
    num_counted = sum(sample.loss_mask.sum() for sample in packed.samples)
    assert num_counted == num_tokens - sum(len(sample.pieces) for sample in packed.samples)


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=6), st.integers(2, 20))
def test_any_text_comes_back(
    gpt2_tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> None:
    packed = pack(documents_of(texts), gpt2_tokenizer, max_length=max_length, document_end="none")
    expected = [text for text in texts if text.strip()]
    assert [gpt2_tokenizer(text)["input_ids"] for text in expected] == list(
        unpacked(packed.samples).values()
    )
    assert packed.num_empty == len(texts) - len(expected)


def test_each_piece_begins_as_a_text_does() -> None:
    tokenizer = tiny_gemma()
    (document,) = documents_of(["def x x x x x x"])
    whole = tokenizer(document.text)["input_ids"]
    samples = pack([document], tokenizer, max_length=4).samples
    assert len(samples) > 2 and {int(one.input_ids[0]) for one in samples} == {2}
    assert [one.continues for one in samples] == [False] + [True] * (len(samples) - 1)
    again = [2, *(int(x) for one in samples for x in one.input_ids[1:])]
    assert again == [*whole, tokenizer.eos_token_id]
    assert all(len(one.input_ids) == len(one.position_ids) <= 4 for one in samples)
    # Caches of the first version have none before a piece that goes on.
    former = pack([document], tokenizer, max_length=5, version=1).samples
    assert [int(one.input_ids[0]) for one in former].count(2) == 1


def test_a_text_that_spells_its_begin_has_one() -> None:
    tokenizer = tiny_gemma()
    packed = pack(documents_of(["<bos>def x", "def x"]), tokenizer, max_length=16)
    assert packed.num_begun == 1
    assert packed.samples[0].input_ids.tolist().count(2) == 2  # of two documents


def test_documents_with_a_space_that_no_token_tells_are_counted() -> None:
    texts = [" a", "  a", "a", "a</s> b", "a</s>b", "a b"]
    assert pack(documents_of(texts), tiny_metaspace(), max_length=16).num_unseen == 2
    # Where a space is put before any text, one of its own shows.
    assert pack(documents_of(texts), tiny_sentencepiece(), max_length=16).num_unseen == 0
    assert pack(documents_of(texts), tiny_gemma(), max_length=16).num_unseen == 0


def test_the_version_changes_only_where_something_does(
    gpt2_tokenizer: PreTrainedTokenizerBase, bert_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = [
        packing.packing_version(one)
        for one in (gpt2_tokenizer, bert_tokenizer, tiny_gemma(), tiny_metaspace())
    ]
    assert found == [1, 2, 2, 2]
    settings_ = packing.packing_settings(tiny_gemma(), max_length=8, document_end="eos", version=2)
    assert settings_["version"] == 2 and settings_["begin_ids"] == [2]


def test_a_begin_leaves_room_for_a_token() -> None:
    tokenizer = tiny_gemma()
    assert pack(documents_of(["def"]), tokenizer, max_length=2).samples
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <bos> $A", special_tokens=[("<bos>", 2)]
    )
    with pytest.raises(UserError, match="give at least 3"):
        pack(documents_of(["def"]), tokenizer, max_length=2)
