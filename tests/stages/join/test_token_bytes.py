import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from teacher_cache.cache.errors import UserError
from teacher_cache.stages.tokens.token_bytes import TokenBytes, token_bytes
from tests.tiny_tokenizers import tiny_gemma, tiny_metaspace


@pytest.mark.parametrize("name", ["gpt2", "smollm2"])
@settings(max_examples=60)
@given(text=st.text(max_size=40))
def test_the_tokens_of_a_text_spell_it(
    name: str, gpt2_tokenizer, smollm2_tokenizer, gpt2_table, smollm2_table, text: str
) -> None:
    tokenizer, table = {
        "gpt2": (gpt2_tokenizer, gpt2_table),
        "smollm2": (smollm2_tokenizer, smollm2_table),
    }[name]
    ids = tokenizer(text)["input_ids"]
    kept = bytes(byte for byte in text.encode() if bytes([byte]) in table.content)
    assert b"".join(table.content[token_id] for token_id in ids) == kept


def test_single_bytes_that_have_a_token(gpt2_table: TokenBytes, smollm2_table: TokenBytes) -> None:
    every = {bytes([byte]) for byte in range(256)}
    assert every <= set(gpt2_table.content)
    # SmolLM2 drops these bytes from a text without a word: six control characters and what begins
    # no character that its training text had.
    dropped = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")
    assert every - set(smollm2_table.content) == {bytes([byte]) for byte in dropped}


def test_added_tokens_never_equal_plain_text(
    gpt2_table: TokenBytes, smollm2_table: TokenBytes
) -> None:
    plain = TokenBytes(content=(b"<|endoftext|>",))
    assert gpt2_table.content[50256] == plain.content[0]
    assert gpt2_table.keys[50256] != plain.keys[0]
    assert gpt2_table.keys[50256] == smollm2_table.keys[0]
    assert len(smollm2_table.added) == 17


def test_wordpiece_words_begin_with_a_space_and_marks_do_not(
    bert_tokenizer: PreTrainedTokenizerBase, bert_table: TokenBytes
) -> None:
    def of(string: str) -> bytes | None:
        return bert_table.content[bert_tokenizer.get_vocab()[string]]

    assert of("the") == b" the"
    assert of("a") == b" a"
    assert of("##ing") == b"ing"
    assert of(".") == b"."
    assert of("#") == b"#"
    assert of("的") == "的".encode()
    assert of("[SEP]") == b"[SEP]"
    assert bert_table.caveat and "spaces" in bert_table.caveat


def test_the_words_of_a_plain_text_spell_it(
    bert_tokenizer: PreTrainedTokenizerBase, bert_table: TokenBytes
) -> None:
    text = " an unbelievably long sentence, with marks."
    ids = bert_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(bert_table.content[token_id] or b"" for token_id in ids) == text.encode()


def test_sentencepiece_spaces_and_bytes(sentencepiece: PreTrainedTokenizerBase) -> None:
    table = token_bytes(sentencepiece)
    vocabulary = sentencepiece.get_vocab()
    assert table.content[vocabulary["▁ab"]] == b" ab"
    assert table.content[vocabulary["▁▁"]] == b"  "
    assert table.content[vocabulary["<0xF0>"]] == b"\xf0"
    # The letters and the space have tokens of their own.
    assert table.shadowed == {vocabulary[f"<0x{byte:02X}>"] for byte in b" ab"}
    assert table.special == {vocabulary["<s>"], vocabulary["</s>"], vocabulary["<unk>"]}
    ids = sentencepiece("ab 🚀 éa", add_special_tokens=False)["input_ids"]
    assert b"".join(table.content[token_id] or b"" for token_id in ids) == " ab 🚀 éa".encode()


@pytest.mark.parametrize("code", ["def f(x):\n    x\n\n\tx", "x     x\n\n\n  x", "<table>\n x"])
def test_added_tokens_that_are_plain_text_are_spelt_as_the_decoder_does(code: str) -> None:
    tokenizer = tiny_gemma()
    table = token_bytes(tokenizer)
    ids = tokenizer(code, add_special_tokens=False)["input_ids"]
    assert b"".join(table.content[one] or b"" for one in ids) == code.encode()
    assert tokenizer.decode(ids) == code
    spaces = tokenizer.get_vocab()["▁▁▁▁"]
    assert spaces in table.added - table.special and table.keys[spaces] == b"=    "
    assert table.keys[tokenizer.get_vocab()["<eos>"]] == b"+<eos>"
    # A release that took them for markers named the table otherwise.
    assert table.former_sha256 != table.sha256


def test_the_name_of_an_added_token_of_bytes_is_its_text(gpt2_tokenizer) -> None:
    tokenizer = copy.deepcopy(gpt2_tokenizer)
    tokenizer.add_tokens(["é!", AddedToken("     ", special=False)])
    table = token_bytes(tokenizer)
    ids = tokenizer("xé!     y")["input_ids"]
    assert b"".join(table.content[one] or b"" for one in ids) == "xé!     y".encode()
    assert ids[1] == len(tokenizer) - 2
    # GPT-2's own five spaces are never written any more.
    assert table.text_ids[b"     "] == len(tokenizer) - 1


def test_what_is_unknown_is_no_text(bert_tokenizer, bert_table: TokenBytes) -> None:
    for tokenizer, name in ((bert_tokenizer, "[UNK]"), (tiny_metaspace(), "<unk>")):
        table, unknown = token_bytes(tokenizer), tokenizer.get_vocab()[name]
        assert table.unknown == unknown and table.content[unknown] is None
        assert table.keys[unknown] == b"+" + name.encode()
        assert table.sha256 == table.former_sha256
    # Where every byte has a token, nothing is unknown.
    assert token_bytes(tiny_gemma()).unknown is None


def test_wordpieces_mark_alone_writes_nothing() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "##a": 2, "##": 3}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert table.content == (None, b" a", b"a", None)


def test_tokens_with_an_end_of_word_are_refused() -> None:
    model = models.BPE(vocab={"a</w>": 0, "a": 1}, merges=[], end_of_word_suffix="</w>")
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    with pytest.raises(UserError, match=r"'</w>' in its tokens.*expected byte-level BPE"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_table_that_the_decoder_contradicts_is_refused_with_the_evidence() -> None:
    backend = tiny_gemma().backend_tokenizer
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Replace("def", "fed"),
            decoders.Fuse(),
        ]
    )
    with pytest.raises(UserError, match=r"'def', reads as 'def' and its decoder writes 'fed'"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_ids_without_a_token_are_none() -> None:
    backend = Tokenizer(models.BPE(vocab={"a": 0, "Ġb": 3}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])
    table = token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert table.content == (b"a", None, None, b" b")
    assert table.keys == [b"=a", None, None, b"= b"]


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(UserError, match=r"WordLevel.*expected byte-level BPE"):
        token_bytes(words)


def test_a_table_of_every_byte(qwen_table: TokenBytes) -> None:
    assert len(qwen_table) == 151_643
    assert len(set(qwen_table.content)) == 151_643
    assert {bytes([byte]) for byte in range(256)} == set(qwen_table.content[:256])


def test_the_hash_tells_kinds_places_and_borders_apart() -> None:
    tables = [
        TokenBytes(content=(b"a", b"b")),
        TokenBytes(content=(b"b", b"a")),
        TokenBytes(content=(b"ab", b"")),
        TokenBytes(content=(b"a", None, b"b")),
        TokenBytes(content=(b"a", b"b"), special=frozenset({1})),
    ]
    assert len({table.sha256 for table in tables}) == len(tables)
    assert tables[0].sha256 == TokenBytes(content=(b"a", b"b"), caveat="none").sha256
