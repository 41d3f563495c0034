import json
import subprocess
import sys

from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from teacher_cache.stages.tokens.record import (
    TokenizationRecord,
    canonical_files,
    describe,
    id_to_string,
)


def test_describes_bert(bert: PreTrainedTokenizerBase) -> None:
    record = describe(bert, max_length=128)
    assert record.tokenizer_class == "BertTokenizer"
    assert record.vocab_size == 30_522
    assert record.special_tokens == {
        "unk_token": ("[UNK]", 100),
        "sep_token": ("[SEP]", 102),
        "pad_token": ("[PAD]", 0),
        "cls_token": ("[CLS]", 101),
        "mask_token": ("[MASK]", 103),
    }
    assert json.loads(record.normalizer)["lowercase"] is True
    assert json.loads(record.pre_tokenizer) == {"type": "BertPreTokenizer"}
    assert (record.max_length, record.model_max_length) == (128, 512)
    assert (record.padding_side, record.truncation_side) == ("right", "right")


def test_describes_gpt2(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    record = describe(gpt2_tokenizer, max_length=128)
    assert record.vocab_size == 50_257
    assert record.special_tokens["eos_token"] == ("<|endoftext|>", 50_256)
    assert record.normalizer == "null"


def test_describes_a_tokenizer_without_tokenizer_json() -> None:
    tokenizer = ByT5Tokenizer()
    record = describe(tokenizer, max_length=128)
    assert record.vocab_size == len(tokenizer)
    assert record.model_max_length is None
    assert record == describe(ByT5Tokenizer(), max_length=128)
    assert record != describe(ByT5Tokenizer(extra_ids=100), max_length=128)


def test_survives_json(bert: PreTrainedTokenizerBase) -> None:
    record = describe(bert, max_length=128)
    assert TokenizationRecord.model_validate_json(record.model_dump_json()) == record


def test_calls_in_between_change_nothing(bert: PreTrainedTokenizerBase) -> None:
    before = describe(bert, max_length=128), canonical_files(bert)
    bert(["a text", "another, longer text"], truncation=True, max_length=4, padding=True)
    assert (describe(bert, max_length=128), canonical_files(bert)) == before


def test_extra_special_tokens_are_recorded(bert: PreTrainedTokenizerBase) -> None:
    bert.add_special_tokens({"additional_special_tokens": ["[SPEAKER]"]})
    record = describe(bert, max_length=128)
    assert record.special_tokens["extra_0"] == ("[SPEAKER]", 30_522)
    assert record.vocab_size == 30_523


def test_table_gives_the_string_of_every_id(gpt2_tokenizer: PreTrainedTokenizerBase) -> None:
    table = id_to_string(gpt2_tokenizer)
    assert table == gpt2_tokenizer.convert_ids_to_tokens(list(range(len(gpt2_tokenizer))))
    assert table[50_256] == "<|endoftext|>"


def test_ids_without_a_string_are_none() -> None:
    class Sparse:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 3}

    assert id_to_string(Sparse()) == ["a", None, None, "b"]  # pyright: ignore[reportArgumentType]


def test_the_join_needs_no_torch() -> None:
    code = (
        "import sys, teacher_cache.stages.join.compare, teacher_cache.stages.join.report\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
