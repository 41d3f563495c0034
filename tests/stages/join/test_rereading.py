"""The text that ids spell, and what another tokenizer makes of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.data.corpus import Document
from teacher_cache.stages.data.packing import pack
from teacher_cache.stages.join.rereading import Reader
from teacher_cache.stages.tokens.frame import Frame, unseen_spaces
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes
from tests.stages.join.test_byte_bounds import HARD_TEXTS
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace, tiny_sentencepiece


def reader(tokenizer: PreTrainedTokenizerBase, table: TokenBytes | None = None) -> Reader:
    table = table or token_bytes(tokenizer)
    return Reader(tokenizer=tokenizer, table=table, frame=Frame.of(tokenizer, table))


def can_spell(one: Reader, data: bytes) -> bool:
    """SmolLM2's table has no token for some control characters: it leaves them out."""
    return all(bytes([byte]) in one.table.content for byte in set(data))


@pytest.fixture(scope="session")
def readers(
    gpt2_tokenizer: PreTrainedTokenizerBase,
    gpt2_table: TokenBytes,
    smollm2_tokenizer: PreTrainedTokenizerBase,
    smollm2_table: TokenBytes,
    bert_tokenizer: PreTrainedTokenizerBase,
    bert_table: TokenBytes,
    sentencepiece: PreTrainedTokenizerBase,
) -> dict[str, Reader]:
    return {
        "gpt2": reader(gpt2_tokenizer, gpt2_table),
        "smollm2": reader(smollm2_tokenizer, smollm2_table),
        "bert": reader(bert_tokenizer, bert_table),
        "sentencepiece": reader(sentencepiece),
    }


def test_frames(readers: dict[str, Reader]) -> None:
    assert readers["gpt2"].frame == Frame(before=(), after=(), end_id=50256, adds_space=False)
    assert readers["smollm2"].frame == Frame(before=(), after=(), end_id=2, adds_space=False)
    assert readers["bert"].frame == Frame(before=(101,), after=(102,), end_id=None, adds_space=True)
    assert readers["sentencepiece"].frame == Frame(
        before=(1,),
        after=(),
        end_id=2,
        adds_space=True,
        adds_to_space=True,
        spaced=frozenset({0, 1, 2}),
    )


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "sentencepiece"])
@settings(max_examples=60)
@given(text=st.one_of(st.sampled_from(HARD_TEXTS), st.text(max_size=30)))
def test_a_cached_document_spells_its_text(
    name: str, readers: dict[str, Reader], text: str
) -> None:
    """As packing cached it, with its end of text; a text that ends with one has no second."""
    one = readers[name]
    assume(name == "sentencepiece" or can_spell(one, text.encode()))
    ids = np.array([*one.tokenizer(text)["input_ids"], one.frame.end_id])
    piece = one.piece_of_ids(ids, begins=True)
    assert piece.data == text.encode() and piece.has_end
    again = one.piece_of_bytes(piece.data, has_end=True)
    assert again.spans.ids.tolist() == ids.tolist()
    assert again.spans.bounds.tolist() == piece.spans.bounds.tolist()


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "sentencepiece", "bert"])
@settings(max_examples=60)
@given(data=st.binary(max_size=10), text=st.text(max_size=5))
def test_bytes_that_are_no_characters(
    name: str, readers: dict[str, Reader], data: bytes, text: str
) -> None:
    """Every byte is in one token, and where tokens are exact they spell the bytes."""
    one = readers[name]
    whole = text.encode() + data + text.encode()
    piece = one.piece_of_bytes(whole, has_end=False)
    inner = slice(piece.first, piece.stop)
    if piece.stop > piece.first:
        assert piece.spans.bounds[piece.first] == 0
    if name == "sentencepiece":  # which has a token for every byte
        assert piece.spans.bounds[piece.stop] == len(whole)
    if name in ("gpt2", "smollm2") and can_spell(one, whole):
        assert piece.is_exact[inner].all()
        assert b"".join(one.table.content[i] or b"" for i in piece.spans.ids[inner]) == whole


def test_pieces_of_a_document_that_is_cut_within_a_character(readers: dict[str, Reader]) -> None:
    one = readers["gpt2"]
    text = "go 🚀🚀🚀 日本語"
    document = Document(text=text, source="t", split="t", position=0)
    samples = pack([document], one.tokenizer, max_length=3).samples
    pieces = [one.piece_of_ids(x.input_ids.astype(np.int64), begins=False) for x in samples]
    assert b"".join(piece.data for piece in pieces) == text.encode()
    assert [piece.has_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    broken = 0
    for piece in pieces:
        broken += piece.data.decode(errors="replace").encode() != piece.data
        for other in (readers["smollm2"], readers["sentencepiece"], one):
            read = other.piece_of_bytes(piece.data, has_end=piece.has_end)
            assert read.data == piece.data
    assert broken > 1


def test_a_special_token_that_the_text_spells_is_text(readers: dict[str, Reader]) -> None:
    one = readers["gpt2"]
    ids = np.array([*one.tokenizer("a<|endoftext|>b")["input_ids"], 50256])
    assert (ids == 50256).sum() == 2
    piece = one.piece_of_ids(ids, begins=True)
    assert piece.data == b"a<|endoftext|>b"
    # What stands for the end elsewhere is no target here.
    assert piece.is_exact[:3].tolist() == [True, False, True]
    assert piece.is_spelt[:3].all() and not piece.spans.is_text[3]


def test_pieces_without_text(readers: dict[str, Reader]) -> None:
    for name, ids in (("gpt2", [50256]), ("sentencepiece", [1, 2]), ("sentencepiece", [1])):
        piece = readers[name].piece_of_ids(np.array(ids), begins=True)
        assert piece.data == b"" and piece.first == piece.stop == len(ids) - piece.has_end
        assert readers["gpt2"].piece_of_bytes(b"", has_end=False).spans.ids.tolist() == []


def test_only_a_documents_beginning_loses_the_space_that_was_added(
    readers: dict[str, Reader],
) -> None:
    one = readers["sentencepiece"]
    ids = np.array(one.tokenizer(" ab", add_special_tokens=False)["input_ids"])
    assert one.piece_of_ids(ids, begins=False).data == b"  ab"
    assert one.piece_of_ids(ids, begins=True).data == b" ab"
    # A begin of text stands before every piece, unless an old cache does not say.
    assert one.piece_of_ids(np.array([1, *ids]), begins=False).data == b"  ab"
    assert one.piece_of_ids(np.array([1, *ids]), begins=None).data == b" ab"
    assert one.piece_of_ids(ids, begins=None).data == b"  ab"


def test_a_space_before_a_text_is_taken_back_where_the_tokenizer_put_it() -> None:
    one = reader(tiny_metaspace())
    assert one.frame.adds_space and not one.frame.adds_to_space
    for text in ("a", "ab a", "   a", "  b"):
        ids = np.array(one.tokenizer(text)["input_ids"])
        assert one.piece_of_ids(ids, begins=True).data == text.encode()
        # A piece that goes on has lost nothing to take back.
        assert one.piece_of_ids(ids, begins=False).data.lstrip() == text.encode().lstrip()
    ids = np.array(one.tokenizer("a a")["input_ids"])
    assert one.piece_of_ids(ids, begins=False).data == b" a a"


@pytest.mark.parametrize("text", ["a</s>a", "a</s>  a", "</s>a", "a</s></s>b", "a </s>b<x>a"])
def test_a_space_put_behind_a_token_in_a_text_is_no_byte_of_it(text: str) -> None:
    """As Llama 2's first tokenizers and T5's do; a student learns no space that was not there."""
    for tokenizer in (tiny_sentencepiece(), tiny_metaspace()):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]})
        one = reader(tokenizer)
        ids = np.array([*tokenizer(text, add_special_tokens=False)["input_ids"], one.frame.end_id])
        piece = one.piece_of_ids(ids, begins=True)
        assert piece.data == text.encode() and piece.is_spelt[: piece.stop].all()
        # A student of this tokenizer reads it so, too, and its space is no other outcome.
        again = one.piece_of_bytes(piece.data, has_end=True)
        inner = again.spans.ids[again.first : again.stop].tolist()
        assert inner == ids[:-1].tolist() and again.is_spelt[again.first : again.stop].all()
        behind = 1 + inner.index(one.frame.end_id)
        has_own = "</s>  " in text and not one.frame.adds_to_space
        assert again.is_exact[again.first + behind] == has_own


def test_where_a_token_hides_a_space_is_said() -> None:
    tokenizer = tiny_metaspace()
    assert reader(tokenizer).frame.spaced == {1} and unseen_spaces(tokenizer)["</s>"]
    # Of a mark that is an added token the space behind it is the text's, and that is a guess.
    tokenizer.add_tokens([AddedToken("-", normalized=False)])
    one = reader(tokenizer)
    ids = np.array(one.tokenizer("a- a")["input_ids"])
    assert one.piece_of_ids(ids, begins=True).data == b"a- a"
    assert "white space beside '-'" in (one.caveat or "")
    # Of white space it is the tokenizer's: code is indented by what its tokens spell.
    tokenizer.add_tokens([AddedToken("\n", normalized=False), AddedToken("  ", normalized=False)])
    one = reader(tokenizer)
    ids = np.array(one.tokenizer("a\n  a\na")["input_ids"])
    assert one.piece_of_ids(ids, begins=True).data == b"a\n  a\na"
    # Some swallow what stands beside them.
    tokenizer = tiny_gemma()
    assert reader(tokenizer).caveat is None
    tokenizer.add_special_tokens({"mask_token": AddedToken("<mask>", lstrip=True)})
    assert (
        reader(tokenizer).caveat == "the tokens do not keep white space beside '<mask>' as they are"
    )


def test_an_unknown_token_that_ends_texts_is_no_text_either() -> None:
    settings_ = json.loads(tiny_metaspace().backend_tokenizer.to_str())
    settings_["model"]["unk_id"] = 1
    unigram = Tokenizer.from_str(json.dumps(settings_))
    model = models.BPE(vocab={"</s>": 0, "a": 1, "Ġ": 2}, merges=[], unk_token="</s>")
    byte_level = Tokenizer(model)
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    for backend in (unigram, byte_level):
        one = reader(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
        ids = one.tokenizer("a{a a", add_special_tokens=False)["input_ids"]
        piece = one.piece_of_ids(np.array([*ids, one.frame.end_id]), begins=True)
        assert piece.data == b"aa a" and piece.num_unknown == 1 and piece.has_end_token


def test_an_unknown_token_is_no_text_and_counted() -> None:
    one = reader(tiny_metaspace())
    ids = np.array(one.tokenizer("a{a a")["input_ids"])
    piece = one.piece_of_ids(ids, begins=True)
    assert piece.data == b"aa a" and piece.num_unknown == 1
    assert not piece.is_exact[ids.tolist().index(one.table.unknown)]


@pytest.mark.parametrize("name", ["gpt2", "bert", "sentencepiece"])
def test_only_a_documents_end_gets_what_stands_behind_a_text(
    name: str, readers: dict[str, Reader]
) -> None:
    one = readers[name]
    ended, cut = (one.piece_of_bytes(b" ab", has_end=has_end) for has_end in (True, False))
    assert len(cut) == cut.stop and ended.spans.ids[: len(cut)].tolist() == cut.spans.ids.tolist()
    assert tuple(ended.spans.ids[len(cut) :]) == one.frame.ends[0]
    # As packing has it: the one is the other's document, the end only at its end.
    assert one.piece_of_ids(ended.spans.ids, begins=True).has_end
    assert not one.piece_of_ids(cut.spans.ids, begins=True).has_end


def test_the_end_of_text_twice_behind_a_text_is_all_of_its_frame() -> None:
    tokenizer: Any = tiny_sentencepiece()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> </s>", special_tokens=[("</s>", 2)]
    )
    one = reader(tokenizer)
    piece = one.piece_of_ids(np.array(tokenizer("ab")["input_ids"]), begins=True)
    assert piece.data == b"ab" and piece.has_end and one.caveat is None
    assert one.frame.without_end(tokenizer("ab")["input_ids"])[-1] != 2


def test_a_begin_that_the_text_spells_is_not_put_twice(readers: dict[str, Reader]) -> None:
    one = readers["sentencepiece"]
    piece = one.piece_of_bytes(b"<s>ab", has_end=False)
    assert piece.spans.ids.tolist().count(1) == 1 and piece.spans.ids[0] == 1


def test_what_tokens_do_not_keep_is_said(readers: dict[str, Reader]) -> None:
    assert readers["gpt2"].caveat is None and readers["sentencepiece"].caveat is None
    caveat = readers["bert"].caveat or ""
    assert "WordPiece" in caveat and "capital letters, accents, runs of spaces" in caveat


def test_a_tokenizer_without_common_letters_has_a_frame_all_the_same() -> None:
    backend = Tokenizer(models.BPE(vocab={"▁": 0, "Ж": 1, "Д": 2}, merges=[]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    found = reader(PreTrainedTokenizerFast(tokenizer_object=backend)).frame
    assert found == Frame(before=(), after=(), end_id=None, adds_space=False)
    nothing = Tokenizer(models.BPE(vocab={"▁": 0}, merges=[]))
    nothing.normalizer = normalizers.Replace(" ", "▁")
    with pytest.raises(UserError, match="makes no token of any letter"):
        reader(PreTrainedTokenizerFast(tokenizer_object=nothing))
