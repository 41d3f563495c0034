"""Tokenizers of kinds that come in no package, made by hand."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def tiny_sentencepiece() -> PreTrainedTokenizerBase:
    """A tiny tokenizer as Llama's: BPE over `▁`, lone bytes for the rest, a begin of sequence.

    Its normaliser puts a `▁` before the text, as the original does.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "é", "▁a", "ab", "▁ab", "▁▁"]
    ids = {piece: idx for idx, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b"), ("▁", "▁")]
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_gemma() -> PreTrainedTokenizerFast:
    """A tiny tokenizer as Gemma's: runs of spaces, line breaks and tags are added, plain text."""
    text = ["\n", "\n\n", "\t", "▁▁", "▁▁▁▁", "<table>"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *text]
    pieces += [f"<0x{byte:02X}>" for byte in range(256) if byte != 9]
    pieces += ["▁", "d", "e", "f", "x", "▁x", "de", "def", "▁▁▁"]
    ids = {piece: idx for idx, piece in enumerate(pieces)}
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("▁▁", "▁"), ("▁", "x"), ("d", "e"), ("de", "f")]
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_tokens([AddedToken(one, normalized=False) for one in text])
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


def tiny_metaspace() -> PreTrainedTokenizerFast:
    """A tiny Unigram as T5's: a space is put before a text that begins with none, no lone bytes."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("a", -2.0), ("b", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def tiny_byte_level(special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tiny tokenizer as GPT-2's: all bytes, a few merges, an end of text and further tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "a"), ("Ġ", "the"), (":", ":"), ("Ġ", "i")]
    pieces = ["<|endoftext|>", *alphabet, *("".join(one) for one in merges)]
    ids = {piece: idx for idx, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer
